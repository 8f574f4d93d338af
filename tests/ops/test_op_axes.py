from __future__ import annotations

import math

import pytest
import torch

from ckptsurgery.ops import OpError, make_op
from ckptsurgery.specs import TensorSpec


def test_same_passes_the_first_of_equal_tensors_and_nans_are_equal_by_their_bits():
    a = torch.tensor([1.0, math.nan, -0.0])
    assert make_op("same").run((a, a.clone(), a.clone()))[0] is a
    assert make_op("same", ("r",)).run((torch.stack([a, a]),))[0].shape == (3,)


@pytest.mark.parametrize(
    ("first", "second"),
    [([0.0], [-0.0]), ([1.0], [1.0000001]), ([math.nan], [-math.nan])],
    ids=["signed zero", "last bit", "signed nan"],
)
def test_same_refuses_what_differs_in_a_bit_and_says_where(first, second):
    a, b = torch.tensor([[7.0, *first]]), torch.tensor([[7.0, *second]])
    b = torch.copysign(b, torch.tensor([[1.0, math.copysign(1.0, second[0])]]))
    with pytest.raises(OpError, match=r"source 1 differs from source 0 in 1 of 2 elements, first at \[0, 1\]"):
        make_op("same").run((a, b))
    with pytest.raises(OpError, match="r 1 differs from r 0"):
        make_op("same", ("r",)).run((torch.stack([a, b]),))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.uint16, torch.complex64, torch.complex128])
def test_same_compares_any_dtype_and_any_layout(dtype):
    a = torch.arange(6).reshape(2, 3).to(torch.uint8).to(dtype)
    b = a.t().contiguous().t()
    assert make_op("same").run((a, b))[0] is a
    b = b.clone()
    b[1, 2] = 0
    with pytest.raises(OpError, match=r"first at \[1, 2"):
        make_op("same").run((a, b))


def test_same_wants_equal_specs_and_one_tensor_or_slice_at_least():
    spec = TensorSpec([2], "F32")
    for made, specs, text in [
        (make_op("same"), (spec, TensorSpec([2], "BF16")), "different tensors"),
        (make_op("same"), (), "no tensor"),
        (make_op("same", ("r",)), (TensorSpec([0, 2], "F32"),), "no slice"),
        (make_op("same", ("r",)), (TensorSpec([], "F32"),), "axis in front"),
        (make_op("mean_over", ("r",)), (TensorSpec([0, 2], "F32"),), "no mean"),
        (make_op("mean_over", ("r",)), (TensorSpec([2], "I64"),), "floats"),
        (make_op("sum_over", ("r",)), (TensorSpec([2], "BOOL"),), "floats"),
    ]:
        with pytest.raises(OpError, match=text):
            made.infer(specs)


def test_over_an_axis_same_and_repeat_undo_each_other_and_joined_sources_do_not():
    assert str(make_op("same", ("r",)).inverse((TensorSpec([2, 3], "F32"),))) == "repeat_over(axis=r)"
    assert str(make_op("repeat_over", ("r",)).inverse((TensorSpec([3], "F32"),))) == "same(axis=r)"
    assert make_op("same").inverse() is None


@pytest.mark.parametrize(
    ("text", "role", "joins"),
    [
        ("same", None, True),
        ("same r", "reduce", False),
        ("repeat_over r", "repeat", False),
        ("mean_over r", "reduce", False),
    ],
)
def test_an_op_says_whether_it_joins_sources_or_works_on_an_axis(text, role, joins):
    name, *axis = text.split()
    made = make_op(name, tuple(axis))
    assert (made.axis_role, made.joins) == (role, joins)
    assert made.axis == (axis[0] if axis else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_mean_and_sum_round_once(dtype):
    parts = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = parts if dtype == torch.float64 else parts.float()
    assert torch.equal(make_op("mean_over", ("r",)).run((parts,))[0], wide.mean(0).to(dtype))
    assert torch.equal(make_op("sum_over", ("r",)).run((parts,))[0], wide.sum(0).to(dtype))


def test_a_sum_past_the_range_is_an_error():
    for parts in [
        torch.tensor([[100], [100]], dtype=torch.int8),
        torch.tensor([[2**62], [2**62]]),
        torch.tensor([[2**63 - 1], [2**63 - 1], [2]]),
        torch.tensor([[6e4], [6e4]], dtype=torch.float16),
        torch.tensor([[3e38], [3e38]]),
    ]:
        with pytest.raises(OpError, match="outside the range"):
            make_op("sum_over", ("r",)).run((parts,))
    assert make_op("sum_over", ("r",)).run((torch.tensor([[math.inf], [1.0]]),))[0].tolist() == [math.inf]
