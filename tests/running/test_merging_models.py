"""Whole models merged from files, in blocks: equal to whole tensors, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.planning.cutting import cut_of

MODELS = "abc"
W = {"w": {"a": 0.2, "b": 0.3, "c": 0.5}}
PAIR, ALL = "a/{k...}, b/{k...}", "a/{k...}, b/{k...}, c/{k...}"
MERGES = [
    (f"{PAIR} -> {{k...}} | lerp(0.25)", True),
    (f"{PAIR} -> {{k...}} | dare(0.5)", True),
    (f"{PAIR} -> {{k...}} | diff | cast(bf16)", True),
    (f"{PAIR} -> x.{{k...}} | slerp(0.3)", True),
    (f"{ALL} -> {{k...}} | task_arithmetic(0.5) | cast(bf16)", True),
    (f"{ALL} -> {{k...}} | ties(0.3)", True),
    (f"{ALL} -> {{k...}} | della(0.5)", False),
    (f"{ALL} -> {{k...}} | model_stock", True),
    (f"{ALL} -> {{k...}} | karcher", True),
    ("{m:a,b,c}/{k...} -> {k...} | mean_over(m)", True),
    ("{m:a,b,c}/{k...} -> {k...} | sum_over(m, w) | mul(2)", True),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("models")
    states = {}
    for number, name in enumerate(MODELS):
        generator = torch.Generator().manual_seed(number)
        sizes = {"l.0.w": (300, 1700), "l.1.w": (300, 1700), "norm": (7,), "empty": (0, 3), "scalar": ()}
        states[name] = {key: torch.randn(size, generator=generator) for key, size in sizes.items()}
        cs.save(states[name], folder / f"{name}.safetensors")
    return {"folder": folder, "states": states, "mounts": {f"{n}/": folder / f"{n}.safetensors" for n in MODELS}}


@pytest.mark.parametrize(("rule", "blocks"), MERGES)
def test_files_are_merged_in_blocks_as_tensors_are_whole(models: dict[str, Any], rule: str, blocks: bool) -> None:
    recipe = Recipe([rule], drop=[] if "c" in rule.partition("->")[0] else ["c/{k...}"], dims=W)
    plan = cs.plan(models["mounts"], recipe)
    programs = {step.targets[0]: step.program for step in plan.steps}
    assert all((cut_of(p) is not None) == blocks for key, p in programs.items() if "l." in key)
    plan.save(models["folder"] / "out.safetensors", overwrite=True, check=True)
    whole = {f"{n}/{k}": t for n, state in models["states"].items() for k, t in state.items()}
    wanted = cs.plan(whole, recipe).state_dict()
    made = cs.open(models["folder"] / "out.safetensors").state_dict()
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[k], t) and made[k].dtype == t.dtype for k, t in wanted.items())
    if blocks:
        assert plan.cost.least_memory < 24 << 20


def test_each_layer_has_weights_of_its_own(models: dict[str, Any]) -> None:
    rule = "a/l.{i}.w, b/l.{i}.w -> l.{i}.w | lerp(t)"
    recipe = Recipe([rule], rest="drop", dims={"t": "i / (n - 1)", "n": 2})
    made = cs.plan(models["mounts"], recipe).state_dict()
    assert torch.equal(made["l.0.w"], models["states"]["a"]["l.0.w"])
    assert torch.equal(made["l.1.w"], models["states"]["b"]["l.1.w"])
    by_table = cs.plan(models["mounts"], recipe.replace(rules=[rule.replace("(t)", "(t:i)")], dims={"t": [0, 1]}))
    assert all(torch.equal(t, made[k]) for k, t in by_table.state_dict().items())


def test_layouts_that_differ_are_merged_too(models: dict[str, Any], tmp_path: Path) -> None:
    turned = {k: t.T.contiguous() if t.dim() == 2 else t for k, t in models["states"]["b"].items()}
    cs.save(turned, tmp_path / "b.safetensors")
    mounts = {"a/": models["mounts"]["a/"], "b/": tmp_path / "b.safetensors"}
    turned_rule = Recipe(["b/l.{i}.w [x y] -> b/l.{i}.w [y x]"], rest="keep")
    recipe = turned_rule.then(Recipe(["a/l.{i}.w, b/l.{i}.w -> l.{i}.w | lerp(0.5)"], rest="drop"))
    made = cs.plan(mounts, recipe).state_dict()
    a, b = (models["states"][n]["l.0.w"] for n in "ab")
    assert torch.allclose(made["l.0.w"], (a + b) / 2)


def test_a_value_past_the_range_names_its_key(models: dict[str, Any], tmp_path: Path) -> None:
    cs.save({"w": torch.full((2000, 1000), 3e38)}, tmp_path / "x.safetensors")
    mounts = {"a/": tmp_path / "x.safetensors", "b/": tmp_path / "x.safetensors"}
    with pytest.raises(cs.CheckpointError, match="range of F32"):
        cs.plan(mounts, "a/{k...}, b/{k...} -> {k...} | apply(1)").save(tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_the_seed_of_a_load_reaches_ops_that_draw() -> None:
    a, b = torch.zeros(40), torch.ones(40)
    rule = "a/weight, b/weight -> weight | dare(0.5)"

    def loaded(seed: int) -> torch.Tensor:
        model = torch.nn.LayerNorm(40, bias=False)
        cs.load_into(model, {"a/weight": a, "b/weight": b}, rule, seed=seed)
        return model.weight.detach()

    assert torch.equal(loaded(3), cs.plan({"a/weight": a, "b/weight": b}, rule, seed=3).state_dict()["weight"])
    assert not torch.equal(loaded(3), loaded(4))
