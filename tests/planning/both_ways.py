"""Rules held against an oracle on real tensors: forward, back by the plan, back by the inverted recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


class Numbered:
    """Makes tensors whose elements are all different, so that no wrong place looks right."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = int(torch.Size(shape).numel())
        self.next += count
        return torch.arange(self.next - count, self.next).to(dtype).reshape(shape)


def assert_equal(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same keys, shapes, dtypes and bits."""
    assert sorted(made) == sorted(wanted)
    for key, tensor in wanted.items():
        assert made[key].dtype == tensor.dtype, key
        assert made[key].shape == tensor.shape, key
        assert torch.equal(made[key], tensor), key
        assert made[key].is_contiguous(), key


def announced(plan: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    return {key: (plan.specs[key].shape, plan.specs[key].dtype) for key in plan.specs}


def of(state: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {key: (tuple(t.shape), cs.TensorSpec(t.shape, t.dtype).dtype) for key, t in state.items()}


def forward(recipe: Any, source: State, wanted: State, **given: Any) -> Any:
    """Plan and run: the result is `wanted`, as the plan announced it; sources are untouched."""
    before = {key: t.clone() for key, t in source.items()}
    plan = cs.plan(source, recipe, **given)
    made = plan.state_dict()
    assert_equal(made, wanted)
    assert announced(plan) == of(made)
    assert_equal({k: t.contiguous() for k, t in source.items()}, before)
    return plan


def both_ways(recipe: Any, source: State, wanted: State, *, back: Mapping[str, Any] | None = None, **given: Any) -> Any:
    """`forward`, then both inverses lead back to the source, bit for bit.

    Args:
        back: arguments of the symbolic inverse's plan, where it needs more than the forward one: `target`, `dims`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    plan = forward(recipe, source, wanted, **given)
    returned = plan.inverse(wanted)
    assert_equal(returned.state_dict(), source)
    assert announced(returned) == of(source)
    again = {k: v for k, v in given.items() if k != "target"} | dict(back or {})
    assert_equal(cs.plan(wanted, recipe.inverse(), **again).state_dict(), source)
    return plan


def problems(error: cs.CkptSurgeryError) -> list[str]:
    """The codes of what an error carries, in order."""
    return [d.code for d in error.diagnostics]


def specs_of(shapes: Shapes, dtype: str = "F32") -> dict[str, cs.TensorSpec]:
    return {key: cs.TensorSpec(shape, dtype) for key, shape in shapes.items()}


def refused(shapes: Shapes, recipe: Any, target: Shapes | None = None, **given: Any) -> cs.CkptSurgeryError:
    with pytest.raises((cs.PlanError, cs.RecipeError)) as caught:
        cs.plan(specs_of(shapes), recipe, target=specs_of(target) if target else None, **given)
    return caught.value
