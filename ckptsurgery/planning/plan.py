"""A plan: what will happen to every tensor, known from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from ..errors import Diagnostic
from ..language.folding import fold_groups
from ..language.recipe import Recipe
from ..specs import TensorSpec
from ..wording import brief, clipped, counted
from .costing import Cost, cost_of
from .expanding import BoundRule
from .steps import KINDS, Program, Step, cut, programs_of, steps_of

if TYPE_CHECKING:
    from .explaining import Explanation

__all__ = ["Plan", "RuleUse", "Target", "renaming"]

_RULE = 1000  # characters of a rule, which may list thousands of choices
_MOST = 20  # lines of one kind that a plan's text takes
_WIDE = 200  # characters of a folded run of keys


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
    """A rule as the plan used it: its text, where it was read, and its bound form, if it has one."""

    text: str
    place: str | None
    bound: BoundRule | None = None
    is_rest: bool = False


@dataclass(frozen=True, repr=False)
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

    def without(self, keys: Collection[str]) -> Plan:
        """The plan that does not make these targets."""
        steps = [part for step in self.steps for part in cut(step, self.specs.keys() - keys)]
        specs = {key: spec for key, spec in self.specs.items() if key not in keys}
        return replace(self, steps=tuple(steps), specs=specs) if keys else self

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
        lines = [f"plan: {self._ends()} ({', '.join(self._kinds()) or 'no steps'})"]
        lines += self._rule_lines()
        for keys, title in self._settled():
            if keys:
                says = keys
                lines.append(f"  {title}")
                folded = fold_groups(keys, label=lambda k, says=says: str(says[k]))  # type: ignore[misc]
                lines += [
                    f"    {clipped(f.text, _WIDE)}  {clipped(_said(says[f.first]), _WIDE)}" for f in folded[:_MOST]
                ]
                lines += [f"    … and {len(folded) - _MOST:,} more"] if len(folded) > _MOST else []
        lines += [f"  {w.severity}: {w.headline}" for w in self.warnings[:_MOST]]
        lines += [f"  … and {len(self.warnings) - _MOST:,} more warnings"] if len(self.warnings) > _MOST else []
        lines.append(f"  cost: {self.cost}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        others = (f"{counted(len(keys), 'key')} {what}" for keys, what in self._settled() if keys)
        return brief("Plan", self._ends(), *self._kinds(), *others)

    def _settled(self) -> tuple[tuple[Mapping[str, Any], str], ...]:
        """What moves no data, by what was decided."""
        return (self.inits, "initialised"), (self.ties, "tied"), (self.dropped, "dropped"), (self.casts, "cast")

    def _ends(self) -> str:
        made = self.specs.keys() | self.ties.keys() | self.inits.keys()
        return f"{counted(len(self.source), 'source key')} -> {counted(len(made), 'target key')}"

    def _kinds(self) -> list[str]:
        """How many steps there are of each kind."""
        times: Counter[str] = Counter()
        for program, count in programs_of(self.steps):
            times[program.kind] += count
        return [f"{times[kind]} {kind}" for kind in KINDS if times[kind]]

    def _rule_lines(self) -> list[str]:
        """Each rule, and below it a line for each kind of step that it makes."""
        kind_of = {id(program): program.kind for program, _ in programs_of(self.steps)}
        by_rule: dict[tuple[int, ...], dict[str, list[Step]]] = {}
        for step in self.steps:
            kinds = by_rule.setdefault(step.rules, {})
            kinds.setdefault(kind_of[id(step.program)], []).append(step)
        lines = []
        for numbers, kinds in by_rule.items():
            lines.append("  " + "  then  ".join(clipped(self.uses[n].text, _RULE) for n in numbers))
            lines += [_kind_line(kind, kinds[kind]) for kind in KINDS if kind in kinds]
        return lines


def renaming(source: Mapping[str, TensorSpec], names: Mapping[str, str], text: str) -> Plan:
    """Return the plan that copies tensors to other names.

    >>> renaming({"m.w": TensorSpec([2], "F32")}, {"m.w": "w"}, "m.{k...} -> {k...}").steps[0].targets
    ('w',)

    Args:
        names: source key -> target key, for all that are copied; no two of them alike.
        text: what is said of them.
    """
    programs = {spec: Program.of((spec,), ()) for spec in set(source.values())}
    rows = zip(zip(names), zip(names.values()), map(programs.__getitem__, map(source.__getitem__, names)), repeat((0,)))
    specs = dict(zip(names.values(), map(source.__getitem__, names)))
    return Plan(tuple(steps_of(rows)), (RuleUse(text, None, is_rest=True),), specs, source=source)


def _kind_line(kind: str, steps: Sequence[Step]) -> str:
    """How many tensors steps of one kind read and make, with the first as an example."""
    sources = len(set(chain.from_iterable(map(attrgetter("sources"), steps))))
    targets = sum(map(len, map(attrgetter("targets"), steps)))
    shown = steps[0]
    example, made = clipped(_few(shown.sources)), clipped(_few(shown.targets))
    return f"    {sources} -> {targets} {kind}  {example} -> {made} {shown.program.outputs[0]}"


def _few(keys: Sequence[str]) -> str:
    """The first keys, as many as a line can take."""
    count = next((n for n in (3, 2) if n <= len(keys) and sum(map(len, keys[:n])) < 64), 1)
    return ", ".join(keys[:count]) + (", …" if count < len(keys) else "")


def _said(value: Any) -> str:
    return " -> ".join(value) if isinstance(value, tuple) else str(value)
