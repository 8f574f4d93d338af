"""Quantised weights as the libraries make and read them; see scripts/formats/quantised_references.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.ops import OpError, make_op
from ckptsurgery.specs import TensorSpec

FILES = sorted(path.name[: -len(".xz")] for path in (Path(__file__).parents[1] / "data" / "quantised").glob("*.xz"))


def spec(dtype, *shape):
    return TensorSpec(shape, dtype)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).reshape(-1)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("file", FILES)
def test_every_bit_is_the_librarys(file, quantised):
    with cs.open(quantised / file) as checkpoint:
        rule, expected = checkpoint.metadata["rule"], checkpoint["expected"].load()
        made = cs.plan(checkpoint, cs.Recipe([rule], drop=["expected"])).state_dict()
    assert torch.equal(torch.cat([raw(tensor) for tensor in made.values()]), raw(expected))
    if len(made) == 1 and made["y"].dtype != torch.uint8:
        assert (made["y"].dtype, made["y"].shape) == (expected.dtype, expected.shape)


@pytest.mark.parametrize("block", [128, (1, 32), (64, 100), (1000, 1000)])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_each_block_is_multiplied_by_its_scale_in_float32(block, leading):
    rows, columns = (block, block) if isinstance(block, int) else block
    weight = random(*leading, 200, 130).to(torch.float8_e4m3fn)
    scale = random(*leading, -(-200 // rows), -(-130 // columns)).abs() + 0.1
    (result,) = make_op("fp8_dequant", (block,)).run((weight, scale))
    r, c = torch.arange(200) // rows, torch.arange(130) // columns
    assert torch.equal(result, (weight.float() * scale[..., r, :][..., c]).bfloat16())


def test_powers_of_two_serve_as_scales():
    scale = torch.tensor([[0.25, 4.0]]).to(torch.float8_e8m0fnu)
    (result,) = make_op("fp8_dequant", (2, "f32")).run((torch.ones(2, 4).to(torch.float8_e5m2), scale))
    assert result.tolist() == [[0.25, 0.25, 4.0, 4.0]] * 2


def test_scales_that_do_not_belong_to_the_weight_are_refused_with_the_shape_they_should_have():
    with pytest.raises(OpError, match=r"have scales \[3, 2\], and scale_inv is F32 \[2, 2\]"):
        make_op("fp8_dequant", (128,)).infer((TensorSpec([300, 256], "F8_E4M3"), TensorSpec([2, 2], "F32")))
    with pytest.raises(OpError, match="2 sources in this order: weight, scale_inv; it was given 1"):
        make_op("fp8_dequant").infer((TensorSpec([300, 256], "F8_E4M3"),))
    with pytest.raises(OpError, match="the result is I8"):
        make_op("fp8_dequant", (), {"dtype": "i8"})


@pytest.mark.parametrize(
    ("shape", "scale", "each"),
    [
        ((6, 8), (), (6, 8)),
        ((6, 8), (1,), (6, 8)),
        ((6, 8), (6,), (1, 8)),
        ((6, 8), (6, 1), (1, 8)),
        ((6, 8), (6, 2), (1, 4)),
        ((6, 8), (3, 2), (2, 4)),
        ((300, 200), (3, 2), (128, 128)),
        ((576, 256), (5, 2), (128, 128)),
        ((2, 6, 8), (2,), (6, 8)),
        ((2, 6, 8), (2, 1, 1), (6, 8)),
        ((2, 6, 8), (2, 6, 1), (1, 8)),
        ((2, 6, 8), (2, 3, 2), (2, 4)),
    ],
)
def test_which_elements_share_a_scale_is_read_off_its_shape(shape, scale, each):
    weight = torch.ones(shape).to(torch.float8_e4m3fn)
    count = torch.Size(scale).numel()
    scales = torch.arange(1.0, count + 1).reshape(scale)
    (made,) = make_op("fp8_dequant", (), {"dtype": "f32"}).run((weight, scales))
    *leading, rows, columns = shape
    down, across = -(-rows // each[0]), -(-columns // each[1])
    wide = scales.reshape(*leading, down, across).repeat_interleave(each[0], -2).repeat_interleave(each[1], -1)
    assert torch.equal(made, wide[..., :rows, :columns])


def test_scales_of_bytes_are_exponents():
    weight, exponents = torch.ones(2, 4).to(torch.float8_e4m3fn), torch.tensor([[126], [130]], dtype=torch.uint8)
    assert make_op("fp8_dequant").run((weight, exponents))[0].tolist() == [[0.5] * 4, [8.0] * 4]


@pytest.mark.parametrize(
    ("name", "arguments", "given", "text"),
    [
        ("fp8_dequant", {}, (spec("F8_E4M3", 5, 4), spec("F32", 7, 3)), r"say block=\[rows, columns\]"),
        ("fp8_dequant", {}, (spec("F8_E4M3", 4), spec("F32")), "2 dims or more"),
        ("int8_dequant", {}, (spec("F16", 4, 4), spec("F32")), "wants a weight of 8-bit integers"),
        ("int8_dequant", {}, (spec("I8", 4, 4), spec("F32", 4, 1), spec("I8", 4)), r"zero_point is I8 \[4, 1\]"),
        ("mxfp4_dequant", {}, (spec("U8", 4, 16), spec("U8", 5, 1)), "do not belong to blocks"),
        ("mxfp4_dequant", {}, (spec("U8", 4, 16), spec("F32", 4, 1)), "wants scales of U8"),
        ("nvfp4_dequant", {}, (spec("U8", 4, 16), spec("F8_E4M3", 4, 3), spec("F32")), "does not belong to packed"),
        ("nvfp4_dequant", {}, (spec("U8", 4, 16), spec("F8_E4M3", 4, 2), spec("F32", 3)), "one number for each matrix"),
        ("nf4_dequant", {}, (spec("U8", 8, 1), spec("F32", 1), spec("F32", 16), spec("U8", 90)), "say shape="),
        ("gptq_dequant", {}, (spec("I32", 2, 8), spec("I32", 1, 3), spec("F16", 1, 8)), "do not belong to scales"),
        ("gptq_dequant", {}, (spec("I32", 2, 9), spec("I32", 1, 1), spec("F16", 1, 8)), "qweight"),
        ("awq_dequant", {}, (spec("I32", 2, 2), spec("I32", 1, 1), spec("F16", 1, 8)), "qweight"),
        ("packed_dequant", {}, (spec("I32", 4, 2), spec("BF16", 4, 1), spec("I64", 2)), "say columns"),
        (
            "packed_dequant",
            {"columns": 8},
            (spec("I32", 4, 1), spec("BF16", 4, 1), spec("I64", 2)),
            "codes of 1 to 4 bits; say bits",
        ),
        ("gguf_dequant", {}, (spec("U8", 4, 36),), "say type=Q4_K"),
        ("gguf_dequant", {"type": "Q4_0"}, (spec("U8", 4, 35),), "not made of blocks of 18 bytes"),
        ("gguf_quant", {}, (spec("F32", 4, 33),), "whole blocks of 32"),
        ("fp8_quant", {"per": "channel"}, (spec("F32", 4),), "2 dims or more"),
    ],
)
def test_what_does_not_belong_together_is_refused(name, arguments, given, text):
    with pytest.raises(OpError, match=text):
        make_op(name, (), arguments).infer(given)


@pytest.mark.parametrize("arguments", [{}, {"block": 4, "per": "channel"}])
def test_fp8_quant_takes_blocks_or_a_granularity(arguments):
    with pytest.raises(OpError, match="block=128, per=channel or per=tensor"):
        make_op("fp8_quant", (), arguments)
    with pytest.raises(OpError, match="reads blocks of Q4_0"):
        make_op("gguf_dequant", ("Q9",))


def test_a_state_that_lies_is_found_out(quantised):
    with cs.open(quantised / "nf4.safetensors") as checkpoint:
        tensors = [checkpoint[k].load() for k in ("w", "absmax", "quant_map", "quant_state.bitsandbytes__nf4")]
    with pytest.raises(OpError, match=r"has the shape \[32, 256\], not \[64, 128\]"):
        make_op("nf4_dequant", ((64, 128), "bf16")).run(tuple(tensors))
    with pytest.raises(OpError, match="not a quant_state of bitsandbytes"):
        make_op("nf4_dequant", ((32, 256), "bf16")).run((*tensors[:3], torch.zeros(9, dtype=torch.uint8)))


@pytest.mark.parametrize(("quant", "dequant"), [("fp8_quant(block=128)", "fp8_dequant(block=128)")])
def test_a_recipe_that_quantises_inverts(quant, dequant):
    inverse = cs.Recipe([f"{{k...}}.weight -> {{k...}}.weight, {{k...}}.scale | {quant}"]).inverse()
    assert [str(rule) for rule in inverse.rules] == [f"{{k...}}.weight, {{k...}}.scale | {dequant} -> {{k...}}.weight"]


@pytest.mark.parametrize(
    "op", ["fp8_quant(block=[2, 3])", "fp8_quant(per=channel)", "fp8_quant(per=tensor)", "int8_quant"]
)
def test_what_is_quantised_comes_back_nearly(op):
    weight = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    made = cs.plan({"m.weight": weight}, f"m.weight -> m.weight, m.scale | {op}").state_dict()
    assert torch.equal(weight, before)
    back = "int8_dequant" if op.startswith("int8") else "fp8_dequant(dtype=f32)"
    block = ", block=[2, 3]" if "block" in op else ""
    rule = f"m.weight, m.scale -> m.weight | {back[:-1] + block + ')' if block else back}"
    found = cs.plan(made, rule).state_dict()["m.weight"]
    assert (found - weight).abs().max() < weight.abs().max() / 14


def test_three_bits_lie_in_words_without_gaps():
    from ckptsurgery.ops.quantised.code_books import unpacked

    codes = torch.randint(0, 8, (3, 64), generator=torch.Generator().manual_seed(0))
    bits = "".join(format(int(code), "03b")[::-1] for code in codes[0])
    words = [int(bits[at : at + 32][::-1], 2) for at in range(0, len(bits), 32)]
    packed = torch.tensor([words], dtype=torch.int64).to(torch.uint32)
    assert unpacked(packed.view(torch.int32), 3, 64).tolist() == [codes[0].tolist()]


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K_M", "IQ2_XS"])
def test_blocks_that_only_llama_cpp_makes_lead_to_its_program(kind):
    with pytest.raises(cs.PlanError, match=rf"(?s)not of {kind}, which only.*llama-quantize new.gguf \S+ {kind}\n?$"):
        cs.plan({"w": torch.zeros(2, 256)}, f"w -> w | gguf_quant({kind})")
    with pytest.raises(cs.PlanError, match=r"makes blocks of Q8_0, .*not of q8_0\n") as caught:
        cs.plan({"w": torch.zeros(2, 256)}, "w -> w | gguf_quant(q8_0)")
    assert "llama" not in str(caught.value)
