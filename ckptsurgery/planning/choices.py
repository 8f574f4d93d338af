"""Misspelt choices: those of a rule that match no key, and entries of tables of dims that no choice or key picks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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
    sizes = [(bound, name, set(choices)) for bound in rules for name, choices in bound.ragged()]
    values = [(ops.bound, name, picked) for ops in made for name, picked in ops.picks()]
    for asked in (sizes, values):
        tables: dict[tuple[int, str], tuple[ResolvedRule, Mapping[str, Any], set[str]]] = {}
        for bound, name, known in asked:
            owner: Dims | None = bound.dims
            while owner is not None and name not in owner.values:
                owner = owner.outer
            table = owner.values[name] if owner is not None else None
            if isinstance(table, Mapping):
                tables.setdefault((id(owner), name), (bound, table, set()))[2].update(known)
        for (_, name), (bound, table, known) in tables.items():
            # Sizes of this run may be meant for another stage, so all stages together are asked for them.
            elsewhere = bound.given(name) if asked is sizes else ()
            entry = next((e for e in table if not _is_known(e, known) and e not in elsewhere), None)
            if entry is not None and known:
                gives = "a size" if asked is sizes else "a value"
                yield _unknown(f"dims.{name} gives {gives} for {entry!r}", entry, sorted(known), bound)


def _is_known(entry: str, known: Collection[str]) -> bool:
    """Whether an entry can be picked: `*` by all, an index where indices pick (a table may cover more layers)."""
    return entry == "*" or entry in known or (is_index(entry) and any(map(is_index, known)))


def _unknown(gives: str, entry: str, known: Sequence[str], bound: ResolvedRule) -> Diagnostic:
    near = get_close_matches(entry, known, 1)
    return Diagnostic(
        "unknown-choice",
        f"{gives}, which is no choice of any rule",
        place=bound.rule.place,
        notes=(bound.text,),
        remedies=(Remedy("dims", {entry: near}, kind="instead"),) if near else (),
        advice=f"one of: {', '.join(known[:12])}{', …' if len(known) > 12 else ''}",
    )


def _back(choices: Sequence[str], table: Mapping[str, str]) -> dict[str, str]:
    """Target spelling -> source spelling where a term spells a table as its targets; else nothing to change."""
    return {} if set(choices) <= table.keys() else {target: source for source, target in table.items()}


def _texts(column: Any) -> set[str]:
    return {column} if isinstance(column, str) else set(column)
