"""Ops on quantised weights with specs that they take, for the laws that every op keeps."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from ckptsurgery.ops import make_op
from ckptsurgery.ops.quantised.gguf_blocks import BLOCK_SIZES
from ckptsurgery.specs import TensorSpec

LEADING = st.lists(st.integers(0, 2), max_size=1)
COUNT = st.integers(0, 4)
SOME = st.integers(1, 4)
RESULT = st.sampled_from(["F16", "BF16", "F32"])


@st.composite
def grid(draw, name):
    shape = [*draw(LEADING), draw(SOME), draw(SOME) * 2]
    scale = draw(st.sampled_from([(*shape[:-2], 1, 1), (*shape[:-1], 1), (*shape[:-1], 2)]))
    specs = [TensorSpec(shape, "I8"), TensorSpec(scale, draw(RESULT))]
    absmax = draw(st.booleans())
    if not absmax and draw(st.booleans()):
        specs.append(TensorSpec(scale, "I8"))
    return make_op(name, (), {"absmax": absmax, "dtype": draw(st.none() | RESULT)}), tuple(specs)


@st.composite
def mxfp4(draw):
    shape = [*draw(LEADING), draw(COUNT), draw(SOME)]
    blocks = [*shape, 16] if draw(st.booleans()) else [*shape[:-1], shape[-1] * 16]
    return make_op("mxfp4_dequant", (draw(RESULT),)), (TensorSpec(blocks, "U8"), TensorSpec(shape, "U8"))


@st.composite
def nvfp4(draw):
    shape = [*draw(LEADING), draw(COUNT), draw(SOME)]
    whole = draw(st.sampled_from([[], [1]]))
    packed = TensorSpec([*shape[:-1], shape[-1] * 8], "U8")
    op = make_op("nvfp4_dequant", (draw(st.booleans()), draw(RESULT)))
    return op, (packed, TensorSpec(shape, "F8_E4M3"), TensorSpec(whole, "F32"))


@st.composite
def nf4(draw):
    shape, nested = (draw(COUNT), draw(COUNT)), draw(st.booleans())
    count = math.prod(shape)
    blocks = TensorSpec([-(-count // 64)], "U8" if nested else "F32")
    more = (TensorSpec([1], "F32"), TensorSpec([256], "F32")) if nested else ()
    state = TensorSpec([90], "U8")
    sources = TensorSpec([-(-count // 2), 1], "U8"), blocks, TensorSpec([16], "F32"), *more, state
    return make_op("nf4_dequant", (shape, draw(RESULT))), sources


@st.composite
def gptq(draw):
    bits, groups, out = draw(st.sampled_from([2, 3, 4, 8])), draw(SOME), 32 * draw(SOME)
    inner = 32 * groups * draw(SOME)
    specs = [
        TensorSpec([inner * bits // 32, out], "I32"),
        TensorSpec([groups, out * bits // 32], "I32"),
        TensorSpec([groups, out], draw(RESULT)),
        *([TensorSpec([inner], "I32")] if draw(st.booleans()) else []),
    ]
    return make_op("gptq_dequant", (draw(st.booleans()),), {"dtype": draw(st.none() | RESULT)}), tuple(specs)


@st.composite
def awq(draw):
    groups, out, each = draw(SOME), 8 * draw(SOME), draw(SOME)
    qweight, qzeros = TensorSpec([groups * each, out // 8], "I32"), TensorSpec([groups, out // 8], "I32")
    return make_op("awq_dequant", (draw(st.none() | RESULT),)), (qweight, qzeros, TensorSpec([groups, out], "F16"))


@st.composite
def packed(draw):
    bits, rows, groups = draw(st.integers(1, 8)), draw(COUNT), draw(SOME)
    columns = 32 * groups
    zero = [TensorSpec([-(-rows * bits // 32), groups], "I32")] if draw(st.booleans()) else []
    scale = TensorSpec([rows, groups], draw(RESULT))
    specs = TensorSpec([rows, columns * bits // 32], "I32"), scale, *zero, TensorSpec([2], "I64")
    return make_op("packed_dequant", (columns, bits, draw(st.none() | RESULT))), specs


@st.composite
def gguf(draw):
    kind = draw(st.sampled_from(sorted(BLOCK_SIZES)))
    spec = TensorSpec([*draw(LEADING), draw(COUNT), draw(COUNT) * BLOCK_SIZES[kind][1]], "U8")
    return make_op("gguf_dequant", (kind, draw(RESULT))), (spec,)


@st.composite
def floats(draw, name, arguments, columns=1):
    spec = TensorSpec([*draw(LEADING), draw(COUNT), draw(COUNT) * columns], draw(RESULT))
    return make_op(name, (), draw(arguments)), (spec,)


BLOCK = st.tuples(st.integers(1, 4), st.integers(1, 4))
GRANULARITY = st.one_of(
    BLOCK.map(lambda block: {"block": block}), st.sampled_from(["channel", "tensor"]).map(lambda per: {"per": per})
)
QUANTISED = {
    "int8_dequant": grid("int8_dequant"),
    "mxfp4_dequant": mxfp4(),
    "nvfp4_dequant": nvfp4(),
    "nf4_dequant": nf4(),
    "gptq_dequant": gptq(),
    "awq_dequant": awq(),
    "packed_dequant": packed(),
    "gguf_dequant": gguf(),
    "fp8_quant": floats("fp8_quant", GRANULARITY),
    "int8_quant": floats("int8_quant", st.just({})),
    "gguf_quant": floats("gguf_quant", st.just({}), columns=32),
}
