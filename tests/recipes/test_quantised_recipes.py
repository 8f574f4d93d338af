"""Each recipe for a quantised format, on the tensors of the library that made it, under the names of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ckptsurgery as cs

STATE = {"w": "weight", "absmax": "weight.absmax", "quant_map": "weight.quant_map"}
NESTED = STATE | {"nested_absmax": "weight.nested_absmax", "nested_quant_map": "weight.nested_quant_map"}
KIND = "quant_state.bitsandbytes__"
CASES = [
    ("fp8", "fp8_block", {"w": "weight", "s": "weight_scale_inv"}),
    ("fp8", "fp8_block", {"w": "experts", "s": "experts_scale_inv"}),
    ("fp8", "fp8_channel", {"w": "weight", "s": "weight_scale"}),
    ("fp8", "fp8_tensor", {"w": "weight", "s": "weight_scale"}),
    ("fp8", "fp8_compressed", {}),
    ("int8", "int8_compressed", {}),
    ("packed", "packed_4", {}),
    ("packed", "packed_4_asymmetric", {}),
    ("packed", "packed_3_channel", {}),
    ("packed", "int8_group_asymmetric", {}),
    ("nvfp4", "nvfp4", {}),
    ("mxfp4", "mxfp4_compressed", {}),
    ("mxfp4", "mxfp4_experts", {"b": "experts_blocks", "s": "experts_scales"}),
    ("bnb4", "nf4", STATE | {f"{KIND}nf4": f"weight.{KIND}nf4"}),
    ("bnb4", "nf4_nested", NESTED | {f"{KIND}nf4": f"weight.{KIND}nf4"}),
    ("bnb4", "fp4_nested", NESTED | {f"{KIND}fp4": f"weight.{KIND}fp4"}),
    ("bnb8", "bnb_int8", {"w": "weight"}),
    ("gptq", "gptq_4", {}),
    ("gptq", "gptq_4_by_activation", {}),
    ("gptq", "gptq_3", {}),
    ("awq", "awq", {}),
]
CONFIG = '{"dtype": "bfloat16", "quantization_config": {"quant_method": "some"}}'


@pytest.mark.parametrize(("recipe", "file", "names"), CASES, ids=[f"{r}, {f}" for r, f, _ in CASES])
def test_a_recipe_ends_in_what_the_library_makes(
    recipe: str, file: str, names: dict[str, str], tmp_path: Path, quantised: Path
) -> None:
    tensors = load_file(quantised / f"{file}.safetensors")
    expected = tensors.pop("expected")
    state = {"model.norm.weight": torch.ones(3, dtype=torch.bfloat16)}
    for at in ("model.layers.0.fc", "model.layers.1.fc"):
        state |= {f"{at}.{names.get(key, key)}": tensor.clone() for key, tensor in tensors.items()}
    cs.save(state, tmp_path / "q", max_shard_size=70_000)
    (tmp_path / "q" / "config.json").write_text(CONFIG)
    plan = cs.plan(tmp_path / "q", f"quantised/{recipe}_to_float")
    plan.save(tmp_path / "float", companions=True)
    assert '"quantization_config"' not in (tmp_path / "float" / "config.json").read_text()
    made = cs.open(tmp_path / "float").state_dict()
    (name,) = {key.removeprefix("model.layers.0.fc.") for key in made if key.startswith("model.layers.0.")}
    assert name == ("experts" if "experts" in str(names) else "weight")
    assert made.keys() == {"model.norm.weight", f"model.layers.0.fc.{name}", f"model.layers.1.fc.{name}"}
    for number in (0, 1):
        found = made[f"model.layers.{number}.fc.{name}"]
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_zero_points_are_stored_as_they_are_or_less_1(quantised: Path) -> None:
    tensors = load_file(quantised / "gptq_4.safetensors")
    expected = tensors.pop("expected")
    # one more in each of the eight codes of a word, as none of them is 15
    tensors["qzeros"] = tensors["qzeros"] + 0x11111111
    made = cs.plan({f"m.{key}": t for key, t in tensors.items()}, "quantised/gptqv2_to_float").state_dict()
    assert torch.equal(made["m.weight"], expected)


def test_groups_run_in_order_where_nothing_names_them(quantised: Path) -> None:
    tensors = load_file(quantised / "gptq_4.safetensors")
    expected = tensors.pop("expected")
    del tensors["g_idx"]
    made = cs.plan({f"m.{key}": t for key, t in tensors.items()}, "quantised/gptq_to_float").state_dict()
    assert torch.equal(made["m.weight"], expected)


def test_weights_with_and_without_zero_points_go_by_rules_of_their_own(quantised: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    for name, file in (("a.fc", "packed_4"), ("b.fc", "packed_4_asymmetric")):
        tensors = load_file(quantised / f"{file}.safetensors")
        wanted[f"{name}.weight"] = tensors.pop("expected")
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    made = cs.plan(state, "quantised/packed_to_float").state_dict()
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)


def test_a_gguf_file_becomes_floats_under_other_names(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "data" / "formats" / "all.gguf"
    kinds = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
    rename = cs.Recipe(["packed.{k} -> blocks.{k}.weight"], rest="keep")
    to_bf16 = cs.Recipe(["blocks.{k}.weight -> {k} | gguf_dequant(dtype=bf16)"], rest="keep")
    made = cs.plan(source, "quantised/gguf_to_float").state_dict()
    again = cs.plan(source, rename.then(to_bf16)).state_dict()
    for kind in kinds:
        assert made[f"packed.{kind}"].shape == (2, 512)
        assert torch.equal(made[f"packed.{kind}"].bfloat16(), again[kind])
    assert made["vector"].dtype == torch.float32


@pytest.mark.parametrize(("name", "op"), [("float_to_fp8", "fp8_quant(block=128)"), ("float_to_int8", "int8_quant")])
def test_weights_of_layers_are_quantised_and_the_config_says_so(name: str, op: str, tmp_path: Path) -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    state = {"model.embed_tokens.weight": weight, "model.layers.0.mlp.up_proj.weight": weight.clone()}
    cs.save(state, tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text('{"dtype": "bfloat16"}')
    cs.plan(tmp_path / "x", f"quantised/{name}").save(tmp_path / "y", companions=True)
    with cs.open(tmp_path / "y") as made:
        expected = cs.plan({"w": weight}, f"w -> q, s | {op}").state_dict()
        scale = next(key for key in made if "scale" in key)
        assert torch.equal(made[scale].load(), expected["s"])
        found = made["model.layers.0.mlp.up_proj.weight"].load()
        assert torch.equal(found.view(torch.uint8), expected["q"].view(torch.uint8))
        assert torch.equal(made["model.embed_tokens.weight"].load(), weight)
        assert made.config is not None
        assert made.config["quantization_config"]["quant_method"] in ("fp8", "compressed-tensors")
        assert made.config["dtype"] == "bfloat16"
