"""Sizes that the target, dims or keys give are held against the source: a plan is exact, or it is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from both_ways import Numbered, Shapes, assert_equal, both_ways, forward, problems, refused, specs_of
from hypothesis import given
from hypothesis import strategies as st
from test_random_rules import Case, cases

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe

SPLIT = "qkv.weight [(p rows:p) d] -> {p:q,k,v}.weight [rows:p d]"
PARTS: Shapes = {"q.weight": (16, 4), "k.weight": (8, 4), "v.weight": (8, 4)}


@pytest.mark.parametrize("rows", [0, 15, 20, 31, 33, 40])
@pytest.mark.parametrize("rule", [SPLIT, SPLIT + " | cast(f32)", SPLIT + " | mul(2)"])
def test_rows_that_the_target_does_not_add_up_to(rule: str, rows: int) -> None:
    error = refused({"qkv.weight": (rows, 4)}, rule, PARTS)
    assert problems(error) == ["size-mismatch"]
    for number in (f"should be 32, but the dimension is {rows}", f"[{rows}, 4]", "[16, 4]", "[8, 4]"):
        assert number in str(error)


@pytest.mark.parametrize("shape", [(12,), (3, 4, 1), (1, 3, 4)])
def test_a_target_of_another_rank_solves_no_size(shape: tuple[int, ...]) -> None:
    assert problems(refused({"w": (12,)}, "w [(a b)] -> x [a b]", {"x": shape})) == ["unsolved-axis"]


@pytest.mark.parametrize(
    ("shapes", "rule", "target", "numbers"),
    [
        ({"w": (10, 3)}, "w [(e d) x] -> e.{e}.w [d x]", {f"e.{i}.w": (4, 3) for i in range(3)}, ("12", "10")),
        ({"w": (12,)}, "w [(a b c)] -> w [(c b) a]", {"w": (4, 2)}, ("12",)),
        ({"a": (5, 2), "b": (4, 2)}, "{p:a,b} [n d] -> w [(n p) d]", {"w": (10, 2)}, ("5", "4")),
        ({"k": (8, 4)}, "k [g d] -> k [(g r) d] | repeat_over(r)", {"k": (30, 4)}, ("30", "8")),
        ({"k": (32, 4)}, "k [(g r) d] -> k [g d] | mean_over(r)", {"k": (7, 4)}, ("32", "7")),
    ],
)
def test_other_contradictions(shapes: Shapes, rule: str, target: Shapes, numbers: tuple[str, ...]) -> None:
    text = str(refused(shapes, rule, target))
    assert all(number in text for number in numbers), text


@given(cases(), st.data())
def test_a_plan_against_any_target_is_exact_or_refused(case: Case, data: st.DataObject) -> None:
    """Sizes are withheld, sources and targets changed: every element has exactly one place, or nothing is planned."""
    source, target = case.states(torch.float32)
    shapes = [{k: list(t.shape) for k, t in side.items()} for side in (source, target)]
    for side in shapes:
        for key in data.draw(st.lists(st.sampled_from(sorted(side)), max_size=2)):
            if side[key]:
                at = data.draw(st.integers(0, len(side[key]) - 1))
                side[key][at] = max(0, side[key][at] + data.draw(st.sampled_from([-1, 1, 2, side[key][at]])))
    recipe = case.recipe
    kept = data.draw(st.sets(st.sampled_from(sorted(recipe.dims)))) if recipe.dims else set()
    recipe = recipe.replace(dims={name: size for name, size in recipe.dims.items() if name in kept})
    specs, wanted = (specs_of({k: tuple(s) for k, s in side.items()}) for side in shapes)
    try:
        plan = cs.plan(specs, recipe, target=wanted if data.draw(st.booleans()) else None)
    except cs.CkptSurgeryError:
        return
    for step in plan.steps:
        layout = step.program.moves
        assert layout is not None
        assert layout.sources == tuple(specs[key].shape for key in step.sources)
        assert sum(p.numel for p in layout.pieces) == sum(map(math.prod, layout.sources))
        assert sum(p.numel for p in layout.pieces) == sum(map(math.prod, layout.targets))
        for numbers, offsets in ((layout.sources, "source"), (layout.targets, "target")):
            seen = [torch.zeros(math.prod(shape), dtype=torch.int32) for shape in numbers]
            for piece in layout.pieces:
                box = torch.tensor([getattr(piece, f"{offsets}_offset")])
                for size, stride in zip(piece.shape, getattr(piece, f"{offsets}_strides")):
                    box = (box[:, None] + torch.arange(size) * stride).flatten()
                seen[getattr(piece, offsets)][box] += 1
            assert all(bool((s == 1).all()) for s in seen)


def copies(count: int, each: int) -> tuple[dict[str, Any], dict[str, Any]]:
    numbers = Numbered()
    source = {f"l.{i}.w": numbers(3) for i in range(count)}
    return source, {f"l.{i * each + c}.w": source[f"l.{i}.w"] for i in range(count) for c in range(each)}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("each", [1, 2, 5])
def test_copies_of_layers_are_counted_in_the_target(count: int, each: int) -> None:
    source, wanted = copies(count, each)
    rule = "l.{i}.w -> l.{(i c)}.w | repeat_over(c)"
    both_ways(rule, source, wanted, target=wanted, back={"target": source})
    both_ways(Recipe([rule], dims={"c": each}), source, wanted)
    forward("l.{(i c)}.w -> l.{i}.w | mean_over(c)", wanted, source, target=source)


def test_the_whole_list_of_layers_again_and_again() -> None:
    numbers = Numbered()
    source = {f"l.{i}.w": numbers(3) for i in range(2)}
    wanted = {f"l.{i + 2 * c}.w": source[f"l.{i}.w"] for i in range(2) for c in range(3)}
    both_ways("l.{i}.w -> l.{(c i)}.w | repeat_over(c)", source, wanted, target=wanted, back={"target": source})


def test_copies_that_differ_in_number() -> None:
    source, _ = copies(2, 1)
    wanted = {f"l.{n}.w": source[f"l.{i}.w"] for n, i in enumerate((0, 0, 1, 1, 1))}
    forward(Recipe(["l.{i}.w -> l.{(i c)}.w | repeat_over(c)"], dims={"c": [2, 3]}), source, wanted)
    error = refused(dict.fromkeys(source, (3,)), "l.{i}.w -> l.{(i c)}.w | repeat_over(c)", dict.fromkeys(wanted, (3,)))
    assert problems(error)[0] == "unsolved-axis" and "5 keys for 2 of {i}" in str(error)


@pytest.mark.parametrize("known", ["g", "h", "r"])
def test_copies_of_heads_follow_from_the_targets_shape(known: str) -> None:
    k = Numbered()(6, 4)
    wanted = k.reshape(2, 1, 3, 4).expand(2, 4, 3, 4).reshape(24, 4).contiguous()
    rule = "k [(g h) d] -> k [(g r h) d] | repeat_over(r)"
    sizes = {"g": 2, "h": 3, "r": 4}
    if known == "r":
        both_ways(Recipe([rule], dims={"r": 4, "g": 2}), {"k": k}, {"k": wanted})
        return
    recipe = Recipe([rule], dims={known: sizes[known]})
    both_ways(recipe, {"k": k}, {"k": wanted}, target={"k": wanted}, back={"target": {"k": k}})
    mean = Recipe(["k [(g r h) d] -> k [(g h) d] | mean_over(r)"], dims={known: sizes[known]})
    forward(mean, {"k": wanted}, {"k": k}, target={"k": k})


@pytest.mark.parametrize("op", ["mean_over(r)", "sum_over(r)", "same(r)"])
@pytest.mark.parametrize("before", [True, False])
def test_what_is_left_of_an_axis_follows_from_the_targets_shape(op: str, before: bool) -> None:
    ones = torch.ones(12, 2)
    wanted = {"w": ones[:4] * (3 if op.startswith("sum") else 1)}
    rule = f"w [(g r) d] | {op} -> w [g d]" if before else f"w [(g r) d] -> w [g d] | {op}"
    forward(rule, {"w": ones}, wanted, target=wanted)


def test_one_number_for_all_choices_is_refused() -> None:
    shapes: Shapes = {"qkv.weight": (12, 4)}
    for recipe, more in ((Recipe([SPLIT], dims={"rows": 4}), {}), (Recipe([SPLIT]), {"dims": {"rows": 4}})):
        error = refused(shapes, recipe, **more)
        assert problems(error) == ["one-size"]
        assert error.diagnostics[0].help == 'dims={"rows": {"q": …, "k": …, "v": …}} in its place'
    plan = cs.plan(specs_of(shapes), Recipe([SPLIT]), dims={"rows": {"q": 4, "k": 4, "v": 4}})
    assert [s.shape for s in plan.specs.values()] == [(4, 4)] * 3


def test_a_table_of_this_run_goes_over_the_recipes_own_choice_by_choice() -> None:
    own = {"q": "config.heads * 2", "k": "g", "v": "g"}
    recipe = Recipe([SPLIT], dims={"rows": own, "g": "config.groups * 2"})
    shapes: Shapes = {"qkv.weight": (24, 4)}
    made = [(16, 4), (4, 4), (4, 4)]
    for more in (
        {"config": {"heads": 8, "groups": 2}},
        {"dims": {"rows": {"q": 16}, "g": 4}},
        {"dims": {"rows": {"q": 16, "k": 4, "v": 4}}},
        {"dims": {"rows": {"k": 4, "v": 4}}},  # what is left is q's
    ):
        assert [s.shape for s in cs.plan(specs_of(shapes), recipe, **more).specs.values()] == made
    error = refused(shapes, recipe)
    assert error.diagnostics[0].help == 'config=… holds it, dims={"rows": {"q": …, "k": …, "v": …}}'
    assert problems(refused(shapes, recipe, dims={"rows": {"query": 16}, "g": 4})) == ["unknown-choice"]


def test_a_table_of_this_run_may_name_choices_of_any_stage() -> None:
    first = Recipe([SPLIT])
    second = Recipe(
        ["{p:q,k}.weight [(rows:p two) d] -> {p:q,k}.weight [(two rows:p) d]"], dims={"two": 2}, rest="keep"
    )
    numbers = Numbered()
    source = {"qkv.weight": numbers(8, 2)}
    error = refused({"qkv.weight": (8, 2)}, first.then(second), dims={"rows": {"q": 4, "k": 2, "v": 2, "x": 1}})
    assert problems(error) == ["unknown-choice"]
    with pytest.raises(cs.PlanError):  # rows of the second stage count pairs
        cs.plan(source, first.then(second), dims={"rows": {"q": 4, "k": 2, "v": 2}})
    whole = Recipe(["{p:q,k}.weight [rows:p d] -> {p:q,k}.weight [d rows:p]"], rest="keep")
    made = cs.plan(source, first.then(whole), dims={"rows": {"q": 4, "k": 2, "v": 2}}).state_dict()
    w = source["qkv.weight"]
    turned = {"q.weight": w[:4].T.contiguous(), "k.weight": w[4:6].T.contiguous(), "v.weight": w[6:].contiguous()}
    assert_equal(made, turned)


@pytest.mark.parametrize(("dims", "made"), [({"h": {"q": 8, "k": 2, "v": 2}}, True), ({"h": 8}, False), ({}, False)])
def test_fused_heads_between_two_shipped_codebases(dims: dict[str, Any], made: bool) -> None:
    """Grouped-query attention, 8 heads of 8 over 2 groups, without a config."""
    layer = {"norm_1.weight": (64,), "norm_2.weight": (64,), "attn.proj.weight": (64, 64), "attn.qkv.weight": (96, 64)}
    layer |= {"mlp.fc_1.weight": (100, 64), "mlp.fc_2.weight": (100, 64), "mlp.proj.weight": (64, 100)}
    shapes: Shapes = {"lm_head.weight": (20, 64), "transformer.wte.weight": (20, 64), "transformer.ln_f.weight": (64,)}
    shapes |= {f"transformer.h.0.{k}": s for k, s in layer.items()}
    recipe = cs.route("llama/litgpt", "llama/torchtune")
    if not made:
        error = refused(shapes, recipe, dims=dims)
        assert problems(error)[0] == ("one-size" if dims else "unsolved-axis")
        expected = 'config=… holds it, dims={"h": {"q": …, "k": …, "v": …}}'
        assert error.diagnostics[0].help == expected + (" in its place" if dims else "")
        return
    plan = cs.plan(specs_of(shapes), recipe, dims=dims)
    assert [plan.specs[f"layers.0.attn.{p}_proj.weight"].shape[0] for p in "qkv"] == [64, 16, 16]


@pytest.mark.parametrize("sizes", [[0, 4, 0, 2], {"1": 4, "3": 2}])
@pytest.mark.parametrize("domain", ["1,3", "3,1"])
def test_a_size_of_its_own_goes_by_the_value_of_a_captured_integer(sizes: Any, domain: str) -> None:
    numbers = Numbered()
    parts = {v: numbers(4 if v == "1" else 2) for v in domain.split(",")}
    source = {f"l.{v}.w": part for v, part in parts.items()}
    wanted = {"w": torch.cat(list(parts.values()))}
    both_ways(Recipe([f"l.{{i:{domain}}}.w [r:i] -> w [(i r:i)]"], dims={"r": sizes}), source, wanted)


@pytest.mark.parametrize("sizes", [[9, 4, 2], {"1": 4, "2": 2}])
def test_a_size_of_its_own_goes_by_the_value_within_a_range(sizes: Any) -> None:
    numbers = Numbered()
    source = {"l.1.w": numbers(4), "l.2.w": numbers(2)}
    wanted = {"w": torch.cat(list(source.values()))}
    both_ways(Recipe(["l.{i:1..2}.w [r:i] -> w [(i r:i)]"], dims={"r": sizes}), source, wanted)
