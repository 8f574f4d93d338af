"""The record of a plan: its steps, its settlements and its target. Readers that do not run a plan need no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Diagnostic
from ..language.recipe import Recipe
from ..specs import TensorSpec
from .config_changes import ConfigChange
from .expanding import ResolvedRule
from .options import PlanOptions
from .steps import Step

__all__ = ["PlanRecord", "RuleUse", "Target"]


@dataclass(frozen=True)
class Target:
    """The side that a plan fills.

    Args:
        specs: key -> spec, in the target's order.
        ties: groups of keys that are one tensor.
        name: what messages call it.
    """

    specs: Mapping[str, TensorSpec]
    ties: Sequence[Sequence[str]] = ()
    name: str = "target"

    def renamed(self, names: Mapping[str, str]) -> Target:
        """Return the same with other names for some keys."""
        ties = [[names.get(key, key) for key in group] for group in self.ties]
        return replace(self, specs={names.get(key, key): spec for key, spec in self.specs.items()}, ties=ties)


@dataclass(frozen=True)
class RuleUse:
    """A rule as the plan used it: its text, where it was read, and its bound form, if it has one."""

    text: str
    place: str | None
    bound: ResolvedRule | None = None
    is_rest: bool = False


@dataclass(frozen=True, repr=False)
class PlanRecord:
    """Steps, in the order of their sources, and everything that moves nothing but is settled all the same.

    `Plan` explains the fields.
    """

    steps: tuple[Step, ...]
    uses: tuple[RuleUse, ...]
    specs: Mapping[str, TensorSpec]
    dropped: Mapping[str, str] = field(default_factory=dict)
    proofs: tuple[tuple[str, str], ...] = ()
    inits: Mapping[str, Any] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    tie_proofs: tuple[tuple[str, str], ...] = ()
    casts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    warnings: tuple[Diagnostic, ...] = ()
    config: tuple[ConfigChange, ...] = ()
    source: Mapping[str, TensorSpec] = field(default_factory=dict)
    target: Target | None = None
    recipe: Recipe | None = None
    options: PlanOptions = field(default_factory=PlanOptions, compare=False)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The splits that nothing but divisibility supports."""
        return tuple(w.headline for w in self.warnings if w.code == "assumed-split")

    @property
    def keys(self) -> tuple[str, ...]:
        """Every target key that will exist, in the target's order, else in the order of their sources."""
        made = [*self.specs, *self.ties, *self.inits]
        if self.target is None:
            return tuple(dict.fromkeys(made))
        known = set(made)
        ordered = [k for k in self.target.specs if k in known]
        return tuple(dict.fromkeys([*ordered, *made]))
