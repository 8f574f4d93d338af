"""A plan: what will happen to every tensor, known from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic
from ..language.folding import fold_groups
from ..language.recipe import Recipe
from ..specs import TensorSpec
from ..wording import counted
from .costing import Cost, cost_of
from .expanding import BoundRule
from .steps import Step

if TYPE_CHECKING:
    from .explaining import Explanation

__all__ = ["Plan", "RuleUse", "Target"]


@dataclass(frozen=True)
class Target:
    """What is to be filled.

    Args:
        specs: key -> spec, in the target's order.
        ties: groups of keys that are one tensor.
        name: what messages call it.
    """

    specs: Mapping[str, TensorSpec]
    ties: Sequence[Sequence[str]] = ()
    name: str = "target"


@dataclass(frozen=True)
class RuleUse:
    """A rule as the plan used it: its text, where it was read, and its bound form."""

    text: str
    place: str | None
    bound: BoundRule
    is_rest: bool = False


@dataclass(frozen=True)
class Plan:
    """Steps, in the order of their sources, and everything that moves nothing but is settled all the same.

    Args:
        steps: which sources make which targets.
        uses: the rules behind them; `Step.rules` counts in here.
        specs: target key -> spec, of all that steps make.
        dropped: source key -> the line that drops it.
        proofs: (left out, kept) source keys that must be equal before anything is written.
        inits: target key -> initialiser.
        ties: target key -> the target key whose tensor it shares.
        tie_proofs: pairs of made target keys that must be equal, because the target ties them.
        casts: target key -> (from, to), where the target's dtype asked for it.
        warnings: diagnostics that stop nothing, such as assumed splits.
        source: the source's headers. target: what was to be filled. recipe: what was planned.
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
    source: Mapping[str, TensorSpec] = field(default_factory=dict)
    target: Target | None = None
    recipe: Recipe | None = None

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What nothing but divisibility supports."""
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

    @property
    def cost(self) -> Cost:
        """What running it will take: bytes read and written, memory, how many steps only copy."""
        return cost_of(self)

    def explain(self, key: str) -> Explanation:
        """How a key, of either side, is accounted for."""
        from .explaining import explain  # an explanation reads a plan

        return explain(self, key)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "steps": [self._step_json(s) for s in self.steps],
            "initialised": {k: str(v) for k, v in self.inits.items()},
            "tied": dict(self.ties),
            "dropped": dict(self.dropped),
            "proofs": [list(p) for p in (*self.proofs, *self.tie_proofs)],
            "casts": {k: list(v) for k, v in self.casts.items()},
            "assumptions": list(self.assumptions),
            "warnings": [w.to_json() for w in self.warnings],
            "cost": self.cost.to_json(),
        }

    def _step_json(self, step: Step) -> dict[str, Any]:
        return {
            "kind": step.kind,
            "sources": list(step.sources),
            "targets": [
                {"key": k, "shape": list(s.shape), "dtype": s.dtype} for k, s in zip(step.targets, step.program.outputs)
            ],
            "rules": [self.uses[n].text for n in step.rules],
        }

    def __str__(self) -> str:
        cost = self.cost
        kinds = {"copy": cost.copies, "move": cost.moves, "compute": cost.computes}
        parts = [f"{n} {kind}" for kind, n in kinds.items() if n]
        source, target = counted(len(self.source), "source key"), counted(len(self.keys), "target key")
        lines = [f"plan: {source} -> {target} ({', '.join(parts) or 'no steps'})"]
        lines += self._rule_lines()
        for title, keys in (
            ("initialised", self.inits),
            ("tied", self.ties),
            ("dropped", self.dropped),
            ("cast", self.casts),
        ):
            if keys:
                says: Mapping[str, Any] = keys
                lines.append(f"  {title}")
                folded = fold_groups(keys, label=lambda k, says=says: str(says[k]))  # type: ignore[misc]
                lines += [f"    {f.text}  {_said(says[f.first])}" for f in folded[:20]]
                lines += [f"    … and {len(folded) - 20} more"] if len(folded) > 20 else []
        lines += [f"  {w.severity}: {w.headline}" for w in self.warnings]
        lines.append(f"  cost: {cost}")
        return "\n".join(lines)

    def _rule_lines(self) -> list[str]:
        by_rule: dict[tuple[int, ...], list[Step]] = {}
        for step in self.steps:
            by_rule.setdefault(step.rules, []).append(step)
        lines = []
        for numbers, steps in by_rule.items():
            lines.append("  " + "  then  ".join(self.uses[n].text for n in numbers))
            sources = len(set(chain.from_iterable(map(attrgetter("sources"), steps))))
            targets = sum(map(len, map(attrgetter("targets"), steps)))
            shown = steps[0]
            example, made = _few(shown.sources), _few(shown.targets)
            lines.append(f"    {sources} -> {targets} {steps[0].kind}  {example} -> {made} {shown.program.outputs[0]}")
        return lines


def _few(keys: Sequence[str]) -> str:
    """The first keys, as many as a line can take."""
    count = next((n for n in (3, 2) if n <= len(keys) and sum(map(len, keys[:n])) < 64), 1)
    return ", ".join(keys[:count]) + (", …" if count < len(keys) else "")


def _said(value: Any) -> str:
    return " -> ".join(value) if isinstance(value, tuple) else str(value)
