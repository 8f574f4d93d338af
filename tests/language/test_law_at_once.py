"""What breaks the law of a rule is said when the recipe is made, all of it at once."""

from __future__ import annotations

import pytest

import ckptsurgery as cs


def test_every_broken_rule_is_told_when_the_recipe_is_made() -> None:
    with pytest.raises(cs.RecipeError) as error:
        cs.Recipe(["experts.{e}.w1.weight [f d] -> gate [f d]", "{p:q,k}.w -> {p:a,b,c}.w", "a [x y] -> b [x]"])
    assert [d.code for d in error.value.diagnostics] == ["unbound-capture", "choices-differ", "unbound-axis"]
    text = str(error.value)
    assert "{e} is bound on the left only, and is no axis on the right" in text and "stack them: gate [e f d]" in text


def test_a_fragment_is_judged_within_its_scope() -> None:
    fragment = cs.Recipe(["w [f d] -> w [e f d]"], rest=None)
    whole = fragment.scoped(source="experts.{e}.")
    assert cs.plan({f"experts.{e}.w": _zeros() for e in range(2)}, whole).specs["w"].shape == (2, 3, 4)
    with pytest.raises(cs.RecipeError, match="unbound-axis"):
        cs.plan({"w": _zeros()}, fragment)


def test_a_name_that_dims_may_still_settle_is_no_contradiction() -> None:
    recipe = cs.Recipe(["h.{i}.w -> l.{n-1-i}.w"])
    plan = cs.plan({f"h.{i}.w": _zeros() for i in range(3)}, recipe, dims={"n": 3})
    assert plan.steps[0].sources == ("h.0.w",) and plan.steps[0].targets == ("l.2.w",)


def _zeros() -> object:
    import torch

    return torch.zeros(3, 4)
