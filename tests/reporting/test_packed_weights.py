"""Quantised weights are named as what they are, matched with a recipe that makes floats of them, and never cast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import ckptsurgery as cs
from ckptsurgery.cli.program import app
from ckptsurgery.reporting.inspecting import inspection

DATA = Path(__file__).parents[1] / "data"
PLAIN = {"w": "weight", "s": "weight_scale_inv", "b": "e_blocks", "absmax": "weight.absmax"}
PLAIN |= {name: f"weight.{name}" for name in ("quant_map", "nested_absmax", "nested_quant_map")}
TEXTS = {
    "fp8_block": "FP8, block 128 x 128, of [256, 256]",
    "fp8_channel": "FP8, channel, of [32, 256]",
    "fp8_tensor": "FP8, tensor, of [32, 256]",
    "int8_compressed": "8-bit integers, channel, of [32, 256]",
    "packed_4": "4-bit packed integers, group 128, of [32, 256]",
    "packed_3_channel": "3-bit packed integers, channel, of [32, 256]",
    "nvfp4": "4-bit NVFP4, group 16, of [32, 256]",
    "mxfp4_compressed": "4-bit MXFP4, group 32, of [32, 256]",
    "nf4": "4-bit bitsandbytes nf4, blocks of 64, of [32, 256]",
    "fp4_nested": "4-bit bitsandbytes fp4, blocks of 64, of [32, 256]",
    "bnb_int8": "8-bit bitsandbytes, channel, of [32, 256]",
    "gptq_3": "3-bit GPTQ, group 128, of [32, 256]",
    "gptq_8": "8-bit GPTQ, group 128, of [32, 256]",
    "awq": "4-bit AWQ, group 128, of [32, 256]",
}
RECIPES = {"fp8": "fp8", "int8": "int8", "packed": "packed", "nvfp4": "nvfp4", "mxfp4": "mxfp4", "nf4": "bnb4",
           "fp4": "bnb4", "bnb": "bnb8", "gptq": "gptq", "awq": "awq"}  # fmt: skip


def three_layers(path: Path) -> dict[str, torch.Tensor]:
    """A norm, and a quantised weight of the file in each of three layers."""
    tensors = load_file(path)
    del tensors["expected"]
    state = {"norm.weight": torch.ones(3)}
    for key, tensor in tensors.items():
        name = f"weight.{key}" if key.startswith("quant_state") else PLAIN.get(key, key)
        state |= {f"h.{number}.fc.{name}": tensor.clone() for number in range(3)}
    return state


@pytest.mark.parametrize(("file", "text"), TEXTS.items(), ids=TEXTS)
def test_a_packed_weight_is_named_with_its_shape(file: str, text: str, quantised: Path) -> None:
    state = three_layers(quantised / f"{file}.safetensors")
    with cs.open(state) as checkpoint:
        found = inspection(checkpoint)
    assert list(found.packed.values()) == [text] * 3
    (line,) = [line for line in str(found).splitlines() if line.startswith("packed")]
    assert line.removeprefix("packed").strip().startswith(f"{text}: 3 weights, h.{{0..2}}.fc.")
    assert found.to_json()["packed"] == dict(found.packed)


@pytest.mark.parametrize("file", TEXTS)
def test_the_recipe_that_dequantises_is_matched_and_a_dtype_leaves_packed_weights(file: str, quantised: Path) -> None:
    state = three_layers(quantised / f"{file}.safetensors")
    name = f"quantised/{RECIPES[file.partition('_')[0]]}_to_float"
    assert cs.match_recipes(state) == (name,)
    plan = cs.plan(state, cs.Recipe(rest="keep"), dtype="f64")
    made = plan.state_dict()
    assert made.pop("norm.weight").dtype == torch.float64
    assert all(torch.equal(tensor.view(torch.uint8), state[key].view(torch.uint8)) for key, tensor in made.items())
    (warning,) = plan.warnings
    assert warning.code == "still-packed" and "3 quantised weights stay packed" in str(plan) and name in str(plan)
    (remedy,) = warning.remedies
    floats = cs.plan(state, remedy.value, dtype="f64")
    assert not floats.warnings and {tensor.dtype for tensor in floats.state_dict().values()} == {torch.float64}


def test_a_config_tells_the_zero_points_of_gptq(quantised: Path) -> None:
    state = three_layers(quantised / "gptq_8.safetensors")
    for form, name in (("gptq", "gptq"), ("gptq_v2", "gptqv2")):
        config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "checkpoint_format": form}}
        assert cs.match_recipes(state, config=config) == (f"quantised/{name}_to_float",)


def test_blocks_of_gguf_are_named_where_a_dtype_is_asked_for() -> None:
    with cs.open(DATA / "formats" / "all.gguf") as checkpoint:
        assert "quantised/gguf_to_float" in cs.match_recipes(checkpoint)
        (warning,) = cs.plan(checkpoint, cs.Recipe(rest="keep"), dtype="f64").warnings
        assert "quantised/gguf_to_float" in str(warning)


def test_blocks_of_a_gguf_file_are_named_by_their_type() -> None:
    text = CliRunner().invoke(app, ["inspect", str(DATA / "formats" / "all.gguf")]).stdout
    assert "Q4_0 blocks, of [2, 512]: 1 weight, packed.Q4_0" in text


def test_tensors_that_only_share_the_names_are_listed_as_they_are() -> None:
    state = {
        "a.weight": torch.ones(2, 2),
        "a.weight_scale": torch.ones(2, 1),
        "b.qweight": torch.ones(2, dtype=torch.int32),
    }
    state |= {"c.weight": torch.ones(2, 2, dtype=torch.int8), "c.SCB": torch.ones(7)}
    with cs.open(state) as checkpoint:
        assert inspection(checkpoint).packed == {}
