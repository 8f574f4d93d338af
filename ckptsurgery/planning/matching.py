"""Which keys a pattern matches, found once for each digit template instead of once for each key.

Keys that differ in numbers only (`layers.0.w`, `layers.1.w`) form a group; a pattern is matched against one of them, and
the captures of all others are read off by position, as columns. Numbers that patterns themselves spell (`w1`,
`layers.0.`) stay in the template. A pattern whose captures may cut a number in two is matched key by key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..errors import RecipeError
from ..language.keys import Capture, KeyPattern, Literal

__all__ = ["Column", "KeyGroup", "Matches", "group_keys", "match_group", "spelled_numbers"]

_DIGITS = re.compile(r"\d+")
Column = str | list[str]
"""The values of one capture: one text for all keys, or one a key."""


@dataclass(slots=True)
class KeyGroup:
    """Keys of one template, and where their numbers stand.

    Args:
        keys: in the checkpoint's order.
        slots: for each number that differs, its text in every key.
        spans: position of each of these numbers in the first key.
    """

    keys: list[str]
    slots: list[list[str]]
    spans: list[tuple[int, int]]


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


def spelled_numbers(patterns: Iterable[KeyPattern]) -> frozenset[str]:
    """The numbers that stand in patterns as text."""
    found: set[str] = set()
    for pattern in patterns:
        for piece in pattern.pieces:
            texts = (piece.text,) if isinstance(piece, Literal) else piece.choices or ()
            for text in texts:
                found.update(_DIGITS.findall(text))
    return frozenset(found)


def group_keys(keys: Iterable[str], numbers: frozenset[str]) -> list[KeyGroup]:
    """Group keys by their digit template.

    >>> [(g.keys, g.slots) for g in group_keys(["a.0", "a.1", "b"], frozenset())]
    [(['a.0', 'a.1'], [['0', '1']]), (['b'], [])]
    >>> [g.keys for g in group_keys(["w1.0", "w1.5", "w2.5"], frozenset({"1", "2"}))]
    [['w1.0', 'w1.5'], ['w2.5']]
    """
    templates: dict[str, list[str]] = {}
    for key in keys:
        templates.setdefault(_DIGITS.sub("\0", key), []).append(key)
    groups: list[KeyGroup] = []
    for members in templates.values():
        found = [_DIGITS.findall(key) for key in members]
        if not numbers or not any(numbers.intersection(row) for row in found):
            groups.append(_group(members, found, [True] * len(found[0])))
            continue
        parts: dict[tuple[str | None, ...], list[int]] = {}
        for index, row in enumerate(found):
            parts.setdefault(tuple(n if n in numbers else None for n in row), []).append(index)
        for fixed, indices in parts.items():
            free = [f is None for f in fixed]
            groups.append(_group([members[i] for i in indices], [found[i] for i in indices], free))
    return groups


def _group(keys: list[str], rows: list[list[str]], free: list[bool]) -> KeyGroup:
    spans = [m.span() for m, f in zip(_DIGITS.finditer(keys[0]), free) if f]
    columns = [list(c) for c, f in zip(zip(*rows), free) if f] if rows[0] else []
    return KeyGroup(keys, columns, spans)


def match_group(group: KeyGroup, pattern: KeyPattern) -> Matches | None:
    """Those keys of a group that match, or None.

    Raises:
        RecipeError: a key can be read in two ways.
    """
    first = group.keys[0]
    if not pattern.captures:
        hits = [k for k in group.keys if k == pattern.prefix] if len(group.keys) > 1 else group.keys
        return Matches(hits, {}) if hits and hits[0] == pattern.prefix else None
    if _cuts_numbers(pattern):
        return _one_by_one(group, pattern)
    loose = _loose(pattern)
    readings = loose.readings(first)
    if len(readings) > 1 and loose is not pattern:
        return _one_by_one(group, pattern)
    if len(readings) > 1:
        raise RecipeError(pattern.ambiguity(first, readings))
    if not readings:
        return None
    columns = {name: _column(group, span) for name, span in _spans(loose, readings[0]).items()}
    return _restricted(Matches(group.keys, columns), pattern)


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
    for a, b in zip(pattern.pieces, pattern.pieces[1:]):
        ends = _edge(a, -1)
        starts = _edge(b, 0)
        if (ends is None or starts is None) and not (ends is False or starts is False):
            return True
        if ends and starts:
            return True
    return False


def _edge(piece: Literal | Capture, at: int) -> bool | None:
    """Whether a piece has a digit at its edge; None for a capture, which may."""
    if isinstance(piece, Literal):
        return piece.text[at].isdigit()
    if piece.choices is not None:
        return any(not c or c[at].isdigit() for c in piece.choices)
    return None


def _loose(pattern: KeyPattern) -> KeyPattern:
    """The pattern without its conditions on numbers, which the first key of a group may fail and others meet."""
    if not any(c.numeric for c in pattern.captures):
        return pattern
    return KeyPattern(
        tuple(Capture(p.name) if isinstance(p, Capture) and p.numeric else p for p in pattern.pieces)
    )


def _spans(pattern: KeyPattern, values: dict[str, str]) -> dict[str, tuple[int, int]]:
    spans, at = {}, 0
    for piece in pattern.pieces:
        size = len(piece.text) if isinstance(piece, Literal) else len(values[piece.name])
        if isinstance(piece, Capture):
            spans[piece.name] = (at, at + size)
        at += size
    return spans


def _column(group: KeyGroup, span: tuple[int, int]) -> Column:
    start, end = span
    first = group.keys[0]
    inside = [i for i, (a, b) in enumerate(group.spans) if a >= start and b <= end]
    if not inside:
        return first[start:end]
    if len(inside) == 1 and group.spans[inside[0]] == span:
        return group.slots[inside[0]]
    parts: list[Column] = []
    at = start
    for i in inside:
        a, b = group.spans[i]
        parts += [first[at:a], group.slots[i]]
        at = b
    parts.append(first[at:end])
    wide = [p if isinstance(p, list) else [p] * len(group.keys) for p in parts]
    return ["".join(row) for row in zip(*wide)]


def _restricted(matches: Matches, pattern: KeyPattern) -> Matches | None:
    """The matches whose numbers meet the pattern's conditions, with sums solved for their captures."""
    for capture in pattern.captures:
        if not capture.numeric:
            continue
        column = matches.columns[capture.name]
        wide = column if isinstance(column, list) else [column] * len(matches.keys)
        values = [capture.value_of(text) for text in wide]
        keep = [v is not None for v in values]
        if not any(keep):
            return None
        columns = {n: [v for v, k in zip(c, keep) if k] if isinstance(c, list) else c for n, c in matches.columns.items()}
        columns[capture.name] = [v for v in values if v is not None]
        matches = replace(matches, keys=[k for k, ok in zip(matches.keys, keep) if ok], columns=columns)
    return matches
