"""A plan as people see it: on one line, as a page of text, and in a notebook; short whatever its size."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

from ..language.folding import fold_groups
from ..wording import brief, clipped, counted
from .costing import Cost
from .record import PlanRecord
from .steps import KINDS, Step, programs_of

__all__ = ["plan_brief", "plan_ends", "plan_html", "plan_kinds", "plan_text"]

_RULE = 1000  # characters of a rule, which may list thousands of choices
_RULES = 40  # rules of a plan
_MOST = 20  # lines of one kind
_WIDE = 200  # characters of a folded run of keys


def plan_text(plan: PlanRecord, cost: Cost) -> str:
    """Return the plan on a page: what no rule moves, each rule with what it makes, and the cost."""
    lines = [f"plan: {plan_ends(plan)} ({', '.join(plan_kinds(plan)) or 'no steps'})"]
    for keys, title in _settled(plan):
        if keys:
            lines.append(f"  {title}")
            lines += [f"    {text}  {said}".rstrip() for text, said in _folded(keys)]
    for rule, kinds in _rules(plan):
        lines.append(f"  {rule}")
        lines += [f"    {_kind_text(kind, steps)}" for kind, steps in kinds.items()]
    lines += _more(len(_by_rules(plan)), _RULES, "rules")
    for w in plan.warnings[:_MOST]:
        lines += [f"  {w.severity}: {w.headline}", *([f"    help: {w.help}"] if w.remedies and w.help else ())]
    lines += _more(len(plan.warnings), _MOST, "warnings")
    lines.append(f"  cost: {cost}")
    return "\n".join(lines)


def plan_brief(plan: PlanRecord) -> str:
    """Return the plan on one line."""
    others = (f"{counted(len(keys), 'key')} {what}" for keys, what in _settled(plan) if keys)
    return brief("Plan", plan_ends(plan), *plan_kinds(plan), *others)


def plan_html(plan: PlanRecord, cost: Cost) -> str:
    """Return the plan for a notebook: a row for each rule, and what is settled otherwise in parts that unfold."""
    rows = [
        _row(rule if n == 0 else "", f"{counted(len(steps), 'step')}, {kind}", _example(steps))
        for rule, kinds in _rules(plan)
        for n, (kind, steps) in enumerate(kinds.items())
    ]
    rows += [_row(text.strip(), "", "") for text in _more(len(_by_rules(plan)), _RULES, "rules")]
    parts = [f"<b>plan: {html.escape(plan_ends(plan))}</b>"]
    if rows:
        parts.append(f"<table>{_row('rule', 'steps', 'such as', 'th')}{''.join(rows)}</table>")
    for keys, title in _settled(plan):
        if keys:
            lines = "".join(_row(text, said, "") for text, said in _folded(keys))
            head = f"{counted(len(keys), 'key')} {title}"
            parts.append(f"<details><summary>{head}</summary><table>{lines}</table></details>")
    parts += [f"<div>{w.severity}: {html.escape(w.headline)}</div>" for w in plan.warnings[:_MOST]]
    parts += [f"<div>{text.strip()}</div>" for text in _more(len(plan.warnings), _MOST, "warnings")]
    return "".join([*parts, f"<div>cost: {html.escape(str(cost))}</div>"])


def _row(one: str, two: str, three: str, tag: str = "td") -> str:
    cells = (
        f"<{tag} style='text-align:left'>{html.escape(clipped(text, _RULE))}</{tag}>" for text in (one, two, three)
    )
    return f"<tr>{''.join(cells)}</tr>"


def _settled(plan: PlanRecord) -> tuple[tuple[Mapping[str, Any], str], ...]:
    """What moves no data, by what was decided."""
    return (plan.dropped, "dropped"), (plan.inits, "initialised"), (plan.ties, "tied"), (plan.casts, "cast")


def _folded(keys: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Runs of keys of which the same is said, and what that is; the first of very many."""
    label: Callable[[str], str] = lambda key: str(keys[key])  # noqa: E731
    folded = fold_groups(keys, label=label)
    said = [(f.text, _said(keys[f.first])) for f in folded[:_MOST]]
    rows = [(clipped(text, _WIDE), clipped(why, _WIDE) if why != text else "") for text, why in said]
    return [*rows, (f"… and {len(folded) - _MOST:,} more", "")] if len(folded) > _MOST else rows


def _said(value: Any) -> str:
    return " -> ".join(value) if isinstance(value, tuple) else str(value)


def plan_ends(plan: PlanRecord) -> str:
    """How many keys there are on either side."""
    made = plan.specs.keys() | plan.ties.keys() | plan.inits.keys()
    return f"{counted(len(plan.source), 'source key')} -> {counted(len(made), 'target key')}"


def plan_kinds(plan: PlanRecord) -> list[str]:
    """How many steps there are of each kind."""
    times: Counter[str] = Counter()
    for program, count in programs_of(plan.steps):
        times[program.kind] += count
    return [f"{times[kind]} {kind}" for kind in KINDS if times[kind]]


def _by_rules(plan: PlanRecord) -> dict[tuple[int, ...], list[Step]]:
    found: dict[tuple[int, ...], list[Step]] = {}
    for step in plan.steps:
        found.setdefault(step.rules, []).append(step)
    return found


def _rules(plan: PlanRecord) -> list[tuple[str, dict[str, list[Step]]]]:
    """The first rules, each with its steps by their kind."""
    kind_of = {id(program): program.kind for program, _ in programs_of(plan.steps)}
    rules = []
    for numbers, steps in list(_by_rules(plan).items())[:_RULES]:
        kinds: dict[str, list[Step]] = {kind: [] for kind in KINDS}
        for step in steps:
            kinds[kind_of[id(step.program)]].append(step)
        text = "  then  ".join(clipped(plan.uses[n].text, _RULE) for n in numbers)
        rules.append((text, {kind: some for kind, some in kinds.items() if some}))
    return rules


def _more(count: int, most: int, what: str) -> list[str]:
    return [f"  … and {count - most:,} more {what}"] if count > most else []


def _kind_text(kind: str, steps: Sequence[Step]) -> str:
    """How many tensors steps of one kind read and make, with the first as an example."""
    sources = len(set(chain.from_iterable(map(attrgetter("sources"), steps))))
    targets = sum(map(len, map(attrgetter("targets"), steps)))
    return f"{sources} -> {targets} {kind}  {_example(steps)}"


def _example(steps: Sequence[Step]) -> str:
    shown = steps[0]
    return f"{clipped(_few(shown.sources))} -> {clipped(_few(shown.targets))} {shown.program.outputs[0]}"


def _few(keys: Sequence[str]) -> str:
    """The first keys, as many as a line can take."""
    count = next((n for n in (3, 2) if n <= len(keys) and sum(map(len, keys[:n])) < 64), 1)
    return ", ".join(keys[:count]) + (", …" if count < len(keys) else "")
