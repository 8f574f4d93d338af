"""Which keys a pattern matches, found once for each digit template instead of once for each key.

Keys that differ in numbers only (`layers.0.w`, `layers.1.w`) form a group, and `layers.0.w`, every number written `0`,
is its template. A pattern, its own numbers written `0` as well, is matched against the template; captures are read off
by position, as columns over all keys, and the numbers that the pattern spells (`w1`, `layers.0.`) are compared column
by column. A pattern whose pieces may cut a number in two is matched key by key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..language.grouping import KeyGroup, template
from ..language.keys import Capture, KeyPattern, Literal

__all__ = ["Column", "Matches", "match_group"]

_DIGITS = re.compile(r"[0-9]+")
Column = str | list[str]
"""The values of one capture: one text for all keys, or one a key."""


@dataclass(slots=True)
class Matches:
    """Keys that a pattern matches, with a column of values for each capture."""

    keys: list[str]
    columns: dict[str, Column]

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Each key with its own bindings."""
        names = list(self.columns)
        wide = [c if isinstance(c, list) else [c] * len(self.keys) for c in self.columns.values()]
        for key, *values in zip(self.keys, *wide):
            yield key, dict(zip(names, values))

    def where(self, keep: Sequence[bool]) -> Matches:
        """Those of the keys for which `keep` is true."""
        if all(keep):
            return self
        columns = {n: c if isinstance(c, str) else [v for v, k in zip(c, keep) if k] for n, c in self.columns.items()}
        return Matches([key for key, k in zip(self.keys, keep) if k], columns)


def match_group(group: KeyGroup, pattern: KeyPattern) -> Matches | None:
    """Those keys of a group that match, or None.

    Raises:
        RecipeError: a key can be read in two ways.
    """
    if not pattern.captures:
        return Matches([pattern.prefix], {}) if pattern.prefix in group.keys else None
    if _cuts_numbers(pattern):
        return _one_by_one(group, pattern)
    loose = _loose(pattern)
    readings = loose.readings(group.template)
    if len(readings) > 1:
        return _one_by_one(group, pattern)  # the numbers decide, or it is ambiguous indeed
    if not readings:
        return None
    matches = Matches(group.keys, {})
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


def _one_by_one(group: KeyGroup, pattern: KeyPattern) -> Matches | None:
    keys: list[str] = []
    rows: list[dict[str, str]] = []
    for key in group.keys:
        found = pattern.match(key)
        if found is not None:
            keys.append(key)
            rows.append(found)
    return Matches(keys, {name: [r[name] for r in rows] for name in rows[0]}) if rows else None


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


def _restricted(matches: Matches, pattern: KeyPattern) -> Matches | None:
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
