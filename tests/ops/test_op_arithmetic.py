from __future__ import annotations

import math

import pytest
import torch

from ckptsurgery.ops import OpError, make_op
from ckptsurgery.specs import DTYPES, TensorSpec


def run(name, tensor, *args, **keywords):
    (result,) = make_op(name, args, keywords).run((tensor,))
    return result


def tensor(values, dtype):
    return torch.tensor(values, dtype=getattr(torch, DTYPES[dtype].torch))


CASTS = [
    # dtype, values, target, values afterwards
    ("F32", [1.0, -0.5, math.inf], "BF16", [1.0, -0.5, math.inf]),
    ("F32", [1.00390625], "BF16", [1.0]),
    ("F64", [1e-50], "F32", [0.0]),
    ("F32", [448.0, 0.3], "F8_E4M3", [448.0, 0.3125]),
    ("F32", [math.inf], "F8_E5M2", [math.inf]),
    ("I64", [0, 1, -7], "F16", [0.0, 1.0, -7.0]),
    ("I64", [2**24 + 1], "F32", [2.0**24]),
    ("U64", [2**64 - 1], "F64", [2.0**64]),
    ("F32", [3.0, -0.0], "I8", [3, 0]),
    ("F64", [2.0**63], "U64", [2**63]),
    ("I64", [255], "U8", [255]),
    ("U64", [7], "I8", [7]),
    ("I8", [0, 1], "BOOL", [False, True]),
    ("BOOL", [True], "BF16", [1.0]),
    ("C64", [1 + 2j], "C128", [1 + 2j]),
]


@pytest.mark.parametrize(("old", "values", "new", "after"), CASTS)
def test_cast_keeps_what_the_dtype_holds_and_rounds_the_rest(old, values, new, after):
    result = run("cast", tensor(values, old), new)
    assert TensorSpec(result.shape, result.dtype) == TensorSpec([len(values)], new)
    assert (result.float() if DTYPES[new].bits == 8 and DTYPES[new].kind == "float" else result).tolist() == after


PAST = [
    ("F32", [1.0, 70000.0], "F16", [1.0, 65504.0], "1 of 2 values lie outside the range of F16, ±65504"),
    ("F32", [-449.0], "F8_E4M3", [-448.0], "±448"),
    ("F32", [math.inf], "F8_E4M3", [448.0], "±448"),
    ("F32", [1e6], "F8_E5M2", [57344.0], "±57344"),
    ("F32", [1e6], "F8_E4M3FNUZ", [240.0], "±240"),
    ("F64", [1e300], "F32", [torch.finfo(torch.float32).max], "F32"),
    ("F32", [3.4e38, math.nan], "BF16", [torch.finfo(torch.bfloat16).max, math.nan], "BF16"),
    ("I64", [100000, 3], "F16", [65504.0, 3.0], "F16"),
    ("I64", [-1, 256, 3], "U8", [0, 255, 3], "2 of 3 values lie outside the range of U8, 0 to 255"),
    ("I8", [-1], "U8", [0], "U8"),
    ("U64", [2**64 - 1], "I64", [2**63 - 1], "I64"),
    ("U64", [2**64 - 1], "I8", [127], "I8"),
    ("I64", [-5], "U64", [0], "U64"),
    ("F64", [2.0**64, 1.0], "U64", [2**64 - 1, 1], "U64"),
    ("F32", [300.0], "U8", [255], "U8"),
    ("U8", [2], "BOOL", [True], "range of BOOL, 0 to 1"),
]


@pytest.mark.parametrize(("old", "values", "new", "after", "text"), PAST)
def test_a_value_past_the_range_is_an_error_or_on_request_the_end_of_the_range(old, values, new, after, text):
    with pytest.raises(OpError) as caught:
        run("cast", tensor(values, old), new)
    assert text in str(caught.value)
    result = run("cast", tensor(values, old), new, saturate=True)
    assert repr((result.float() if DTYPES[new].kind == "float" and DTYPES[new].bits == 8 else result).tolist()) == repr(
        tensor(after, "F32").tolist() if new.startswith("F8") else tensor(after, new).tolist()
    )


def test_an_infinity_stays_one_where_the_dtype_has_it():
    assert run("cast", torch.tensor([math.inf, 7e4]), "f16", saturate=True).tolist() == [math.inf, 65504.0]


@pytest.mark.parametrize("values", [[0.5], [math.nan], [math.inf]])
def test_only_whole_numbers_become_integers(values):
    with pytest.raises(OpError, match="not all values are whole numbers"):
        run("cast", torch.tensor(values), "i32", saturate=True)


def test_casting_floats_alone_leaves_ids_and_masks_as_they_are():
    ids = torch.arange(3)
    assert run("cast", ids, "bf16", floats=True) is ids
    assert run("cast", torch.ones(3), "bf16", floats=True).dtype == torch.bfloat16


@pytest.mark.parametrize(("old", "new"), [("C64", "F32"), ("F32", "C64"), ("F4", "F32"), ("F32", "F8_E8M0")])
def test_kinds_that_do_not_convert_are_refused_from_the_header(old, new):
    with pytest.raises(OpError, match="cast"):
        make_op("cast", (new,)).infer((TensorSpec([2], old),))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_narrow_floats_are_computed_in_float32_and_rounded_once(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(getattr(torch, DTYPES[dtype].torch))
    assert torch.equal(run("add", values, 0.3).float(), (values.float() + 0.3).to(values.dtype).float())
    assert torch.equal(run("mul", values, 0.3).float(), (values.float() * 0.3).to(values.dtype).float())


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64", "F8_E4M3"])
def test_arithmetic_that_would_overflow_is_an_error_and_an_infinity_that_was_there_is_none(dtype):
    row = DTYPES[dtype]
    large = torch.finfo(getattr(torch, row.torch)).max
    with pytest.raises(OpError, match="range of " + dtype):
        run("mul", tensor([large], dtype), 2)
    if dtype != "F8_E4M3":
        assert run("mul", tensor([math.inf, 1.0], dtype), 2).tolist() == [math.inf, 2.0]


def test_integers_are_exact_up_to_the_end_of_their_range():
    assert run("add", torch.tensor([2**62, -(2**62)]), 2**62 - 1).tolist() == [2**63 - 1, -1]
    assert run("add", torch.tensor([5], dtype=torch.uint8), -5).tolist() == [0]
    assert run("mul", torch.tensor([0]), 2**63).tolist() == [0]
    for values, op, value in [([127], "add", 1), ([-128], "mul", -1), ([0], "add", 2**63)]:
        with pytest.raises(OpError, match="outside the range of I8"):
            run(op, torch.tensor(values, dtype=torch.int8), value)


@pytest.mark.parametrize("dtype", ["BOOL", "U64", "C64", "F4"])
@pytest.mark.parametrize("name", ["add", "mul"])
def test_what_cannot_be_computed_with_is_refused_from_the_header(name, dtype):
    with pytest.raises(OpError, match="computes with floats"):
        make_op(name, (1,)).infer((TensorSpec([2], dtype),))


def test_a_fraction_does_not_meet_integers():
    with pytest.raises(OpError, match="meets integers"):
        make_op("add", (0.5,)).infer((TensorSpec([2], "I32"),))


@pytest.mark.parametrize("value", [math.inf, math.nan, 2**64])
def test_a_number_that_no_dtype_holds_is_no_argument(value):
    with pytest.raises(OpError):
        make_op("add", (value,))


INVERSES = [
    ("add", 1, "F32", "add(value=-1)", None),
    ("add", 1, "I32", "add(value=-1)", "add(value=-1)"),
    ("mul", 3, "F32", f"mul(value={1 / 3})", None),
    ("mul", 4, "F32", "mul(value=0.25)", "mul(value=0.25)"),
    ("mul", -8, "BF16", "mul(value=-0.125)", "mul(value=-0.125)"),
    ("mul", 0.5, "F32", "mul(value=2.0)", None),
    ("mul", 4, "I32", "mul(value=0.25)", None),
    ("mul", -1, "I32", "mul(value=-1)", "mul(value=-1)"),
    ("mul", 0, "F32", None, None),
]


@pytest.mark.parametrize(("name", "value", "dtype", "symbolic", "exact"), INVERSES)
def test_the_symbolic_inverse_may_round_and_the_one_for_known_inputs_may_not(name, value, dtype, symbolic, exact):
    made = make_op(name, (value,))
    found = made.inverse(), made.inverse((TensorSpec([2], dtype),))
    assert tuple(op and str(op) for op in found) == (symbolic, exact)


@pytest.mark.parametrize(
    ("old", "new", "back"),
    [
        ("BF16", "F32", "cast(dtype=BF16)"),
        ("F32", "BF16", None),
        ("F32", "F32", "cast(dtype=F32)"),
        ("U8", "I16", "cast(dtype=U8)"),
    ],
)
def test_a_cast_comes_back_where_nothing_was_rounded(old, new, back):
    inverse = make_op("cast", (new,)).inverse((TensorSpec([2], old),))
    assert (inverse and str(inverse)) == back
    assert make_op("cast", (new,)).inverse() is None
