"""Which keys a pattern matches, found once for each digit template instead of once for each key.

Keys that differ in numbers only (`layers.0.w`, `layers.1.w`) form a group, and `layers.0.w`, every number written `0`,
is its template. A pattern, its own numbers written `0` as well, is matched against the template; captures are read off
by position, as columns over all keys, and the numbers that the pattern spells (`w1`, `layers.0.`) are compared column
by column. A pattern whose pieces may cut a number in two is matched key by key.

`base.{m}.weight, lo.{m}.up, lo.{m}.down -> {m}.weight` joins tensors of two files. One file may spell the names of a
`[names]` table as its sources do and the other as its targets do, so the keys decide, term by term (`respelled`). A
side of one term has no such choice: a source is spelled by the table's sources, a target by its targets.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..errors import Diagnostic, RecipeError
from ..language.grouping import KeyGroup, group_keys, template
from ..language.keys import Capture, KeyPattern, Literal
from ..language.rules import Term
from .expanding import ResolvedRule, Stage

__all__ = ["Column", "MatchedColumns", "match_group", "respelled"]

_DIGITS = re.compile(r"[0-9]+")
Column = str | list[str]
"""The values of one capture: one text for all keys, or one a key."""


@dataclass(slots=True)
class MatchedColumns:
    """Keys that a pattern matches, with a column of values for each capture."""

    keys: list[str]
    columns: dict[str, Column]

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Each key with its own bindings."""
        names = list(self.columns)
        wide = [c if isinstance(c, list) else [c] * len(self.keys) for c in self.columns.values()]
        for key, *values in zip(self.keys, *wide):
            yield key, dict(zip(names, values))

    def where(self, keep: Sequence[bool]) -> MatchedColumns:
        """Those of the keys for which `keep` is true."""
        if all(keep):
            return self
        columns = {n: c if isinstance(c, str) else [v for v, k in zip(c, keep) if k] for n, c in self.columns.items()}
        return MatchedColumns([key for key, k in zip(self.keys, keep) if k], columns)


def match_group(group: KeyGroup, pattern: KeyPattern) -> MatchedColumns | None:
    """Those keys of a group that match, or None.

    Raises:
        RecipeError: a key can be read in two ways.
    """
    if not pattern.captures:
        return MatchedColumns([pattern.prefix], {}) if pattern.prefix in group.keys else None
    if _cuts_numbers(pattern):
        return _one_by_one(group, pattern)
    loose = _loose(pattern)
    readings = loose.readings(group.template)
    if len(readings) > 1:
        return _one_by_one(group, pattern)  # the numbers decide, or it is ambiguous indeed
    if not readings:
        return None
    matches = MatchedColumns(group.keys, {})
    spelled: list[str] = []
    slots: list[list[str]] = []
    at = 0
    for piece, open_piece in zip(pattern.pieces, loose.pieces):
        start = at
        at += len(open_piece.text) if isinstance(open_piece, Literal) else len(readings[0][open_piece.name])
        if isinstance(piece, Capture):
            matches.columns[piece.name] = _column(group, (start, at))
            continue
        if numbers := _DIGITS.findall(piece.text):
            spelled += numbers
            slots += [slot for slot, (a, b) in zip(group.slots, group.spans) if start <= a and b <= at]
    if spelled:
        matches = matches.where([row == tuple(spelled) for row in zip(*slots)])
    return _restricted(matches, pattern)


def _one_by_one(group: KeyGroup, pattern: KeyPattern) -> MatchedColumns | None:
    keys: list[str] = []
    rows: list[dict[str, str]] = []
    for key in group.keys:
        found = pattern.match(key)
        if found is not None:
            keys.append(key)
            rows.append(found)
    return MatchedColumns(keys, {name: [r[name] for r in rows] for name in rows[0]}) if rows else None


def _cuts_numbers(pattern: KeyPattern) -> bool:
    """Whether a number of a key may fall into two pieces, or two captures must agree."""
    names = [c.name for c in pattern.captures]
    if len(set(names)) < len(names):
        return True
    edges = [(_edge(piece, 0), _edge(piece, -1)) for piece in pattern.pieces]
    return any(ends is not False and starts is not False for (_, ends), (starts, _) in pairwise(edges))


def _edge(piece: Literal | Capture, at: int) -> bool | None:
    """Whether a piece has a digit at its edge; None for a capture, which may."""
    if isinstance(piece, Literal):
        return piece.text[at].isdigit()
    if piece.choices is not None and piece.terms is None:
        return any(not c or c[at].isdigit() for c in piece.choices)
    return None


def _loose(pattern: KeyPattern) -> KeyPattern:
    """The pattern over templates: numbers as `0`, and no conditions on numbers."""
    pieces: list[Literal | Capture] = []
    for piece in pattern.pieces:
        if isinstance(piece, Literal):
            pieces.append(Literal(template(piece.text)))
        elif piece.choices is not None and piece.terms is None:
            pieces.append(replace(piece, choices=tuple(dict.fromkeys(map(template, piece.choices)))))
        else:
            pieces.append(Capture(piece.name, rest=piece.rest))
    return KeyPattern(tuple(pieces))


def _column(group: KeyGroup, span: tuple[int, int]) -> Column:
    start, end = span
    inside = [i for i, (a, b) in enumerate(group.spans) if a >= start and b <= end]
    if not inside:
        return group.template[start:end]
    if span == (0, len(group.template)):
        return group.keys
    if len(inside) == 1 and group.spans[inside[0]] == span:
        return group.slots[inside[0]]
    parts: list[Column] = []
    at = start
    for i in inside:
        a, b = group.spans[i]
        parts += [group.template[at:a], group.slots[i]]
        at = b
    parts.append(group.template[at:end])
    wide = [p if isinstance(p, list) else [p] * len(group.keys) for p in parts]
    return ["".join(row) for row in zip(*wide)]


def _restricted(matches: MatchedColumns, pattern: KeyPattern) -> MatchedColumns | None:
    """The matches whose numbers meet the pattern's conditions, with sums solved for their captures."""
    for capture in pattern.captures:
        column = matches.columns[capture.name]
        if not matches.keys or (capture.choices is None and not capture.numeric):
            continue
        if isinstance(column, str):
            value = capture.value_of(column)
            if value is None:
                return None
            matches.columns[capture.name] = value
            continue
        meaning = {text: capture.value_of(text) for text in set(column)}
        values = [meaning[text] for text in column]
        matches = matches.where([v is not None for v in values])
        matches.columns[capture.name] = [v for v in values if v is not None]
    return matches if matches.keys else None


Table = Mapping[str, str]


def respelled(stage: Stage, source: Collection[str], target: Collection[str], problems: list[Diagnostic]) -> Stage:
    """Return the stage with every joined term in the spelling of its keys.

    A term keeps the spelling of its own side where keys match it, or where none match the other spelling. It takes the
    other spelling where all matching keys have it. The whole term has one spelling, for all of its tables.

    Args:
        source, target: the keys of each side; the target's are empty where there is no target.
        problems: receives an error for each term whose keys mix both spellings.
    """
    joined = [any(len(side) > 1 for side in (b.rule.sources, b.rule.targets)) and bool(b.tables) for b in stage.rules]
    if not any(joined):
        return stage
    groups = group_keys(source), group_keys(target)
    rules = [_bound(b, groups, problems) if many else b for b, many in zip(stage.rules, joined)]
    return replace(stage, rules=rules)


def _bound(
    bound: ResolvedRule, groups: tuple[list[KeyGroup], list[KeyGroup]], problems: list[Diagnostic]
) -> ResolvedRule:
    back = {name: {target: source for source, target in table.items()} for name, table in bound.tables.items()}
    sides = ((bound.rule.sources, groups[0], bound.tables), (bound.rule.targets, groups[1], back))
    sources, targets = (
        tuple(_term(t, near, tables, bound, problems) for t in terms) if len(terms) > 1 else terms
        for terms, near, tables in sides
    )
    return replace(bound, rule=replace(bound.rule, sources=sources, targets=targets))


def _term(
    term: Term,
    groups: Sequence[KeyGroup],
    tables: Mapping[str, Table],
    bound: ResolvedRule,
    problems: list[Diagnostic],
) -> Term:
    """The term in the spelling of its keys; `tables` lead from the spelling that it has to the other one."""
    other = _turned(term.pattern, tables)
    if other is None:
        return term
    try:
        own_keys, other_keys = _claimed(term.pattern, groups), _claimed(other, groups)
    except RecipeError:
        return term  # a key can be read in two ways, which is reported where keys are handed out
    if own_keys < other_keys:
        return replace(term, pattern=other)
    if own_keys and other_keys - own_keys and not _complete(term.pattern, own_keys):
        problems.append(_mixed(bound, term, min(own_keys - other_keys), min(other_keys - own_keys)))
    return term


def _turned(pattern: KeyPattern, tables: Mapping[str, Table]) -> KeyPattern | None:
    """The pattern in the other spelling; None where it captures no table, or the other spelling is not one to one."""
    pieces: list[Literal | Capture] = []
    for piece in pattern.pieces:
        if isinstance(piece, Capture) and piece.name in tables and piece.choices is not None and piece.terms is None:
            choices = tuple(tables[piece.name].get(choice, choice) for choice in piece.choices)
            if len(set(choices)) < len(choices):
                return None
            piece = replace(piece, choices=choices)
        pieces.append(piece)
    return KeyPattern(tuple(pieces)) if tuple(pieces) != pattern.pieces else None


def _claimed(pattern: KeyPattern, groups: Sequence[KeyGroup]) -> frozenset[str]:
    """The keys that a pattern matches.

    Raises:
        RecipeError: a key can be read in two ways.
    """
    head, tail = template(pattern.prefix).rstrip("0"), template(pattern.suffix).lstrip("0")
    near = [g for g in groups if g.template.startswith(head) and g.template.endswith(tail)]
    return frozenset(key for group in near if (found := match_group(group, pattern)) for key in found.keys)


def _complete(pattern: KeyPattern, keys: Collection[str]) -> bool:
    """Whether the keys have every choice of the pattern."""
    readings = [pattern.readings(key)[0] for key in keys]
    return all({r[c.name] for r in readings} >= set(c.choices) for c in pattern.firsts if c.choices is not None)


def _mixed(bound: ResolvedRule, term: Term, own: str, other: str) -> Diagnostic:
    names = ", ".join(f"[names.{name}]" for name in bound.tables)
    return Diagnostic(
        "mixed-names",
        f"'{own}' and '{other}' spell {names} in two ways, and one term has one spelling",
        place=bound.rule.place,
        notes=(bound.text,),
        help="write a rule for the keys of each spelling, with its choices: {m:conv_in,conv_out}",
    )
