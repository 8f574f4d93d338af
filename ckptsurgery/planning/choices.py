"""Misspelt choices: those of a rule that match no key, and entries of tables of dims that no choice or key picks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ..errors import Diagnostic, Remedy
from ..language.dims import Dims
from ..language.keys import is_index
from .expanding import ResolvedRule
from .matching import MatchedColumns
from .rule_ops import OpsOfRule

__all__ = ["unknown_entries", "unused_choices"]


def unused_choices(
    rules: Sequence[ResolvedRule], terms: Sequence[Sequence[Sequence[MatchedColumns]]]
) -> Iterator[Diagnostic]:
    """Yield a problem for each choice that matches no key; a table of `[names]` may spread over several rules."""
    shared: dict[tuple[str, frozenset[str]], set[str]] = {}
    places: dict[tuple[str, frozenset[str]], ResolvedRule] = {}
    for bound, matched in zip(rules, terms):
        for term, found in zip(bound.rule.sources, matched):
            for capture in term.pattern.firsts:
                if capture.choices is None or bound.rule.optional or not found:
                    continue  # of gathered choices a missing one is told with its keys
                seen = {v for m in found for v in _texts(m.columns[capture.name])}
                if capture.name in bound.tables:
                    # The spelling is a term's own; what is seen of a table, and what not, is the table's.
                    back = _back(capture.choices, bound.tables[capture.name])
                    of = capture.name, frozenset(back.get(c, c) for c in capture.choices)
                    shared.setdefault(of, set()).update(back.get(v, v) for v in seen)
                    places[of] = bound
                elif capture.name not in bound.signature.gathered:
                    yield from _unused(capture.name, capture.choices, seen, bound)
    for (name, choices), seen in shared.items():
        listed = [c for c in places[(name, choices)].tables[name] if c in choices]
        yield from _unused(name, listed, seen, places[(name, choices)])


def _unused(name: str, choices: Sequence[str], seen: Collection[str], bound: ResolvedRule) -> Iterator[Diagnostic]:
    for choice in choices:
        if choice not in seen:
            yield Diagnostic(
                "unused-choice",
                f"choice {choice!r} of {{{name}}} matches no source key",
                place=bound.rule.place,
                notes=(bound.text,),
                remedies=(Remedy("rules", {bound.text: f"? {bound.text}"}, "may match less", kind="instead"),),
                advice="or is the choice misspelt?",
            )


def unknown_entries(rules: Sequence[ResolvedRule], made: Sequence[OpsOfRule]) -> Iterator[Diagnostic]:
    """Yield a problem for each table of dims with an entry that no choice and no captured value picks."""
    for bound, name, table, known in _tables((b, n, choices) for b in rules for n, choices in b.ragged()):
        # Sizes of this run may be meant for another stage, so all stages together are asked for them.
        yield from _unknown("a size", bound, name, [e for e in table if e not in bound.given(name)], known)
    for bound, name, table, known in _tables((ops.bound, n, picked) for ops in made for n, picked in ops.picks()):
        yield from _unknown("a value", bound, name, list(table), known)


def _tables(
    asked: Iterable[tuple[ResolvedRule, str, Iterable[str]]],
) -> Iterator[tuple[ResolvedRule, str, Mapping[str, Any], set[str]]]:
    """Yield each table of dims once: a rule that reads it, its name, itself, and what all its rules pick from it."""
    tables: dict[tuple[int, str], tuple[ResolvedRule, str, Mapping[str, Any], set[str]]] = {}
    for bound, name, known in asked:
        owner: Dims | None = bound.dims
        while owner is not None and name not in owner.values:
            owner = owner.outer
        table = owner.values[name] if owner is not None else None
        if isinstance(table, Mapping):
            tables.setdefault((id(owner), name), (bound, name, table, set()))[3].update(known)
    return iter(tables.values())


def _unknown(
    gives: str, bound: ResolvedRule, name: str, entries: Sequence[str], known: Collection[str]
) -> Iterator[Diagnostic]:
    """Yield a problem for the first entry that cannot be picked."""
    entry = next((entry for entry in entries if not _is_known(entry, known)), None)
    if entry is None or not known:
        return
    listed = sorted(known)
    near = get_close_matches(entry, listed, 1)
    yield Diagnostic(
        "unknown-choice",
        f"dims.{name} gives {gives} for {entry!r}, which is no choice of any rule",
        place=bound.rule.place,
        notes=(bound.text,),
        remedies=(Remedy("dims", {entry: near}, kind="instead"),) if near else (),
        advice=f"one of: {', '.join(listed[:12])}{', …' if len(listed) > 12 else ''}",
    )


def _is_known(entry: str, known: Collection[str]) -> bool:
    """Whether an entry can be picked: `*` by all, an index where indices pick (a table may cover more layers)."""
    return entry == "*" or entry in known or (is_index(entry) and any(map(is_index, known)))


def _back(choices: Sequence[str], table: Mapping[str, str]) -> dict[str, str]:
    """Target spelling -> source spelling where a term spells a table as its targets; else nothing to change."""
    return {} if set(choices) <= table.keys() else {target: source for source, target in table.items()}


def _texts(column: Any) -> set[str]:
    return {column} if isinstance(column, str) else set(column)
