"""What a target, a dtype or a used recipe does not allow is told as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from both_ways import Shapes, problems, refused, specs_of

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe, Scope
from ckptsurgery.planning.planner import make_plan

HEAD = {"b": (2,), "h": (2,)}
TARGETS: list[tuple[str, Shapes, Any, Shapes, str, tuple[str, ...]]] = [
    (
        "another shape",
        {f"l.{i}": (2, 3) for i in range(3)},
        ["l.{i} -> m.{i}"],
        {f"m.{i}": (3, 2) for i in range(3)},
        "shape-mismatch",
        ("rule makes 'm.0' [2, 3]; target wants [3, 2]", "m.{1,2}", "l.0 [2, 3]", "[x y] -> [y x]"),
    ),
    (
        "more experts than the target",
        {f"e.{i}": (2,) for i in range(3)},
        ["e.{e} [d] -> b [e d]"],
        {"b": (4, 2)},
        "shape-mismatch",
        ("3 rows against 4",),
    ),
    (
        "keys that the target lacks",
        {f"l.{i}": (2,) for i in range(3)},
        ["l.{i} -> m.{i}"],
        {"m.0": (2,), "m.1": (2,)},
        "unexpected-targets",
        ("1 key that the plan makes is not in the target", "m.2", '"l.{i:0,1}" takes what is wanted'),
    ),
    (
        "keys that nothing makes",
        {"a": (2,)},
        ["a -> b"],
        {"b": (2,), "h.0": (1,), "h.1": (1,)},
        "missing-keys",
        ("2 target keys are made by no rule", "h.{0,1}", '"h.{i}"'),
    ),
    (
        "an initialiser that matches nothing",
        {"a": (2,)},
        Recipe(["a -> b"], init={"c": "zeros"}),
        {"b": (2,)},
        "unused-init",
        ("'c' matches no target key",),
    ),
    (
        "an initialiser of what is made",
        {"a": (2,)},
        Recipe(["a -> b"], init={"b": "zeros"}),
        {"b": (2,)},
        "init-and-made",
        ("'b'",),
    ),
    (
        "an initialiser that nobody knows",
        {"a": (2,)},
        Recipe(["a -> b"], init={"h": "zeross"}),
        HEAD,
        "bad-init",
        ("zeros",),
    ),
    (
        "an initialiser that is no call",
        {"a": (2,)},
        Recipe(["a -> b"], init={"h": "zeros("}),
        HEAD,
        "bad-init",
        ("'h'",),
    ),
]


@pytest.mark.parametrize(
    ("shapes", "recipe", "target", "code", "said"), [t[1:] for t in TARGETS], ids=[t[0] for t in TARGETS]
)
def test_a_target_that_does_not_fit_is_told(
    shapes: Shapes, recipe: Any, target: Shapes, code: str, said: tuple[str, ...]
) -> None:
    error = refused(shapes, recipe, target)
    assert problems(error) == [code], str(error)
    for text in said:
        assert text in str(error), str(error)


def test_dtypes_that_differ_cannot_be_gathered() -> None:
    source = {"e.0": cs.TensorSpec([2], "F32"), "e.1": cs.TensorSpec([2], "F16")}
    with pytest.raises(cs.PlanError) as caught:
        cs.plan(source, "e.{e} [d] -> w [e d]")
    assert problems(caught.value) == ["dtype-mismatch"]
    assert "cast" in str(caught.value) and "e.{e} [d] -> w [e d]" in str(caught.value)


@pytest.mark.parametrize(
    "rule", ["a [x y] -> q [y x]", "a [(p x) y] -> {p:q,k} [x y]", "a [x y] -> q [(x y)]", "a.{i} [x y] -> q [i x y]"]
)
def test_packed_elements_are_not_moved(rule: str) -> None:
    keys = ["a.0", "a.1"] if "{i}" in rule else ["a"]
    with pytest.raises(cs.PlanError) as caught:
        make_plan({k: cs.TensorSpec([4, 8], "F4") for k in keys}, Recipe(rule), lambda name: Recipe())
    assert problems(caught.value) == ["packed-dtype"]


def test_packed_tensors_are_copied_whole() -> None:
    plan = make_plan({"a": cs.TensorSpec([4, 8], "F4")}, Recipe("a -> b"), lambda name: Recipe())
    assert plan.specs == {"b": cs.TensorSpec([4, 8], "F4")} and plan.steps[0].kind == "copy"


def test_a_lossy_cast_is_asked_for() -> None:
    source, target = {"a": torch.ones(2)}, {"b": cs.TensorSpec([2], "BF16")}
    with pytest.raises(cs.PlanError) as caught:
        cs.plan(source, "a -> b", target)
    assert problems(caught.value) == ["dtype-mismatch"] and "can lose bits" in str(caught.value)
    assert cs.plan(source, "a -> b", target, dtype="model").casts == {"b": ("F32", "BF16")}
    assert cs.plan(source, "a -> b", target, dtype="source").state_dict()["b"].dtype == torch.float32
    with pytest.raises(cs.PlanError):
        cs.plan({"a": torch.ones(2, dtype=torch.bfloat16)}, "a -> b", {"b": cs.TensorSpec([2], "F32")}, dtype="error")


def test_recipes_that_use_each_other_are_refused() -> None:
    library = {name: Recipe(scopes=[Scope(Recipe(rest=None), use=other)]) for name, other in (("x", "y"), ("y", "x"))}
    with pytest.raises(cs.RecipeError) as caught:
        make_plan(specs_of({"a": (1,)}), library["x"], library.__getitem__)
    assert problems(caught.value) == ["circular-use"] and "y -> x -> y" in str(caught.value)


def test_an_unknown_key_names_the_rules_that_nearly_match() -> None:
    plan = cs.plan(specs_of({"h.0.mlp.w": (2,)}), "h.{i}.mlp.w -> layers.{i}.fc.w")
    with pytest.raises(cs.PlanError) as caught:
        plan.explain("h.0.attn.w")
    assert problems(caught.value) == ["unknown-key"]
    assert "nearly: h.{i}.mlp.w -> layers.{i}.fc.w  (segment 3 is 'attn', the rule wants 'mlp')" in str(caught.value)
