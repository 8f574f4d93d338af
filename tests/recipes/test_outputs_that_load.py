"""What is converted there and back, or dequantised, opens in transformers: no warning, the same logits."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import ckptsurgery as cs

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"vocab_size": 48, "max_position_embeddings": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=48, n_positions=32)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4)),
    "bert": lambda: BertForMaskedLM(BertConfig(**TEXT)),
}


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, ViTForImageClassification):
            return model(pixel_values=torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)).logits
        return model(input_ids=torch.arange(8)[None]).logits


def opened(cls: type, folder: Path) -> Any:
    """The model of a folder, of which transformers says nothing that a person should hear."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, about = cls.from_pretrained(folder, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not heard
    assert not any(about.values())
    return model.eval()


def old_names() -> tuple[cs.Recipe, cs.Recipe]:
    rule = "{m...}.LayerNorm.{l:weight,bias} -> {m...}.LayerNorm.{l:gamma,beta}"
    return cs.Recipe([rule], rest="keep"), cs.load_recipe("bert/google_to_hf5")


def there_and_back(name: str, inverse: bool = False) -> tuple[cs.Recipe, cs.Recipe]:
    recipe = cs.load_recipe(name)
    return (recipe.inverse(), recipe) if inverse else (recipe, recipe.inverse())


WAYS = {
    "llama, litgpt": ("llama", there_and_back("llama/hf_to_litgpt")),
    "llama, torchtune": ("llama", there_and_back("llama/hf_to_torchtune")),
    "llama, meta": ("llama", there_and_back("llama/meta_to_hf", inverse=True)),
    "gpt2, nanogpt": ("gpt2", there_and_back("gpt2/hf_to_nanogpt")),
    "mixtral, litgpt": ("mixtral", there_and_back("mixtral/hf_to_litgpt")),
    "vit, timm": ("vit", there_and_back("vit/timm_to_hf", inverse=True)),
    "bert, 2018": ("bert", old_names()),
}


@pytest.mark.parametrize(("name", "ways"), WAYS.values(), ids=WAYS)
def test_there_and_back_the_folder_loads_as_before(
    name: str, ways: tuple[cs.Recipe, cs.Recipe], tmp_path: Path
) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "0")
    for number, recipe in enumerate(ways):
        cs.plan(tmp_path / str(number), recipe).save(tmp_path / str(number + 1), companions=True)
    assert torch.equal(logits(opened(type(model), tmp_path / "2")), logits(model))


GROWN = {
    "double_depth": {},
    "interleave_depth": {"t": 3},
    "identity_blocks": {"layers": 2, "last": 1},
    "gqa_to_mha": {},
    "mha_to_gqa": {"g": 1},
    "clone_width": {},
}


@pytest.mark.parametrize(("name", "dims"), GROWN.items(), ids=GROWN)
def test_a_model_of_another_size_has_a_config_that_loads(name: str, dims: dict[str, int], tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "old")
    plan = cs.plan(tmp_path / "old", cs.load_recipe(f"surgery/{name}"), dims=dims)
    plan.save(tmp_path / "new", companions=True)
    grown = opened(LlamaForCausalLM, tmp_path / "new")
    if name in ("identity_blocks", "gqa_to_mha"):
        torch.testing.assert_close(logits(grown), logits(model))


HEADS = {"0": [0, 2], "1": [3, 1]}
NEURONS = {str(i): [*range(64), 3, 5] for i in range(2)}
RESIZED = {
    "pad_vocabulary": {"n": 64},
    "trim_vocabulary": {"n": 40},
    "transplant_vocabulary": {"n": 50, "tokens": {"0": 7, "3": 2}},
    "combine_vocabulary": {"n": 3, "new": [0, 1, 1, 2], "old": [4, 5, 6, 7], "weights": [1, 0.5, 0.5, 1]},
    "prune_ffn": {"neurons": {str(i): [*range(i, 40 + i)] for i in range(2)}},
    "widen_ffn": {"neurons": NEURONS},
    "prune_heads": {"heads": HEADS},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("name", "dims"), RESIZED.items(), ids=RESIZED)
def test_resized_tensors_have_a_config_that_loads(name: str, dims: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=tied)).eval()
    model.save_pretrained(tmp_path / "old")
    plan = cs.plan(tmp_path / "old", cs.load_recipe(f"surgery/{name}"), dims=dims)
    report = plan.save(tmp_path / "new", companions=True)
    assert not report.warnings
    made = opened(LlamaForCausalLM, tmp_path / "new")
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    if name == "widen_ffn":
        torch.testing.assert_close(logits(made), logits(model))


@pytest.mark.parametrize("name", ["pad_vocabulary", "transplant_vocabulary", "trim_vocabulary", "combine_vocabulary"])
def test_tied_names_of_a_file_stay_tied(name: str, tmp_path: Path) -> None:
    weight = torch.randn(48, 4)
    state = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    report = cs.plan(state, f"surgery/{name}", dims=RESIZED[name]).save(tmp_path / "x.safetensors")
    assert list(report.tied) == ["lm_head.weight"]
    assert [tie.names for tie in cs.open(tmp_path / "x.safetensors").ties] == [tuple(state)]
    made = cs.plan(state, f"surgery/{name}", dims=RESIZED[name]).state_dict()
    assert made["lm_head.weight"] is made["model.embed_tokens.weight"]


def test_experts_of_a_dense_model_load_as_a_mixture(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "old")
    recipe = cs.load_recipe("surgery/dense_to_moe")
    kind = {"set": {"model_type": "'mixtral'", "architectures": ["'MixtralForCausalLM'"]}}
    recipe = recipe.replace(config=recipe.config + cs.Recipe(config=kind).config)
    whole = recipe.then(cs.load_recipe("moe/hf_to_hf5"))
    cs.plan(tmp_path / "old", whole, dims={"e": 4, "k": 2}).save(tmp_path / "new", companions=True)
    made = opened(MixtralForCausalLM, tmp_path / "new")
    assert (made.config.num_local_experts, made.config.num_experts_per_tok) == (4, 2)
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-4)


def test_a_folder_with_another_config_gets_one_that_loads(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "hf")
    recipe = cs.load_recipe("llama/meta_to_hf")
    cs.plan(tmp_path / "hf", recipe.inverse()).save(tmp_path / "meta")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "vocab_size": -1}
    params |= {"multiple_of": 32, "max_position_embeddings": 32}
    cs.plan(tmp_path / "meta", recipe, config=params).save(tmp_path / "back", companions=True)
    assert torch.equal(logits(opened(LlamaForCausalLM, tmp_path / "back")), logits(model))


LAYERS = {
    "llama": "{m:q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj}",
    "gpt2": "{m:c_attn,c_proj,c_fc}",
    "mixtral": "{m:q_proj,k_proj,v_proj,o_proj,w1,w2,w3}",
    "vit": "{m:query,key,value,dense}",
    "bert": "{m:query,key,value,dense}",
}
KINDS = {
    "fp8": ("fp8_quant(block=[8, 16])", "weight_scale_inv", "quantised/fp8_to_float"),
    "fp8 by channel": ("fp8_quant(per=channel)", "weight_scale", "quantised/fp8_to_float"),
    "int8": ("int8_quant", "weight_scale", "quantised/int8_to_float"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_dequantised_folder_loads_with_the_logits_of_its_weights(name: str, kind: str, tmp_path: Path) -> None:
    op, scale, recipe = KINDS[kind]
    model = tiny(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    inside = f"{{k...}}.{LAYERS[name]}"
    bare = inside.split(":")[0] + "}"
    rule = f"{inside}.weight -> {bare}.weight, {bare}.{scale} | {op}"
    edits = {"set": {"quantization_config": {"quant_method": "'fp8'"}}}
    cs.plan(tmp_path / "whole", cs.Recipe([rule], rest="keep", config=edits)).save(tmp_path / "q", companions=True)
    assert "quantization_config" in json.loads((tmp_path / "q" / "config.json").read_text())
    report = cs.plan(tmp_path / "q", recipe).save(tmp_path / "back", companions=True)
    assert "config.json: quantization_config dropped" in report.notes
    assert not report.warnings
    found = opened(type(model), tmp_path / "back")
    assert found.dtype == torch.bfloat16
    plainly_dequantised(tmp_path / "whole", tmp_path / "q", scale)
    assert torch.equal(logits(found), logits(opened(type(model), tmp_path / "whole")))


def plainly_dequantised(whole: Path, quantised: Path, scale: str) -> None:
    """Put the dequantised weights into a folder, as torch makes them."""
    state, packed = load_file(whole / "model.safetensors"), load_file(quantised / "model.safetensors")
    for key, scales in packed.items():
        if key.endswith(scale):
            weight = packed[key.removesuffix(scale) + "weight"].float()
            blocks = [weight.shape[dim] // scales.shape[dim] for dim in (0, 1)]
            wide = scales.float().repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1)
            state[key.removesuffix(scale) + "weight"] = (weight * wide).bfloat16()
    save_file(state, whole / "model.safetensors", {"format": "pt"})
