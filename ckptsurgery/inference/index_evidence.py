"""How alike two units are by the numbers in their paths: ranks, loops, series of shapes; as matrices."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from .sides import Loop, UnitSide
from .units import Unit

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[Any, np.dtype[np.float64]]

__all__ = [
    "aligned_loops",
    "by_counts",
    "by_index",
    "by_loops",
    "by_sequence",
    "by_series",
    "canonical",
    "ranks",
    "spread",
]


def spread(a: Sequence[Hashable], b: Sequence[Hashable], of: Any) -> Matrix:
    """`of(x, y)` for every pair, asked once for each pair of distinct values."""
    import numpy as np

    rows, columns = list(dict.fromkeys(a)), list(dict.fromkeys(b))
    table = np.array([[of(x, y) for y in columns] for x in rows], dtype=float).reshape(len(rows), len(columns))
    at_row, at_column = {x: i for i, x in enumerate(rows)}, {y: j for j, y in enumerate(columns)}
    return table[np.ix_([at_row[x] for x in a], [at_column[y] for y in b])]


def ranks(side: UnitSide, keys: Sequence[Hashable], by: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Each unit's rank among the units with the same key, and how many these are."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    rank, size = [0] * len(side), [0] * len(side)
    for members in groups.values():
        for position, i in enumerate(sorted(members, key=lambda i: by[i])):
            rank[i], size[i] = position, len(members)
    return rank, size


def canonical(unit: Unit) -> tuple[int, ...]:
    """Return the sizes of a unit's weight without ones, sorted."""
    return tuple(sorted(n for n in unit.weight.shape if n > 1))


def by_index(a: UnitSide, b: UnitSide, mask: Matrix) -> Matrix:
    """Equally large numbered families of one shape: the first belongs to the first, the last to the last."""
    import numpy as np

    total = np.zeros(mask.shape)
    for level in ("template", "family"):
        rows = []
        for side in (a, b):
            names = [u.template for u in side.units] if level == "template" else side.families
            keys = [(n, canonical(u), tuple(sorted(u.leaves))) for n, u in zip(names, side.units)]
            rows.append(ranks(side, keys, side.numbers))
        (rank_a, size_a), (rank_b, size_b) = (tuple(map(np.array, r)) for r in rows)
        same_size = (size_a[:, None] == size_b[None, :]) & (size_a[:, None] > 1)
        same_rank = rank_a[:, None] == rank_b[None, :]
        total += same_size * np.where(same_rank, 0.5, -0.5)
    return total * mask


def by_series(a: UnitSide, b: UnitSide) -> Matrix:
    """Numbered families whose shapes are the same series: instance by instance, however each side nests its numbers."""
    rows = []
    for side in (a, b):
        members: dict[str, list[int]] = defaultdict(list)
        numbers = side.numbers
        for i, family in enumerate(side.families):
            members[family].append(i)
        found: list[tuple[Hashable, int]] = [((), 0)] * len(side)
        for listed in members.values():
            listed.sort(key=numbers.__getitem__)
            series = tuple((canonical(side.units[i]), tuple(sorted(side.units[i].leaves))) for i in listed)
            if len(listed) > 2 and len(set(series)) > 1:
                for rank, i in enumerate(listed):
                    found[i] = series, rank
        rows.append(found)

    def of(x: tuple[Hashable, int], y: tuple[Hashable, int]) -> float:
        return 0.0 if x[0] != y[0] or not x[0] else 1.0 if x[1] == y[1] else -1.0

    return spread(rows[0], rows[1], of)


def aligned_loops(a: UnitSide, b: UnitSide) -> dict[tuple[str, str], tuple[float, bool]]:
    """Loops that count the same things, told by the sizes under each value: how sure that is, and whether backwards."""
    found: dict[tuple[str, str], tuple[float, bool]] = {}
    best: dict[tuple[int, str], float] = defaultdict(float)
    for (p, one), (q, two) in product(a.loops.items(), b.loops.items()):
        if len(one.values) == len(two.values):
            found[p, q] = _alike(one.sizes, two.sizes)
        elif abs(len(one.values) - len(two.values)) <= min(len(one.values), len(two.values)) // 2:
            # One side lacks some: what both have goes by its number.
            found[p, q] = _in_common(one, two), False
        else:
            continue
        worth = found[p, q][0]
        best[0, p], best[1, q] = max(best[0, p], worth), max(best[1, q], worth)
    return {(p, q): v for (p, q), v in found.items() if v[0] >= max(0.8, best[0, p] - 1e-9, best[1, q] - 1e-9)}


def by_loops(a: UnitSide, b: UnitSide, aligned: Mapping[tuple[str, str], tuple[float, bool]]) -> Matrix:
    """Equal ranks in aligned loops, or reversed ones."""

    def of(x: Any, y: Any) -> float:
        total, count = 0.0, 0
        for (p, i), (q, j) in product(x, y):
            if (p, q) in aligned:
                one, two = a.loops[p], b.loops[q]
                here, there = one.rank(i), two.rank(j)
                if len(one.values) != len(two.values):
                    here, there = i, j
                total += 1.0 if here == (len(two.values) - 1 - there if aligned[p, q][1] else there) else -1.0
                count += 1
        return total / count if count else 0.0

    return spread(a.slots, b.slots, of)


def _alike(one: Sequence[int], two: Sequence[int]) -> tuple[float, bool]:
    """How well the sizes agree in order or, where that is clearly better, backwards."""
    if not all(one) or not all(two):
        return 0.0, False
    forth = sum(min(x, y) / max(x, y) for x, y in zip(one, two)) / len(one)
    back = sum(min(x, y) / max(x, y) for x, y in zip(one, reversed(two))) / len(one)
    return (back, True) if back > forth + 0.02 else (forth, False)


def _in_common(one: Loop, two: Loop) -> float:
    """How well the sizes agree under the numbers that both have."""
    there = dict(zip(two.values, two.sizes))
    both = [(n, there[v]) for v, n in zip(one.values, one.sizes) if v in there]
    if len(both) < max(len(one.values), len(two.values)) / 2 or not all(n and m for n, m in both):
        return 0.0
    return sum(min(n, m) / max(n, m) for n, m in both) / len(both) - 0.05


def by_sequence(a: UnitSide, b: UnitSide) -> Matrix:
    """Rank among modules that follow each other, where one side counts them all and the other names first and last."""

    def of(x: tuple[tuple[int, int, bool], ...], y: tuple[tuple[int, int, bool], ...]) -> float:
        for (i, n, counted), (j, m, all_counted) in product(x, y):
            if n == m and counted != all_counted:
                return 1.0 if i == j else -1.0
        return 0.0

    return spread(a.sequence_ranks, b.sequence_ranks, of)


def by_counts(a: UnitSide, b: UnitSide, aligned: Mapping[tuple[str, str], tuple[float, bool]]) -> Matrix:
    """What every layer has belongs to what every layer has, what some have to what as many have; if both sides agree
    how many tensors of a shape there are of either sort."""
    many = a.counts({p for p, _ in aligned}), b.counts({q for _, q in aligned})
    rows = [[(canonical(u), n) for u, n in zip(side.units, counts)] for side, counts in zip((a, b), many)]
    total = [Counter(row) for row in rows]
    balanced = {name for name, n in total[0].items() if total[1].get(name) == n}

    def of(x: tuple[tuple[int, ...], int], y: tuple[tuple[int, ...], int]) -> float:
        return -1.0 if x != y and x in balanced and y in balanced else 0.0

    return spread(rows[0], rows[1], of)
