"""What is settled between a source and a target: what the caller asks for, what is offered, and the outcome."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic
from ..specs import TensorSpec
from .expanding import Stage
from .plan import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPE_POLICIES", "OWN", "LoadOptions", "Offer", "Settlement"]

DTYPE_POLICIES = ("lossless", "error", "model", "source")
OWN = ("own", "own()")
"""Initialisers that leave a tensor as its module built it."""


@dataclass(frozen=True)
class LoadOptions:
    """What the caller of a load asks for.

    Args:
        init: module path, key or pattern of the target -> initialiser.
        keep: paths that stay as constructed. drop: paths of the source to leave out.
        mismatch: of shapes: `"error"`, `"init"` or `"keep"`.
        dtype: one of `DTYPE_POLICIES`, or the dtype that every floating-point tensor gets.
        partial: whether tensors that do not fit are only listed.
        assign: whether parameters are replaced rather than copied into; None leaves it to the model.
        device: where the model comes to be, with assignment.
        check_values: whether NaN and Inf are looked for first.
        seed: of the initialisers.
        progress: whether a bar is shown; None where a terminal is there.
    """

    init: Mapping[str, Any] = field(default_factory=dict)
    keep: Sequence[str] = ()
    drop: Sequence[str] = ()
    mismatch: str = "error"
    dtype: str = "lossless"
    partial: bool = False
    assign: bool | None = None
    device: torch.device | None = None
    check_values: bool = False
    seed: int = 0
    progress: bool | None = None


@dataclass(frozen=True)
class Offer:
    """The tensors that a plan makes of a source, under the names of a target.

    Args:
        plan: its steps make them. stage: the `[init]` and `[tie]` entries of the recipe.
        made: key -> spec, where that is more than the steps make.
        elsewhere: keys of `made` that no step makes, since modules load them in their own way -> the source keys.
        doubts: keys that fit in name and shape, and would be wrong if they were loaded as they are -> why.
        tolerated: keys of the target that may be missing, such as counters that old files lack.
        by_call: whether the caller takes `init=`, `keep=`, `drop=` and `partial=`; else it has the recipe alone.
    """

    plan: Plan
    stage: Stage = field(default_factory=Stage)
    made: Mapping[str, TensorSpec] | None = None
    elsewhere: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    doubts: Mapping[str, str] = field(default_factory=dict)
    tolerated: Collection[str] = ()
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
