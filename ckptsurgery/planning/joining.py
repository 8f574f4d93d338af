"""From matched keys to groups: what one step reads, which indices are gathered, what is left without a partner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product

from ..errors import Diagnostic
from ..language.dims import Dims
from ..language.folding import fold
from ..language.keys import Capture, KeyPattern, is_index
from ..language.rules import Term
from .matching import Matches

__all__ = ["FlatIndex", "Group", "Row", "Values", "canonical", "group_rows", "spell_columns"]

Values = dict[str, int | str]
"""Bound names: the position of a choice, else the captured text."""


@dataclass(frozen=True, slots=True)
class Row:
    """Source keys that meet before the rearrangement, and the index of every gathered name."""

    keys: tuple[str, ...]
    values: Values


@dataclass(slots=True)
class Group:
    """What one step reads.

    Args:
        values: the loop variables.
        rows: for each tensor that arrives at the target, its rows in the order of the gathered indices.
        bound: the gathered names of each, in that order.
        extents: gathered name -> how many.
    """

    values: Values
    rows: list[list[Row]] = field(default_factory=list)
    bound: list[tuple[str, ...]] = field(default_factory=list)
    extents: dict[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """All source keys, in the order in which the program takes them."""
        return tuple(k for rows in self.rows for row in rows for k in row.keys)


@dataclass(frozen=True)
class FlatIndex:
    """One index over several: `(s b)` counts b within s, where each s may have its own number of b.

    >>> flat = FlatIndex(("s", "b"), (None, (2, 3)))
    >>> flat.split(3), flat.join((1, 2))
    ((1, 1), 4)
    """

    names: tuple[str, ...]
    extents: tuple[int | tuple[int, ...] | None, ...]

    def split(self, number: int) -> tuple[int, ...] | None:
        """The indices behind a flat one, None beyond its end."""
        outer = 0
        while True:
            size = self._inner(outer)
            if size is None or size < 1:
                return None
            if number < size:
                return (outer, *self._unravel(number, outer))
            number -= size
            outer += 1

    def join(self, indices: Sequence[int]) -> int:
        """The flat index."""
        before = sum(self._inner(o) or 0 for o in range(indices[0]))
        inner = 0
        for level, index in enumerate(indices[1:], 1):
            inner = inner * self._extent(level, indices[0]) + index
        return before + inner

    def _extent(self, level: int, outer: int) -> int:
        extent = self.extents[level]
        if isinstance(extent, tuple):
            return extent[outer] if outer < len(extent) else 0
        return extent or 0

    def _inner(self, outer: int) -> int | None:
        size = 1
        for level in range(1, len(self.names)):
            size *= self._extent(level, outer)
        return size

    def _unravel(self, number: int, outer: int) -> tuple[int, ...]:
        indices: list[int] = []
        for level in range(len(self.names) - 1, 0, -1):
            number, index = divmod(number, self._extent(level, outer))
            indices.append(index)
        return tuple(reversed(indices))


def canonical(term: Term, matches: Matches) -> Matches:
    """The matches with choices as positions, written as digits, so that both sides speak of the same values."""
    columns = dict(matches.columns)
    for capture in term.pattern.captures:
        if capture.choices is not None:
            place = {text: str(n) for n, text in enumerate(capture.choices)}
            column = columns[capture.name]
            columns[capture.name] = place[column] if isinstance(column, str) else [place[c] for c in column]
    return replace(matches, columns=columns)


def spell_columns(pattern: KeyPattern, matches: Matches, texts: Callable[[Capture, str], str]) -> list[str]:
    """The target key for every matched key at once."""
    fixed: list[str] = []
    columns: list[list[str]] = []
    for piece in pattern.pieces:
        if not isinstance(piece, Capture):
            fixed.append(piece.text.replace("%", "%%"))
            continue
        column = matches.columns[piece.name]
        if isinstance(column, str):
            fixed.append(texts(piece, column).replace("%", "%%"))
            continue
        fixed.append("%s")
        plain = piece.choices is None and not piece.numeric
        columns.append(column if plain else [texts(piece, c) for c in column])
    template = "".join(fixed)
    if not columns:
        return [template.replace("%%", "%")] * len(matches.keys)
    return [template % row for row in zip(*columns)]


def group_rows(
    terms: Sequence[Term], matched: Sequence[Iterable[Matches]], loops: Sequence[str], gathered: Sequence[str], joined: bool
) -> tuple[list[Group], list[Diagnostic]]:  # fmt: skip
    """The groups of a rule: one for each value of its loop variables.

    Args:
        terms: the source terms.
        matched: for each term its matches, canonical.
        joined: whether the terms meet in an op before the rearrangement, row by row.
    """
    problems: list[Diagnostic] = []
    tables = [[Row((key,), dict(values)) for m in found for key, values in m.rows()] for found in matched]
    if joined and len(terms) > 1:
        tables = [_join_all(terms, tables, problems)]
    groups = _grouped(tables, loops, problems, terms)
    names = [tuple(n for n in gathered if any(n in r.values for r in rows[:1])) for rows in tables]
    for group in groups:
        _gather(group, names, terms, problems)
    _check_even(groups, problems)
    return groups, problems


def _join_all(terms: Sequence[Term], tables: list[list[Row]], problems: list[Diagnostic]) -> list[Row]:
    current = tables[0]
    for number, table in enumerate(tables[1:], 1):
        shared = [n for n in terms[number].pattern.names if any(n in r.values for r in current[:1])]
        index: dict[tuple[int | str, ...], list[Row]] = {}
        for row in table:
            index.setdefault(tuple(row.values[n] for n in shared), []).append(row)
        merged, met = [], set()
        alone = []
        for row in current:
            place = tuple(row.values[n] for n in shared)
            partners = index.get(place, [])
            met.add(place)
            merged += [Row((*row.keys, *p.keys), {**row.values, **p.values}) for p in partners]
            if not partners:
                alone.append(row.keys[0])
        alone += [r.keys[0] for place, rows in index.items() if place not in met for r in rows]
        if alone:
            problems.append(_alone(alone, terms))
        current = merged
    return current


def _alone(keys: list[str], terms: Sequence[Term]) -> Diagnostic:
    folded = [text for text, _ in fold(keys)]
    return Diagnostic(
        "missing-partner", f"{len(keys)} source keys have no partner: {folded[0]}", notes=tuple(folded[1:8]),
        facts=(("joins", ", ".join(str(t.pattern) for t in terms)),),
        help="name those without a partner by a rule of their own, or drop them",
    )  # fmt: skip


def _grouped(tables: list[list[Row]], loops: Sequence[str], problems: list[Diagnostic], terms: Sequence[Term]) -> list[Group]:
    first_loops = [[n for n in loops if rows and n in rows[0].values] for rows in tables]
    leader = max(range(len(tables)), key=lambda t: len(first_loops[t]))
    groups: dict[tuple[int | str, ...], Group] = {}
    for row in tables[leader]:
        place = tuple(row.values[n] for n in first_loops[leader])
        if place not in groups:
            groups[place] = Group(dict(zip(first_loops[leader], place)), [[] for _ in tables])
        groups[place].rows[leader].append(row)
    for number, rows in enumerate(tables):
        if number == leader:
            continue
        index: dict[tuple[int | str, ...], list[Row]] = {}
        for row in rows:
            index.setdefault(tuple(row.values[n] for n in first_loops[number]), []).append(row)
        met = set()
        for group in groups.values():
            place = tuple(group.values[n] for n in first_loops[number])
            met.add(place)
            group.rows[number] = index.get(place, [])
        alone = [r.keys[0] for place, found in index.items() if place not in met for r in found]
        alone += [g.keys[0] for g in groups.values() if not g.rows[number]]
        if alone:
            problems.append(_alone(alone, terms))
    return [g for g in groups.values() if all(g.rows)]


def _gather(group: Group, names: Sequence[tuple[str, ...]], terms: Sequence[Term], problems: list[Diagnostic]) -> None:
    captures = {c.name: c for t in terms for c in t.pattern.captures}
    for number, bound in enumerate(names):
        group.bound.append(bound)
        if not bound:
            continue
        rows: dict[tuple[int, ...], Row] = {}
        for row in group.rows[number]:
            index = _index(row, bound, captures, problems)
            if index is None:
                return
            rows[index] = row
        for at, name in enumerate(bound):
            group.extents[name] = max(i[at] for i in rows) + 1
        capture_count = {n: len(c.choices) for n, c in captures.items() if c.choices is not None}
        full = [range(capture_count.get(n) or _span_size(captures.get(n)) or group.extents[n]) for n in bound]
        missing = list(islice((i for i in product(*full) if i not in rows), 64))
        if missing:
            problems.append(_gap(missing, bound, group.rows[number][0], terms[min(number, len(terms) - 1)], captures, group))
            return
        group.rows[number] = [
            replace(rows[i], values={**rows[i].values, **dict(zip(bound, i))}) for i in product(*full)
        ]
        group.extents.update({n: len(r) for n, r in zip(bound, full)})


def _index(
    row: Row, bound: Sequence[str], captures: Mapping[str, Capture], problems: list[Diagnostic]
) -> tuple[int, ...] | None:  # fmt: skip
    index = []
    for name in bound:
        text = str(row.values[name])
        if not is_index(text):
            problems.append(
                Diagnostic("not-a-number", f"{row.keys[0]!r}: {{{name}}} is gathered, but {text!r} is no number without "
                           "leading zeros", help=f"give {{{name}}} its choices, in order: {{{name}:{text},…}}")
            )  # fmt: skip
            return None
        capture = captures.get(name)
        first = int(capture.span.first) if capture is not None and capture.span is not None else 0
        index.append(int(text) - first)
    return tuple(index)


def _span_size(capture: Capture | None) -> int | None:
    if capture is None or capture.span is None:
        return None
    return int(capture.span.last) - int(capture.span.first) + 1


def _gap(
    missing: list[tuple[int, ...]], bound: Sequence[str], like: Row, term: Term, captures: Mapping[str, Capture], group: Group
) -> Diagnostic:  # fmt: skip
    keys = []
    for index in missing:
        values: dict[str, str] = {}
        for name, value in {**like.values, **dict(zip(bound, index))}.items():
            capture = captures.get(name)
            if capture is not None and capture.choices is not None:
                values[name] = capture.choices[int(value)]
            else:
                shift = int(capture.span.first) if capture is not None and capture.span and name in bound else 0
                values[name] = str(int(value) + shift) if name in bound else str(value)
        keys.append(term.pattern.spell(values))
    folded = [text for text, _ in fold(keys)]
    names = ", ".join(f"{{{n}}}" for n in bound)
    return Diagnostic(
        "missing-index", f"{names} is gathered, and {folded[0]} is missing", notes=tuple(folded[1:8]),
        help=f"a gathered index runs without gaps; {{{bound[-1]}:0..n}} gathers fewer",
    )  # fmt: skip


def _check_even(groups: Sequence[Group], problems: list[Diagnostic]) -> None:
    for name in {n for g in groups for n in g.extents}:
        counts: dict[int, list[Group]] = {}
        for group in groups:
            if name in group.extents:
                counts.setdefault(group.extents[name], []).append(group)
        if len(counts) > 1:
            usual = max(counts, key=lambda n: len(counts[n]))
            odd = [(n, g) for n, found in counts.items() if n != usual for g in found]
            problems.append(
                Diagnostic("uneven-gather", f"{{{name}}} runs over {usual} in most groups, but over {odd[0][0]} at "
                           f"{odd[0][1].keys[0]!r}", notes=tuple(f"{n}: {g.keys[0]}" for n, g in odd[1:6]),
                           help="a missing or a surplus index in one layer?")
            )  # fmt: skip


def flat_extents(flat: Sequence[str], dims: Dims, counted: Mapping[str, int | tuple[int, ...]]) -> FlatIndex | None:
    """The flat index with its extents from `dims` or as counted in keys; None where one is unknown."""
    extents: list[int | tuple[int, ...] | None] = [None]
    for name in flat[1:]:
        extent = dims.get(name)
        if extent is None or isinstance(extent, dict):
            extent = counted.get(name)
        if extent is None:
            return None
        extents.append(extent)
    return FlatIndex(tuple(flat), tuple(extents))
