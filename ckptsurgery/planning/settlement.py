"""What is settled between a source and a target: what is offered, and the outcome."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import Diagnostic
from ..specs import TensorSpec
from .expanding import Stage
from .plan import Plan

__all__ = ["Offer", "Settlement"]


@dataclass(frozen=True)
class Offer:
    """The tensors that a plan makes of a source, under the names of a target.

    Args:
        plan: its steps make them. stage: the `[init]` and `[tie]` entries of the recipe.
        made: key -> spec, where that is more than the steps make.
        elsewhere: keys of `made` that no step makes, since modules load them in their own way -> the source keys.
        doubts: keys that fit in name and shape, and would be wrong if they were loaded as they are -> why.
        tolerated: keys of the target that may be missing, such as counters that old files lack.
        uncast: keys of `made` that keep their dtype where a dtype is asked for all.
        by_call: whether the caller takes `init=`, `keep=`, `drop=` and `partial=`; else it has the recipe alone.
    """

    plan: Plan
    stage: Stage = field(default_factory=Stage)
    made: Mapping[str, TensorSpec] | None = None
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    doubts: Mapping[str, str] = field(default_factory=dict)
    tolerated: Collection[str] = ()
    uncast: Collection[str] = ()
    by_call: bool = False

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Key -> spec, of all that is offered."""
        return self.plan.specs if self.made is None else self.made

    @cached_property
    def origins(self) -> dict[str, tuple[str, ...]]:
        """Key -> the source keys behind it."""
        return {key: step.sources for step in self.plan.steps for key in step.targets} | dict(self.elsewhere)


@dataclass
class Settlement:
    """The outcome for each key.

    Args:
        plan: the plan cut down to what is loaded, with casts, inits and ties.
        load: keys of the target that take what the source offers.
        inits: key -> initialiser; `own` keeps what is there.
        missing: keys of the target that nothing fills, kept as built.
        aside: offered keys that were set aside -> why.
        unexpected: offered keys that the target has no place for, or that do not fit -> why.
        refused: offered keys that fit in name and shape, and must not be loaded as they are.
        unfilled: missing keys that the source does hold something for -> why that was not loaded.
        casts: key -> (from, to).
        problems: what stands against it.
    """

    plan: Plan
    load: list[str] = field(default_factory=list)
    inits: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    aside: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    unfilled: dict[str, str] = field(default_factory=dict)
    casts: dict[str, tuple[str, str]] = field(default_factory=dict)
    problems: list[Diagnostic] = field(default_factory=list)
