"""Many keys on few lines: `layers.0.w`, `layers.1.w`, … read `layers.{0..31}.w`.

Keys are folded when they agree in everything but their numbers, and only into full grids, so a folded line stands for
exactly the keys it spells out: no expert is shown that is not there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice, product

from ..many_objects import ById
from .captures import escape
from .grouping import KeyGroup, group_keys

__all__ = ["Folded", "fold", "fold_groups", "fold_items"]

Row = tuple[tuple[str, ...], ...]  # a grid: for each number of a key, the values it takes

# Longer runs of digits are hashes, not indices.
_LONGEST = 9
_NUMBER = re.compile(rf"((?<![0-9])[0-9]{{1,{_LONGEST}}}(?![0-9]))")
_NAMES = "ijkmn"


@dataclass(frozen=True, slots=True)
class Folded:
    """One line that stands for `count` keys.

    Args:
        text: the keys for a reader: `layers.{0..31}.w`.
        pattern: the keys for a recipe, their numbers free: `layers.{i}.w`; it may match further keys.
        first: the first of the keys, in the order given.
        count: how many keys the line stands for.
        literals: the text around the numbers of the keys.
        numbers: for each number of the keys, its values; the line stands for all combinations.
    """

    text: str
    pattern: str
    first: str
    count: int
    literals: tuple[str, ...] = ()
    numbers: Row = ()

    @property
    def keys(self) -> Iterator[str]:
        """The keys that the line stands for, by their numbers.

        >>> [list(line.keys) for line in fold_groups(["h.0.w", "h.10.w", "h.2.w", "b"])]
        [['h.0.w', 'h.2.w', 'h.10.w'], ['b']]
        """
        for numbers in product(*self.numbers):
            yield "".join(chain.from_iterable(zip(self.literals, (*numbers, ""))))


def fold(keys: Iterable[str]) -> list[tuple[str, int]]:
    """Fold keys that differ in numbers only, in the order of their first members.

    >>> fold(["embed", "h.0.w", "h.0.b", "h.1.w", "h.1.b", "h.2.w"])
    [('embed', 1), ('h.{0..2}.w', 3), ('h.{0,1}.b', 2)]
    """
    return [(group.text, group.count) for group in fold_groups(keys)]


def fold_groups(keys: Iterable[str], label: Callable[[str], Hashable] | None = None) -> list[Folded]:
    """Fold keys that differ in numbers only and, where `label` is given, have equal labels (say, shape and dtype).

    >>> [(g.text, g.pattern) for g in fold_groups(["h.0.w", "h.1.w", "h.3.w"], label={"h.0.w": 4, "h.1.w": 4}.get)]
    [('h.{0,1}.w', 'h.{i}.w'), ('h.3.w', 'h.3.w')]
    """
    order = list(dict.fromkeys(keys))
    return _folded_parts(order, [order] if label is None else _alike(order, list(map(label, order))))


def fold_items(labels: Mapping[str, Hashable]) -> list[Folded]:
    """Fold keys that differ in numbers only and have equal labels, by key.

    >>> [(g.text, g.count) for g in fold_items({"h.0.w": 4, "h.1.w": 4, "h.3.w": 5})]
    [('h.{0,1}.w', 2), ('h.3.w', 1)]
    """
    order = list(labels)
    return _folded_parts(order, _alike(order, list(labels.values())))


def _folded_parts(order: list[str], parts: Iterable[list[str]]) -> list[Folded]:
    """Each part folded by itself; the lines in the order of their first keys."""
    found = {line.first: line for part in parts for group in group_keys(part) for line in _folded_group(group)}
    return [found[key] for key in islice(filter(found.__contains__, order), len(found))]


def _alike(keys: list[str], labels: list[Hashable]) -> Iterable[list[str]]:
    """The keys in parts of equal labels."""
    known = ById(labels)
    parts: dict[Hashable, list[str]] = {label: [] for label in known.objects.values()}
    if len(parts) == 1:
        return [keys]
    for key, its in zip(keys, known.each(parts.__getitem__)):
        its.append(key)
    return parts.values()


def _folded_group(group: KeyGroup) -> Iterator[Folded]:
    columns = [set(slot) for slot in group.slots]
    if any(len(number) > _LONGEST for column in columns for number in column):
        yield from _folded_one_by_one(group.keys)
        return
    ends = [0, *(end for _, end in group.spans)]
    starts = [*(start for start, _ in group.spans), len(group.template)]
    literals = tuple(group.template[end:start] for end, start in zip(ends, starts))
    if math.prod(map(len, columns)) == len(group.keys):  # one full grid, as mostly
        yield _folded(literals, tuple(tuple(sorted(column, key=_numeric)) for column in columns), group.keys[0])
        return
    rows: dict[Row, int] = {tuple((n,) for n in row): at for at, row in enumerate(zip(*group.slots))}
    yield from _folded_rows(literals, rows, group.keys)


def _folded_one_by_one(keys: Sequence[str]) -> Iterator[Folded]:
    families: dict[tuple[str, ...], dict[Row, int]] = {}
    for position, key in enumerate(keys):
        parts = _NUMBER.split(key)
        families.setdefault(tuple(parts[::2]), {})[tuple((number,) for number in parts[1::2])] = position
    for literals, rows in families.items():
        yield from _folded_rows(literals, rows, keys)


def _folded_rows(literals: tuple[str, ...], rows: dict[Row, int], keys: Sequence[str]) -> Iterator[Folded]:
    for row, position in _grids(rows, len(literals) - 1):
        yield _folded(literals, row, keys[position])


def _grids(rows: dict[Row, int], columns: int) -> Iterator[tuple[Row, int]]:
    """Merge rows into grids, last number first: experts within a layer, then layers with equal experts."""
    for column in reversed(range(columns)):
        if len(rows) == 1:
            break
        merged: dict[tuple[Row, Row], list[tuple[str, int]]] = {}
        for row, position in rows.items():
            others = (row[:column], row[column + 1 :])
            merged.setdefault(others, []).append((row[column][0], position))
        rows = {}
        for (before, after), cells in merged.items():
            values = tuple(sorted((value for value, _ in cells), key=_numeric))
            rows[(*before, values, *after)] = min(position for _, position in cells)
    yield from rows.items()


def _numeric(number: str) -> tuple[int, str]:
    return int(number), number


def _folded(literals: tuple[str, ...], row: Row, first: str) -> Folded:
    text, pattern, count = [literals[0]], [escape(literals[0])], 1
    names = _capture_names()
    for values, literal in zip(row, literals[1:], strict=True):
        count *= len(values)
        several = len(values) > 1
        text += ["{" + _runs(values) + "}" if several else values[0], literal]
        pattern += ["{" + next(names) + "}" if several else values[0], escape(literal)]
    return Folded("".join(text), "".join(pattern), first, count, literals, row)


def _capture_names() -> Iterator[str]:
    yield from _NAMES
    n = 1
    while True:
        yield f"i{n}"
        n += 1


def _runs(values: tuple[str, ...]) -> str:
    """Sorted numbers as text: `0..31`, `0,2,5`, `00..11`; zero-padded numbers make a run only at equal width."""
    padded = any(v[0] == "0" and len(v) > 1 for v in values)
    if padded and len({len(v) for v in values}) > 1:
        return ",".join(values)
    pieces: list[str] = []
    for _, run in groupby(enumerate(values), key=lambda pair: int(pair[1]) - pair[0]):
        members = [v for _, v in run]
        pieces.append(f"{members[0]}..{members[-1]}" if len(members) > 2 else ",".join(members))
    return ",".join(pieces)
