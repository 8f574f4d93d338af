"""How one key is accounted for: the rule, its captures, the sources, and the shapes on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import Diagnostic, PlanError
from ..notebook_view import TextInNotebooks
from ..ops.base import Specs
from ..wording import brief, clipped, counted
from .claims import near_rules
from .record import PlanRecord
from .steps import ApplyOp, Make, Move, Parallel, Select, Step

__all__ = ["Explanation", "explain", "on_the_way"]

_OP = 200  # characters of an op, which may hold a long list


@dataclass(frozen=True, repr=False)
class Explanation(TextInNotebooks):
    """What becomes of a key, or where it comes from; `str` of it is for people.

    Args:
        key: the key asked for.
        role: "source", "target", or what was decided: "dropped", "initialised", "tied", "proved", "unknown".
        rules: the rules that name it, one a stage.
        captures: the values that the first rule binds.
        sources, targets: both ends of its step.
        shapes: what arrives, what each instruction makes of it.
        lines: all of it as text.
    """

    key: str
    role: str
    lines: tuple[str, ...]
    rules: tuple[str, ...] = ()
    captures: tuple[tuple[str, str], ...] = ()
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def __repr__(self) -> str:
        ends = f"{counted(len(self.sources), 'source')} -> {counted(len(self.targets), 'target')}"
        return brief("Explanation", self.key, self.role, ends if self.sources else "", *self.rules)

    def to_json(self) -> dict[str, Any]:
        """The explanation as plain data."""
        return {
            "key": self.key,
            "role": self.role,
            "rules": list(self.rules),
            "captures": dict(self.captures),
            "sources": list(self.sources),
            "targets": list(self.targets),
            "shapes": list(self.shapes),
        }


def explain(plan: PlanRecord, key: str) -> Explanation:
    """Explain a source or a target key.

    Raises:
        PlanError: the plan knows no such key; rules and keys that nearly match are named.
    """
    for step in plan.steps:
        if key in step.targets:
            return _of_step(plan, key, step, "target")
    if key in plan.ties:
        return Explanation(key, "tied", (f"{key}", f"  shares its tensor with {plan.ties[key]}"))
    if key in plan.inits:
        return Explanation(key, "initialised", (f"{key}", f"  initialised by {plan.inits[key]}"))
    for step in plan.steps:
        if key in step.sources:
            return _of_step(plan, key, step, "source")
    if key in plan.dropped:
        return Explanation(key, "dropped", (key, f"  dropped by {plan.dropped[key]}"))
    proof = dict(plan.proofs).get(key)
    if proof is not None:
        return Explanation(key, "proved", (key, f"  proved equal to {proof}, then left out"))
    raise PlanError(unknown_key(plan, key))


def unknown_key(plan: PlanRecord, key: str) -> Diagnostic:
    """The diagnostic for a key that no rule names, with the rules that nearly do."""
    left = [(u.text, t.pattern) for u in plan.uses if u.bound for t in u.bound.rule.sources]
    right = [(u.text, t.pattern) for u in plan.uses if u.bound for t in u.bound.rule.targets]
    near = dict.fromkeys([*near_rules(key, left), *near_rules(key, right)])
    notes = tuple(f"nearly: {text}  ({why})" for text, why in near)
    return Diagnostic(
        "unknown-key",
        f"the plan has no key {key!r}, and no rule names it",
        notes=notes,
        help="a source key and a target key can be explained",
    )


def _of_step(plan: PlanRecord, key: str, step: Step, role: str) -> Explanation:
    rules = [plan.uses[n] for n in step.rules]
    captures = _captures(plan, key, step, role)
    ends = zip(step.sources, step.program.inputs), zip(step.targets, step.program.outputs)
    sources, targets = ([f"{k}  {s}" for k, s in end] for end in ends)
    shapes = tuple(on_the_way(step))
    lines = [key]
    for use in rules:
        place = f"  ({use.place})" if use.place else ""
        lines.append(f"  {'rest' if use.is_rest else 'rule'}      {use.text}{place}")
    if captures:
        lines.append("  captures  " + ", ".join(f"{n} = {v}" for n, v in captures))
    lines += _listed("reads", sources) + [f"  {'then':<9} {s}" for s in shapes] + _listed("makes", targets)
    for made in step.targets:
        if made in plan.casts:
            lines.append(f"  cast      {plan.casts[made][0]} -> {plan.casts[made][1]}, as the target wants")
    ties = [alias for alias, base in plan.ties.items() if base in step.targets]
    lines += [f"  tied      {alias} shares it" for alias in ties]
    return Explanation(
        key, role, tuple(lines), tuple(u.text for u in rules), captures, step.sources, step.targets, shapes
    )


def _listed(title: str, items: list[str]) -> list[str]:
    shown = items[:6] + ([f"… {len(items)} in all"] if len(items) > 6 else [])
    return [f"  {title if n == 0 else '':<9} {item}" for n, item in enumerate(shown)]


def _captures(plan: PlanRecord, key: str, step: Step, role: str) -> tuple[tuple[str, str], ...]:
    for use in (plan.uses[n] for n in (step.rules if role == "source" else reversed(step.rules))):
        if use.bound is None:
            continue
        rule = use.bound.rule
        for term in rule.sources if role == "source" else rule.targets:
            readings = term.pattern.readings(key)
            if readings:
                return tuple(readings[0].items())
    return ()


def on_the_way(step: Step) -> Iterator[str]:
    """Each instruction of a step with its result, as text."""
    stages = step.program.specs_on_the_way()
    for instruction, before, after in zip(step.program.instructions, stages, stages[1:]):
        match instruction:
            case Move(layout) if layout.copies is not None and before == after:
                continue
            case Move(layout):
                yield f"rearranged in {len(layout.pieces)} piece{'s' * (len(layout.pieces) > 1)} to {_shown(after)}"
            case ApplyOp(op):
                yield f"{clipped(str(op), _OP)} gives {_shown(after)}"
            case Make(op):
                yield f"drawn: {op} gives {_shown(after[-1:])}"
            case Select(indices):
                kept = f", {len(set(indices))} of {len(before)} kept" if len(set(indices)) < len(before) else ""
                yield f"handed on as {_shown(after)}{kept}"
            case Parallel(programs):
                yield f"{len(programs)} programs side by side give {_shown(after)}"


def _shown(specs: Specs) -> str:
    texts = [str(s) for s in specs[:3]]
    return ", ".join(texts) + (f", … ({len(specs)} in all)" if len(specs) > 3 else "")
