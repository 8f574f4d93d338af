"""How the numbers in a family of keys go over into those of its partners."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..narrowing import present

__all__ = ["IndexRelation", "Nesting", "relate"]

Row = tuple[int, ...]


@dataclass(frozen=True)
class Nesting:
    """A flat index that stands for a stage and a place in it; the extents of the stages are known from all keys."""

    flat: int
    outer: int
    inner: int


@dataclass(frozen=True)
class IndexRelation:
    """Rows that one rule can explain.

    Args:
        rows: indices of the rows.
        source, target: for each number: what a pattern says there, without braces for a literal: `"0"`, `"{i+1}"`.
        variables: variable -> (side, place) of the number that it stands for unchanged.
        nesting: a flat index that meets a nested one, on the source's side (True) or the target's.
    """

    rows: tuple[int, ...]
    source: tuple[str, ...]
    target: tuple[str, ...]
    variables: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    nesting: tuple[bool, Nesting] | None = None


_NAMES = "ijknu"


def relate(
    xs: Sequence[Row], ys: Sequence[Row], loops: tuple[Sequence[bool], Sequence[bool]], nest: bool = True
) -> list[IndexRelation]:
    """Explain all rows with few relations; numbers that count nothing are told apart by their values.

    Args:
        xs, ys: the numbers of each source key and of its target.
        loops: for each number of a source, and of a target, whether it counts layers.
        nest: whether a flat number may meet two nested ones.

    >>> [(r.source, r.target) for r in relate([(1, 0), (2, 0)], [(0,), (1,)], ([True, False], [True]))]
    [(('{i+1}', '0'), ('{i}',))]
    """
    found: list[IndexRelation] = []
    groups: dict[Row, list[int]] = defaultdict(list)
    for row, x in enumerate(xs):
        groups[tuple(n for n, loop in zip(x, loops[0]) if not loop)].append(row)
    for rows in groups.values():
        found += _explain(rows, xs, ys, 0, nest)
    return found


def _explain(rows: list[int], xs: Sequence[Row], ys: Sequence[Row], depth: int, nest: bool) -> list[IndexRelation]:
    whole = _affine(rows, xs, ys) or (_nested(rows, xs, ys) if nest else None)
    if whole is not None:
        return [whole]
    best: list[IndexRelation] | None = None
    width = len(xs[0]) + len(ys[0])
    for place in range(width):
        groups: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            groups[(xs[row] + ys[row])[place]].append(row)
        if len(groups) < 2 or depth > 3:
            continue
        parts = [r for group in groups.values() for r in _explain(group, xs, ys, depth + 1, nest)]
        if best is None or len(parts) < len(best):
            best = parts
    return best if best is not None else [r for row in rows for r in [_literal(row, xs, ys)]]


def _literal(row: int, xs: Sequence[Row], ys: Sequence[Row]) -> IndexRelation:
    return IndexRelation((row,), tuple(map(str, xs[row])), tuple(map(str, ys[row])))


def _affine(rows: list[int], xs: Sequence[Row], ys: Sequence[Row]) -> IndexRelation | None:
    """Each number of the target a shifted, reflected or doubled number of the source, or constant."""
    n, m = len(xs[0]), len(ys[0])
    columns = [[xs[r][i] for r in rows] for i in range(n)]
    targets = [[ys[r][j] for r in rows] for j in range(m)]
    source = [str(c[0]) if len(set(c)) == 1 else None for c in columns]
    target = [str(c[0]) if len(set(c)) == 1 else None for c in targets]
    variables: dict[str, tuple[int, int]] = {}
    free = [i for i in range(n) if source[i] is None]
    for j in range(m):
        if target[j] is not None:
            continue
        ways = [(k, i) for k, i in enumerate(free) if _step(columns[i], targets[j]) is not None]
        if not ways:
            return None
        i = ways[0][1]
        if source[i] is not None:
            return None
        name = _NAMES[len(variables) % len(_NAMES)]
        source[i], target[j], variables[name] = _spelled(name, columns[i], targets[j], (0, i), (1, j))
        free.remove(i)
    if free or any(t is None for t in target):
        return None
    return IndexRelation(tuple(rows), tuple(s or "" for s in source), tuple(t or "" for t in target), variables)


def _step(x: Sequence[int], y: Sequence[int]) -> tuple[int, int] | None:
    """(k, c) with y = k·x + c where k is 1, -1 or 2, or (0, c) with x = 2·y + c; None where nothing holds."""
    for k in (1, -1, 2):
        c = y[0] - k * x[0]
        if all(b == k * a + c for a, b in zip(x, y)):
            return k, c
    c = x[0] - 2 * y[0]
    return (0, c) if all(a == 2 * b + c for a, b in zip(x, y)) else None


def _spelled(
    name: str, x: Sequence[int], y: Sequence[int], at_x: tuple[int, int], at_y: tuple[int, int]
) -> tuple[str, str, tuple[int, int]]:
    k, c = present(_step(x, y), "the step between related numbers")
    if k == 0:
        return f"{{2*{name}{_signed(c)}}}", f"{{{name}}}", at_y
    if k == 2:
        return f"{{{name}}}", f"{{2*{name}{_signed(c)}}}", at_x
    if k == -1:
        return f"{{{name}}}", f"{{{c}-{name}}}", at_x
    if c >= 0:
        return f"{{{name}}}", f"{{{name}{_signed(c)}}}", at_x
    return f"{{{name}{_signed(-c)}}}", f"{{{name}}}", at_y


def _signed(c: int) -> str:
    return "" if c == 0 else f"+{c}" if c > 0 else str(c)


def _nested(rows: list[int], xs: Sequence[Row], ys: Sequence[Row]) -> IndexRelation | None:
    """One number flat over two of the other side, neighbours, all else constant."""
    for forward in (True, False):
        one, two = (xs, ys) if forward else (ys, xs)
        varying = [[i for i in range(len(side[0])) if len({side[r][i] for r in rows}) > 1] for side in (one, two)]
        if len(varying[0]) != 1 or not 1 <= len(varying[1]) <= 2:
            continue
        flat = varying[0][0]
        outer = varying[1][0]
        inner = outer + 1
        if inner >= len(two[0]) or (len(varying[1]) == 2 and varying[1][1] != inner):
            continue
        order = sorted(rows, key=lambda r: one[r][flat])
        places = [two[r][outer : inner + 1] for r in order]
        if places != sorted(places) or len(set(places)) != len(places):
            continue
        single, double = list(map(str, one[rows[0]])), list(map(str, two[rows[0]]))
        single[flat], double[outer], double[inner] = "{(stage block)}", "{stage}", "{block}"
        sides = (tuple(single), tuple(double)) if forward else (tuple(double), tuple(single))
        return IndexRelation(tuple(rows), *sides, nesting=(forward, Nesting(flat, outer, inner)))
    return None
