"""Recipes in the terms of other frameworks, run there or as they run."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs


def module(folder: str, name: str) -> Any:
    """A module of another folder of the repository."""
    path = str(Path(__file__).parents[2] / folder)
    sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(path)


corpus = module("tests/recipes", "conversions")
UNSAID = ("the index {", "the optional dimension", "unequal parts", "follow from a target")


def functions(text: str) -> dict[str, Any]:
    """What a module of this text defines, where this library cannot be imported."""
    made: dict[str, Any] = {"__name__": "exported"}
    assert "ckptsurgery" not in text
    exec(compile(text, "exported.py", "exec"), made)
    return made


def exported(name: str) -> str | None:
    """The Python of the recipe that serves a pair of the corpus; None where it says why not."""
    try:
        return cs.recipes.to_python(corpus.recipe_for(name), config=corpus.pair(name).config)
    except cs.RecipeError as error:
        assert all(d.code == "not-exportable" and any(t in d.headline for t in UNSAID) for d in error.diagnostics)
        return None


def test_most_recipes_can_be_said_in_python() -> None:
    said = [name for name in corpus.PAIRS if exported(name) is not None]
    assert len(said) >= 30


@pytest.mark.parametrize("name", corpus.PAIRS)
def test_the_function_makes_what_the_plan_makes(name: str) -> None:
    text = exported(name)
    if text is None:
        return  # refused rule by rule, as `exported` has proved
    case = corpus.pair(name)
    source = case.numbered()
    made = functions(text)["convert"](dict(source))
    assert corpus.hashes({key: made[key] for key in case.expected}) == case.expected


def test_an_adapter_goes_both_ways() -> None:
    recipe = cs.Recipe(
        ["model.layers.{i}.{p:gate,up}.weight [f d] -> layers.{i}.gate_up [(p f) d]", "embed.weight -> tok.weight"]
    )
    adapter = functions(cs.recipes.to_state_dict_adapter(recipe, "Adapter"))["Adapter"](None, None)
    files = {f"model.layers.{i}.{p}.weight": torch.randn(4, 3) for i in range(2) for p in ("gate", "up")}
    files["embed.weight"] = torch.randn(5, 3)
    native = adapter.from_hf(files)
    assert set(native) == {"layers.0.gate_up", "layers.1.gate_up", "tok.weight"}
    back = adapter.to_hf(native)
    assert back.keys() == files.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in files.items())


def test_a_function_asks_for_the_sizes_that_nothing_settles() -> None:
    recipe = cs.Recipe(["w [(h a two) x] -> w [(h two a) x]"], dims={"two": 2, "h": "config.heads"})
    made = functions(cs.recipes.to_python(recipe))["convert"]
    w = torch.randn(16, 3)
    assert torch.equal(made({"w": w}, h=2)["w"], cs.plan({"w": w}, recipe, config={"heads": 2}).state_dict()["w"])
    with pytest.raises(TypeError, match="h"):
        made({"w": w})
    with pytest.raises(cs.RecipeError, match="the size h"):
        cs.recipes.to_state_dict_adapter(recipe)


def test_a_function_refuses_what_nothing_names() -> None:
    made = functions(cs.recipes.to_python(cs.Recipe(["a -> b"])))["convert"]
    with pytest.raises(KeyError, match="no rule names"):
        made({"a": torch.ones(1), "c": torch.ones(1)})


@dataclass
class Mapper:
    """vLLM's mapper, as its class documents it: parts first, then beginnings, then ends; None leaves a name out."""

    orig_to_new_substr: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_prefix: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_suffix: dict[str, str | None] = field(default_factory=dict)

    def name(self, key: str) -> str | None:
        for old, new in self.orig_to_new_substr.items():
            if old in key:
                if new is None:
                    return None
                key = key.replace(old, new, 1)
        for old, new in self.orig_to_new_prefix.items():
            if key.startswith(old):
                if new is None:
                    return None
                key = new + key[len(old) :]
        for old, new in self.orig_to_new_suffix.items():
            if key.endswith(old):
                if new is None:
                    return None
                key = key[: -len(old)] + new
        return key


def test_renames_as_a_mapper_of_names() -> None:
    recipe = cs.Recipe(
        [
            "language_model.lm_head.{s...} -> lm_head.{s...}",
            "language_model.model.{s...} -> model.language_model.{s...}",
            "{r...}.LayerNorm.{s...} -> {r...}.norm.{s...}",
            "{r...}.scale -> {r...}.weight",
        ],
        drop=["rotary.{s...}"],
        rest="keep",
    )
    keys = ["language_model.lm_head.weight", "language_model.model.layers.0.w", "enc.LayerNorm.bias", "enc.x.scale",
            "rotary.inv_freq", "other.w"]  # fmt: skip
    mapper = Mapper(**cs.recipes.to_vllm(recipe))
    plan = cs.plan({key: torch.ones(1) for key in keys}, recipe)
    made = {step.sources[0]: step.targets[0] for step in plan.steps}
    assert {key: mapper.name(key) for key in keys} == {key: made.get(key) for key in keys}


@pytest.mark.parametrize(
    "rules",
    [
        ["w [x y] -> w [y x]"],
        ["a.{i}.w -> b.{i}.w"],
        ["x.{s...} -> y.x.{s...}", "y.{s...} -> z.{s...}"],
    ],
    ids=["a transpose", "a number inside", "a chain"],
)
def test_what_a_mapper_of_names_cannot_say_is_refused(rules: list[str]) -> None:
    with pytest.raises(cs.RecipeError, match="WeightsMapper"):
        cs.recipes.to_vllm(cs.Recipe(rules, rest="keep"))


def test_statements_for_paddle() -> None:
    recipe = cs.Recipe(
        [
            "model.layers.{i}.attn.{p:q,k,v}.weight [d x] -> model.layers.{i}.attn.qkv.weight [(p d) x]",
            "model.layers.{i}.experts.{e}.up.weight [o x] -> model.layers.{i}.experts.{e}.up.weight [x o]",
            "model.layers.{i}.mlp.gate_up.weight [o (p f)] -> model.layers.{i}.mlp.{p:gate,up}.weight [o f]",
        ],
        rest="keep",
    )
    assert cs.recipes.to_paddle(recipe)["aoa_statements"] == [
        "model.layers.$LAYER_ID.attn.q.weight, model.layers.$LAYER_ID.attn.k.weight, "
        "model.layers.$LAYER_ID.attn.v.weight -> model.layers.$LAYER_ID.attn.qkv.weight, axis=0",
        "model.layers.$LAYER_ID.experts.$EXPERT_ID.up.weight^T -> model.layers.$LAYER_ID.experts.$EXPERT_ID.up.weight",
        "model.layers.$LAYER_ID.mlp.gate_up.weight -> model.layers.$LAYER_ID.mlp.gate.weight, "
        "model.layers.$LAYER_ID.mlp.up.weight, axis=1",
    ]
    with pytest.raises(cs.RecipeError, match="unequal parts"):
        cs.recipes.to_paddle(cs.Recipe(["qkv [(p n:p) x] -> {p:q,k}.w [n:p x]"]))
