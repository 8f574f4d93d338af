"""Recipes from the conversion table of transformers, against what its own loader and its own saver do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ckptsurgery as cs
from ckptsurgery.exchange.conversion_axes import axes_of
from ckptsurgery.exchange.conversion_groups import ConversionGroup
from ckptsurgery.exchange.key_rules import KeyPair, generalised, spread

transformers.logging.set_verbosity_error()

TYPES = (
    "mixtral",  # experts stacked, two of three joined
    "phimoe",
    "cohere2_moe",
    "lfm3",
    "UnlimitedOcrTextModel",
    "aria_text",  # transposed experts
    "nemotron_h",
    "hrm_text",  # four projections in one
    "ViTMSNForImageClassification",
    "VivitModel",
    "dinov3_vit",
    "Tipsv2VisionModel",
    "nomic_bert",
    "UltrabertForMaskedLM",
    "GPTNeoXForCausalLM",
    "llava",  # prefixes
    "mistral3",
    "paddleocr_vl",
    "fuyu",
    "SiglipTextModel",
    "CLIPTextModel",
    "yolos",
    "pixio",
    "olmo_hybrid",
    "qwen3_5_text",
)


def script(name: str) -> Any:
    """A module of `scripts/exchange`."""
    folder = Path(__file__).parents[2] / "scripts" / "exchange"
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TYPES)
def test_a_type_is_converted_bit_for_bit_in_both_directions(name: str) -> None:
    proof = script("prove_transformers").proof(name)
    assert {k: proof[k] for k in ("recipe", "forth", "back", "check")} == dict.fromkeys(
        ("recipe", "forth", "back", "check"), "ok"
    )


def test_experts_become_three_rules() -> None:
    rules = [str(rule) for rule in cs.recipes.from_transformers("mixtral").rules]
    assert rules == [
        "? {r...}.block_sparse_moe.experts.{e}.{p:w1,w3}.weight [a ...] -> "
        "{r...}.mlp.experts.gate_up_proj [e (p a) ...]",
        "? {r...}.block_sparse_moe.experts.{e}.w2.weight [...] -> {r...}.mlp.experts.down_proj [e ...]",
        "? {r...}.block_sparse_moe.gate.{s...} -> {r...}.mlp.gate.{s...}",
    ]


def test_the_recipe_of_a_type_holds_for_other_sizes_and_for_the_bare_model(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=5, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.MixtralModel(config)
    model.save_pretrained(tmp_path)
    made = cs.plan(tmp_path, cs.recipes.from_transformers("mixtral"), target=model).state_dict()
    assert all(torch.equal(made[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["no_such_type", "xCLIPTextModel"])
def test_a_type_that_the_library_has_not_is_refused_by_name(name: str) -> None:
    with pytest.raises(cs.RecipeError, match=f"unknown-model-type.*{name}"):
        cs.recipes.from_transformers(name)


def test_a_type_that_cannot_be_built_is_refused_with_the_reason() -> None:
    with pytest.raises(cs.RecipeError, match=r"cannot-build(.|\n)*indexer"):
        cs.recipes.from_transformers("qwen4_exp_text")


def test_a_conversion_that_no_rule_can_say_names_its_operation() -> None:
    class Scramble:
        dim = 0

    class Transform:
        operations = (Scramble(),)
        source_patterns = target_patterns = ("w",)

    from ckptsurgery.exchange.conversion_axes import NotSayable

    group = ConversionGroup((("w",),), ("w",), {"w": (2,), "file:w": (2,)}, Transform())
    with pytest.raises(NotSayable, match="Scramble"):
        axes_of(group, None)


def test_rules_are_as_general_as_the_keys_allow() -> None:
    pairs = [KeyPair(f"m.h.{i}.a.{w}", f"m.h.{i}.b.{w}", (f"m.h.{i}.a.{w}",), (f"m.h.{i}.b.{w}",))
             for i in range(3) for w in ("w", "x")]  # fmt: skip
    assert generalised(pairs, ["m.norm"]) == [("{r...}.a.{s...}", "{r...}.b.{s...}", pairs[0].kind)]
    # a key that stays as it is, on either side, makes a rule narrower
    assert generalised(pairs, ["m.t.a.w"])[0][:2] == ("{r...}.h.{i}.a.{s...}", "{r...}.h.{i}.b.{s...}")
    assert generalised(pairs, ["m.t.b.w"])[0][:2] == ("{r...}.h.{i}.a.{s...}", "{r...}.h.{i}.b.{s...}")


def test_what_keys_have_in_common_is_said_once() -> None:
    assert spread(["e.0.gate.w", "e.0.up.w"], "p") == "e.0.{p:gate,up}.w"
    assert spread(["shard_0.w", "shard_1.w"], "e") == "shard_{e}.w"
    assert spread(["only.one"], "e") == "only.one"
