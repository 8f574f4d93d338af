"""Laws that every built-in op keeps, over random ops, specs and bytes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from quantised_cases import QUANTISED

from ckptsurgery.language.calls import parse_call
from ckptsurgery.ops import Op, OpError, make_op, op_summary
from ckptsurgery.specs import DTYPES, TensorSpec, dtype_name

FLOATS = ["F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"]
INTEGERS = ["I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"]
COMPLEX = ["C64", "C128"]
ALL = [*FLOATS, *INTEGERS, *COMPLEX, "BOOL"]
SIZE = st.integers(0, 5)
SHAPE = st.lists(SIZE, max_size=4).map(tuple)
FLOAT, ANY = st.sampled_from(FLOATS), st.sampled_from(ALL)
PAIR = st.tuples(st.integers(1, 4), st.integers(1, 4))


def specs(*shapes, dtype=FLOAT):
    return st.tuples(*(st.builds(TensorSpec, s, dtype) for s in shapes))


def op(name, **arguments):
    return st.fixed_dictionaries(arguments).map(lambda a: make_op(name, (), a))


@st.composite
def pos_embed(draw):
    old, new, prefix, batch = draw(PAIR), draw(PAIR), draw(st.integers(0, 2)), draw(st.sampled_from([(), (1,)]))
    mode = draw(st.sampled_from(["timm", "plain", "dinov2", "torchvision", "big_vision"]))
    spec = TensorSpec((*batch, prefix + old[0] * old[1], draw(SIZE)), draw(FLOAT))
    return make_op("resize_pos_embed", (new,), {"prefix": prefix, "old_grid": old, "mode": mode}), (spec,)


@st.composite
def rel_pos_bias(draw):
    old, new = draw(st.tuples(st.integers(3, 5), st.integers(3, 5))), draw(PAIR)
    extra, mode = draw(st.sampled_from([0, 3])), draw(st.sampled_from(["bicubic", "geometric"]))
    spec = TensorSpec(((2 * old[0] - 1) * (2 * old[1] - 1) + extra, draw(SIZE)), draw(FLOAT))
    return make_op("resize_rel_pos_bias", (new, mode), {"extra": extra, "old_window": old}), (spec,)


@st.composite
def quantised(draw):
    block, shape = draw(PAIR), draw(st.lists(SIZE, min_size=2, max_size=3))
    scale = [*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1])]
    pair = TensorSpec(shape, draw(FLOAT)), TensorSpec(scale, draw(FLOAT))
    return make_op("fp8_dequant", (), {"block": block, "dtype": draw(FLOAT)}), pair


@st.composite
def low_rank(draw):
    out, inner, rank = draw(SIZE), draw(SIZE), draw(st.integers(1, 3))
    kernel = draw(st.sampled_from([(), (3,), (3, 3)]))
    flip = draw(st.booleans()) and not kernel
    weight = (inner, out) if flip else (out, inner, *kernel)
    shapes = weight, (rank, inner, *kernel), (out, rank, *[1] * len(kernel))
    form = {"fan_in_fan_out": flip, "rslora": draw(st.booleans())}
    three = draw(specs(*map(st.just, shapes)))
    if draw(st.booleans()):
        alpha = TensorSpec(draw(st.sampled_from([(), (1,)])), draw(st.sampled_from([*FLOATS, *INTEGERS])))
        return make_op("lora_merge", (), form), (*three, alpha)
    return make_op("lora_merge", (draw(st.integers(-4, 4)),), form), three


@st.composite
def low_rank_pairs(draw):
    count = draw(st.integers(1, 3))
    _, (weight, *_) = draw(low_rank())
    wide = TensorSpec(weight.shape, draw(FLOAT))
    pairs = [TensorSpec((r, *s), "F32") for r, s in ((draw(st.integers(1, 3)), wide.shape[1:]) for _ in range(count))]
    ups = [TensorSpec((wide.shape[0], a.shape[0], *(1 for _ in wide.shape[2:])), "F32") for a in pairs]
    made = make_op("lora_add", (tuple(0.5 * n for n in range(1, count + 1)),))
    return made, (wide, *(spec for pair in zip(pairs, ups) for spec in pair))


@st.composite
def magnitudes(draw):
    made, (weight, a, b, *_) = draw(low_rank())
    form = {"fan_in_fan_out": made.fan_in_fan_out, "rslora": made.rslora}
    out = weight.shape[1 if made.fan_in_fan_out else 0]
    magnitude = TensorSpec((1, out, *(1 for _ in weight.shape[2:])) if len(weight.shape) > 2 else (out,), draw(FLOAT))
    return make_op("dora_merge", (2,), form), (weight, a, b, magnitude)


@st.composite
def low_rank_experts(draw):
    experts, out, inner, rank = (draw(st.integers(1, 3)) for _ in range(4))
    order = draw(st.sampled_from(["out_in", "in_out"]))
    sides = (out, inner) if order == "out_in" else (inner, out)
    shapes = (experts, *sides), (experts * rank, inner), (out, rank * experts)
    made = make_op("lora_merge_experts", (2,), {"order": order, "rslora": draw(st.booleans())})
    return made, draw(specs(*map(st.just, shapes)))


@st.composite
def diagonal_blocks(draw):
    kernel, dtype = draw(st.sampled_from([(), (3,), (1, 1)])), draw(ANY)
    shapes = draw(st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=3))
    return make_op("block_diagonal", ()), tuple(TensorSpec((*shape, *kernel), dtype) for shape in shapes)


@st.composite
def product(draw):
    rows, inner, columns = draw(SIZE), draw(SIZE), draw(SIZE)
    turned = [draw(st.booleans()), draw(st.booleans())]
    shapes = [shape[::-1] if turn else shape for shape, turn in zip([(rows, inner), (inner, columns)], turned)]
    made = make_op("matmul", (*turned, draw(st.integers(0, 1))))
    return made, draw(specs(*map(st.just, shapes)))


@st.composite
def matrix_of_rank(draw):
    rank = draw(st.integers(1, 3))
    sides = draw(st.integers(rank, 5)), draw(st.integers(rank, 5))
    return make_op("low_rank", (rank,)), (TensorSpec(sides, draw(FLOAT)),)


@st.composite
def batch_norm(draw):
    out, inner, count = draw(SIZE), draw(st.lists(SIZE, max_size=3)), draw(st.sampled_from([4, 5]))
    each = draw(specs(*[st.just((out,))] * count))
    return make_op("fold_batchnorm", (0.5,)), (TensorSpec((out, *inner), draw(FLOAT)), *each)


@st.composite
def scaled(draw):
    weight = draw(st.lists(SIZE, min_size=1, max_size=3))
    dim = draw(st.integers(-len(weight), len(weight) - 1))
    made = make_op("scale_by", (dim,), {"offset": draw(st.sampled_from([0, 1]))})
    return made, (TensorSpec(weight, draw(FLOAT)), TensorSpec((weight[dim],), draw(FLOAT)))


@st.composite
def weight_norm(draw):
    shape, dtype = draw(st.lists(SIZE, min_size=1, max_size=3)), draw(FLOAT)
    dim = draw(st.sampled_from([None, *range(len(shape))]))
    g = () if dim is None else [n if i == dim else 1 for i, n in enumerate(shape)]
    return make_op("fold_weight_norm", (dim,)), (TensorSpec(g, dtype), TensorSpec(shape, dtype))


@st.composite
def resized_rows(draw):
    spec, n = draw(specs(st.tuples(st.integers(1, 5), SIZE)))[0], draw(SIZE)
    old, new = st.integers(0, spec.shape[0] - 1), st.integers(0, max(n - 1, 0))
    tables = st.dictionaries(new.map(str), old, max_size=n).map(lambda d: tuple(d.items()))
    lists = st.lists(old, max_size=n).map(tuple)
    fill = draw(st.sampled_from(["mean", "normal", "zeros"]))
    return make_op("resize_rows", (n, fill), {"rows": draw(st.none() | tables | lists)}), (spec,)


@st.composite
def combined_rows(draw):
    spec = TensorSpec((draw(st.integers(1, 6)), *draw(SHAPE)[:2]), draw(st.sampled_from(["F64", "F32", "F16", "BF16"])))
    n, old = draw(st.integers(1, 6)), st.integers(0, spec.shape[0] - 1)
    entries = draw(st.lists(st.tuples(st.integers(0, n - 1), old, st.sampled_from([0.5, 1.0, -1.0])), max_size=8))
    new, rows, weights = (tuple(side) for side in zip(*entries)) if entries else ((), (), ())
    fill = draw(st.sampled_from(["mean", "zeros"]))
    return make_op("combine_rows", (n, new, rows, weights, fill)), (spec,)


@st.composite
def sliced(draw):
    spec = TensorSpec((draw(SIZE), *draw(SHAPE)[:2]), draw(ANY))
    start = draw(st.integers(0, spec.shape[0]))
    stop = draw(st.none() | st.integers(start, spec.shape[0]))
    return make_op("slice_rows", (start, stop)), (spec,)


@st.composite
def indexed(draw, name):
    count, rest = draw(st.integers(1, 5)), draw(SHAPE)[:2]
    ids = draw(st.lists(st.integers(0, count - 1), max_size=count, unique=name != "take").map(tuple))
    if name == "take":
        whole = draw(st.booleans())
        ids = tuple(draw(st.permutations(range(count)))) if whole else ids
        return make_op("take", ("x", ids, whole and draw(st.booleans()))), (TensorSpec((count, *rest), draw(ANY)),)
    if name == "insert_rows":
        return make_op(name, (ids, draw(NUMBER))), (TensorSpec((count - len(ids), *rest), draw(ANY)),)
    return make_op(name, (ids,)), (TensorSpec((count, *rest), draw(ANY)),)


NUMBER = st.integers(-3, 3) | st.sampled_from([0.5, -1.5, 0.0])
ROWED = st.tuples(SIZE, SIZE)
FRONTED = st.tuples(st.integers(1, 4), SIZE)
KERNEL = st.tuples(SIZE, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
INPUT_MODES = st.sampled_from(["timm", "repeat", "sum", "mean", "zero_new"])
AXIS = st.just("r")


@st.composite
def merge(draw, name, count=None):
    shape, dtype = draw(SHAPE), draw(FLOAT)
    made = make_op(name, MERGES[name])
    return made, tuple(TensorSpec(shape, dtype) for _ in range(count or draw(st.integers(3, 4))))


MERGES = {"lerp": (0.3,), "ema": (0.9,), "diff": (), "apply": (0.5,), "slerp": (0.3,), "nuslerp": (0.3,)}
PAIRS = tuple(MERGES)
MERGES |= {"task_arithmetic": (0.7,), "dare": (0.4,), "ties": (0.4,), "breadcrumbs": (0.6, 0.1), "della": (0.4, 0.1)}
MERGES |= {"model_stock": (), "karcher": ()}
CASES = {
    **{name: merge(name, 2 if name in PAIRS else None) for name in MERGES},
    "cast": st.tuples(op("cast", dtype=ANY, floats=st.booleans(), saturate=st.booleans()), specs(SHAPE, dtype=ANY)),
    "add": st.tuples(op("add", value=NUMBER), specs(SHAPE, dtype=ANY)),
    "mul": st.tuples(op("mul", value=NUMBER), specs(SHAPE, dtype=ANY)),
    "same": st.tuples(op("same", axis=AXIS), specs(FRONTED, dtype=ANY))
    | st.tuples(op("same"), specs(SHAPE, dtype=ANY).map(lambda s: s * 3)),
    "repeat_over": st.tuples(op("repeat_over", axis=AXIS), specs(SHAPE, dtype=ANY)),
    "mean_over": st.tuples(op("mean_over", axis=AXIS), specs(FRONTED)),
    "sum_over": st.tuples(op("sum_over", axis=AXIS), specs(ROWED, dtype=ANY)),
    "slice_rows": sliced(),
    "take": indexed("take"),
    "drop_rows": indexed("drop_rows"),
    "insert_rows": indexed("insert_rows"),
    "pad_to_multiple": st.tuples(op("pad_to_multiple", n=st.integers(1, 7), value=NUMBER), specs(ROWED, dtype=ANY)),
    "resize_rows": resized_rows(),
    "combine_rows": combined_rows(),
    "resize_pos_embed": pos_embed(),
    "resize_rel_pos_bias": rel_pos_bias(),
    "adapt_input_conv": st.tuples(op("adapt_input_conv", channels=st.integers(1, 7), mode=INPUT_MODES), specs(KERNEL)),
    "resize_patch_embed": st.tuples(
        op("resize_patch_embed", size=PAIR, mode=st.sampled_from(["timm", "flexivit"])), specs(KERNEL)
    ),
    "inflate": st.tuples(
        op("inflate", depth=st.integers(1, 4), mode=st.sampled_from(["average", "center"])), specs(KERNEL)
    ),
    "fp8_dequant": quantised(),
    **QUANTISED,
    "block_diagonal": diagonal_blocks(),
    "matmul": product(),
    "low_rank": matrix_of_rank(),
    "lora_merge": low_rank(),
    "lora_add": low_rank_pairs(),
    "fold_batchnorm": batch_norm(),
    "scale_by": scaled(),
    "dora_merge": magnitudes(),
    "lora_merge_experts": low_rank_experts(),
    "fold_weight_norm": weight_norm(),
    "unfold_weight_norm": weight_norm().map(lambda case: (make_op("unfold_weight_norm", (case[0].dim,)), case[1][1:])),
}

EXACT = ["cast", "add", "mul", "slice_rows", "pad_to_multiple", "resize_rows", "resize_pos_embed"]
EXACT += ["take", "insert_rows", "resize_rel_pos_bias", "adapt_input_conv", "resize_patch_embed"]


def torch_type(spec):
    return getattr(torch, DTYPES[spec.dtype].torch)


def small(spec, seed):
    """Values that every dtype holds and no op pushes past a range."""
    values = torch.randint(0, 2, spec.shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch_type(spec))


def random_bits(spec, seed):
    if spec.dtype == "BOOL":
        return small(spec, seed)
    count = spec.numel * torch_type(spec).itemsize
    raw = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return raw.view(torch_type(spec)).reshape(spec.shape)


def specs_of(tensors):
    return tuple(TensorSpec(t.shape, dtype_name(t.dtype)) for t in tensors)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def announced(made: Op, given_specs):
    try:
        return made.infer(given_specs)
    except OpError:
        assume(False)


def test_every_built_in_op_is_tried_here_and_says_what_it_does():
    program = (
        "import sys, ckptsurgery.ops as ops; print(*[n for n in ops.op_names()]);"
        "print(*[m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    names, heavy = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split("\n")[:2]
    assert set(names.split()) == set(CASES)
    assert heavy == ""
    assert all(op_summary(name).endswith(".") for name in CASES)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=120)
@given(data=st.data(), seed=st.integers(0, 9))
def test_run_gives_exactly_what_infer_announces_and_leaves_its_inputs_alone(name, data, seed):
    made, given_specs = data.draw(CASES[name])
    expected = announced(made, given_specs)
    tensors = tuple(small(s, seed) for s in given_specs)
    before = [raw(t) for t in tensors]
    try:
        results = made.run(tensors)
    except OpError as error:
        # The values alone can forbid it: unequal ones, a norm of 0, channels that are not zero, a result below 0.
        assert any(
            w in str(error) for w in ("differs", "norm 0", "not zero", "range", "quant_state", "stored shape")
        ), error
    else:
        assert specs_of(results) == expected
    assert [raw(t) for t in tensors] == before


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40)
@given(data=st.data())
def test_on_the_meta_device_an_op_gives_meta_tensors_of_the_announced_specs(name, data):
    made, given_specs = data.draw(CASES[name])
    expected = announced(made, given_specs)
    results = made.run(tuple(torch.empty(s.shape, dtype=torch_type(s), device="meta") for s in given_specs))
    assert specs_of(results) == expected
    assert all(t.is_meta for t in results)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40)
@given(data=st.data())
def test_an_op_written_as_text_reads_back_as_itself(name, data):
    made, _ = data.draw(CASES[name])
    call = parse_call(str(made))
    assert make_op(call.name, call.args, dict(call.keywords)) == made


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=200)
@given(data=st.data(), seed=st.integers(0, 9), bits=st.booleans())
def test_an_inverse_for_known_inputs_brings_back_every_bit(name, data, seed, bits):
    made, given_specs = data.draw(CASES[name])
    announced(made, given_specs)
    inverse = made.inverse(given_specs)
    if inverse is None:
        return
    tensors = tuple((random_bits if bits else small)(s, seed) for s in given_specs)
    try:
        results = made.run(tensors)
    except OpError:
        return
    assert inverse.infer(specs_of(results)) == given_specs
    assert [raw(t) for t in inverse.run(results)] == [raw(t) for t in tensors]


@pytest.mark.parametrize("name", sorted(set(CASES) - {*EXACT, "same", "repeat_over"}))
@given(data=st.data())
def test_an_op_that_rounds_claims_no_exact_inverse(name, data):
    made, given_specs = data.draw(CASES[name])
    assert made.inverse(given_specs) is None


@given(old=st.sampled_from(ALL), new=st.sampled_from(ALL), seed=st.integers(0, 99))
@example("BF16", "F32", 0)
@example("F8_E4M3", "F16", 3)
def test_a_lossless_cast_there_and_back_keeps_every_bit_pattern(old, new, seed):
    spec = TensorSpec([256], old)
    cast = make_op("cast", (new,))
    try:
        back = cast.inverse((spec,))
    except OpError:
        return
    if back is None:
        return
    tensor = random_bits(spec, seed)
    assert raw(back.run(cast.run((tensor,)))[0]) == raw(tensor)


@pytest.mark.parametrize("name", ["F16", "BF16"])
@pytest.mark.parametrize("wide", ["F32", "F64"])
def test_all_65536_patterns_of_a_half_survive_a_wider_float(name, wide):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch_type(TensorSpec([], name)))
    there = make_op("cast", (wide,)).run((patterns,))
    back = make_op("cast", (name,)).run(there)[0]
    assert torch.equal(back.view(torch.int16), patterns.view(torch.int16))
