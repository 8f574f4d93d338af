"""Rounds of soft matching in which neighbours vote, then an assignment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .evidence import Evidence
from .placement import Pool
from .sides import UnitSide

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["VOTES", "Solution", "Voters", "assign", "solve"]

VOTES: Mapping[str, float] = {"inside": 3.0, "alike": 3.0, "beside": 0.8}
_ROUNDS = 7
_NEVER = -1e9


@dataclass(frozen=True)
class Solution:
    """What one run found.

    Args:
        pairs: (source unit, target unit) -> score.
        score: the final scores of all pairs.
        soft: how sure the last round was of each pair, 0 to 1.
    """

    pairs: dict[tuple[int, int], float]
    score: Matrix
    soft: Matrix


@dataclass(frozen=True)
class Voters:
    """Who votes for whom: groups of units on both sides, the same for every round.

    Args:
        modules: for each side, the modules around each unit, counted from the leaf outwards.
        families: for each side, what each unit is called when numbers are left out, at several generalities.
        beside: for each side, the units before and after each unit, -1 for none; None where order says nothing.
        worth: what a vote of modules, and of families, counts at each pair of levels; filled when it is first asked.
    """

    modules: tuple[_Groups, _Groups]
    families: tuple[_Groups, _Groups]
    beside: tuple[Any, Any] | None
    worth: tuple[dict[tuple[int, int], Matrix], dict[tuple[int, int], Matrix]] = field(
        default_factory=lambda: ({}, {}), repr=False
    )

    @classmethod
    def of(cls, a: UnitSide, b: UnitSide) -> Voters:
        """The voters of two sides."""
        beside = (_neighbours(a), _neighbours(b)) if a.ordered and b.ordered else None
        return cls(
            (_Groups(_modules(a)), _Groups(_modules(b))),
            (_Groups(_families(a)), _Groups(_families(b))),
            beside,
        )


def _grouped(rows: Sequence[str | None]) -> Any:
    import numpy as np

    names: dict[str, int] = {}
    return np.array([-1 if r is None else names.setdefault(r, len(names)) for r in rows], dtype=int)


def _modules(side: UnitSide) -> list[Any]:
    deepest = max((len(p) for p in side.prefixes), default=0)
    return [_grouped([p[-d] if len(p) >= d else None for p in side.prefixes]) for d in range(1, min(deepest, 5) + 1)]


def _families(side: UnitSide) -> list[Any]:
    tails = []
    for family, slots in zip(side.families, side.slots):
        cut = family.rfind("#") if slots else -1
        tails.append(family[cut + 1 :] if 0 <= cut < len(family) - 1 else family)
    return [_grouped(side.families), _grouped(tails), _grouped([u.template for u in side.units])]


def _neighbours(side: UnitSide) -> Any:
    import numpy as np

    order = sorted(range(len(side)), key=lambda i: side.units[i].order)
    found = np.full((2, len(side)), -1)
    for one, two in pairwise(order):
        found[1, one], found[0, two] = two, one
    return found


def solve(
    evidence: Evidence,
    voters: Voters,
    weights: Mapping[str, float],
    votes: Mapping[str, float],
    rounds: int = _ROUNDS,
    noise: Matrix | None = None,
    pool: Pool | None = None,
) -> Solution:
    """Match softly, let neighbours vote, again and again; then assign. Noise is added to what speaks for each pair.

    What is pooled is decided for all layers together.
    """
    import numpy as np

    mask = evidence.mask > 0
    base = evidence.total(weights)
    if noise is not None:
        base = base + noise
    if pool is not None:
        base = pool.mean(base, mask)
    score = np.where(mask, base, _NEVER)
    if not mask.any():
        return Solution({}, score, np.zeros(mask.shape))
    soft = np.zeros(mask.shape)
    for turn in range(rounds):
        fresh = _soften(score, mask, 1.0 - 0.6 * turn / rounds)
        soft = fresh if turn == 0 else 0.7 * fresh + 0.3 * soft
        share = (turn + 1) / rounds
        extra = votes.get("inside", 0.0) * _by_module(soft, voters) + votes.get("alike", 0.0) * _by_family(soft, voters)
        if voters.beside is not None:
            extra = extra + votes.get("beside", 0.0) * _by_neighbour(soft, voters.beside)
        if pool is not None:
            extra = pool.mean(extra, mask)
        score = np.where(mask, base + (0.4 + 0.6 * share) * extra, _NEVER)
    pairs = {(i, j): float(score[i, j]) for i, j in assign(score, mask)}
    return Solution(pairs, score, _soften(score, mask, 0.4))


def _soften(score: Matrix, mask: Any, heat: float) -> Matrix:
    """Sinkhorn's scaling, a few rounds: rows and columns that sum to one at most."""
    import numpy as np

    top = score.max(axis=1, keepdims=True)
    raw = np.where(mask, np.exp(np.maximum((score - top) / heat, -40.0)), 0.0)
    for _ in range(6):
        raw /= np.maximum(raw.sum(axis=0, keepdims=True), 1e-12)
        raw /= np.maximum(raw.sum(axis=1, keepdims=True), 1e-12)
    result: Matrix = np.minimum(raw, raw / np.maximum(raw.sum(axis=0, keepdims=True), 1e-12))
    return result


class _Groups:
    """Groups of one side, at several generalities, one after the other; a unit in a group of its own is in none."""

    def __init__(self, levels: Sequence[Any]) -> None:
        import numpy as np

        self.columns: list[Any] = []
        members: list[Any] = []
        starts: list[int] = []
        sizes: list[int] = []
        for level in levels:
            counts = np.bincount(level[level >= 0], minlength=1)
            shared = np.flatnonzero(counts > 1)
            place = np.full(len(counts), -1)
            place[shared] = np.arange(len(shared)) + len(starts)
            within = np.where(level >= 0, place[level], -1)
            self.columns.append((np.maximum(within, 0), within >= 0))
            ordered = np.argsort(within, kind="stable")
            at = sum(map(len, members))
            members.append(ordered[within[ordered] >= 0])
            starts += (at + np.concatenate([[0], np.cumsum(counts[shared])[:-1]])).tolist() if len(shared) else []
            sizes += counts[shared].tolist()
        self.members = np.concatenate([*members, np.zeros(0, dtype=int)]).astype(int)
        self.starts, self.sizes = np.array(starts, dtype=int), np.array(sizes, dtype=float)

    def summed(self, matrix: Matrix) -> Matrix:
        """The rows of each group, summed."""
        import numpy as np

        result: Matrix = np.add.reduceat(matrix[self.members], self.starts, axis=0)
        return result


def _counted(
    soft: Matrix, one: _Groups, two: _Groups, known: dict[tuple[int, int], Matrix]
) -> Callable[[int, int], Matrix] | None:
    """For a level of each side: how much of each pair's groups agrees without the pair; None where there are none."""
    import numpy as np

    if not len(one.starts) or not len(two.starts):
        return None
    across, down = two.summed(soft.T).T, one.summed(soft)
    table = one.summed(across)

    def at(level: int, other: int) -> Matrix:
        (rows, _), (columns, _) = one.columns[level], two.columns[other]
        weight = worth(level, other)
        if weight.size == 1:
            return weight
        # What speaks for other partners of the two does not speak for the pair.
        votes: Matrix = table.take(rows, axis=0).take(columns, axis=1)
        votes -= across.take(columns, axis=1)
        votes -= down.take(rows, axis=0)
        votes += soft
        votes *= weight
        return votes

    def worth(level: int, other: int) -> Matrix:
        """What a vote counts: less the larger the groups are, and nothing where there is none."""
        if (level, other) not in known:
            (rows, there), (columns, here) = one.columns[level], two.columns[other]
            size = np.maximum(one.sizes[rows][:, None], two.sizes[columns][None, :])
            # A group that is nearly everything says nothing.
            special = np.maximum(1.0 - size / max(soft.shape), 0.0)
            counted = np.where(there[:, None] & here[None, :], special / (size - 1), 0.0)
            known[level, other] = counted if counted.any() else np.zeros((1, 1))
        return known[level, other]

    return at


def _by_module(soft: Matrix, voters: Voters) -> Matrix:
    import numpy as np

    best = np.zeros(soft.shape)
    total = np.zeros(soft.shape)
    one, two = voters.modules
    votes = _counted(soft, one, two, voters.worth[0])
    if votes is None:
        return best
    for level in range(len(one.columns)):
        along = np.zeros(soft.shape)
        for other in range(len(two.columns)):
            np.maximum(along, votes(level, other), out=along)
        np.maximum(best, along, out=best)
        total += along
    return 0.6 * best + 0.4 * np.minimum(total, 2.0)


def _by_family(soft: Matrix, voters: Voters) -> Matrix:
    import numpy as np

    one, two = voters.families
    votes = _counted(soft, one, two, voters.worth[1])
    total: Matrix = np.zeros(soft.shape)
    if votes is None:
        return total
    for level in range(len(one.columns)):
        total += votes(level, level)
    return total / max(1, len(one.columns))


def _by_neighbour(soft: Matrix, beside: tuple[Any, Any]) -> Matrix:
    import numpy as np

    total = np.zeros(soft.shape)
    for way in (0, 1):
        one, two = beside[0][way], beside[1][way]
        voted = soft[np.ix_(np.maximum(one, 0), np.maximum(two, 0))]
        total += np.where((one >= 0)[:, None] & (two >= 0)[None, :], voted, 0.0)
    return total / 2


def assign(score: Matrix, mask: Any) -> list[tuple[int, int]]:
    """The pairs whose scores sum to most, each unit in one pair at most; components apart from each other."""
    import numpy as np

    found: list[tuple[int, int]] = []
    left = set(range(score.shape[0]))
    while left:
        rows: set[int] = set()
        columns: set[int] = set()
        queue = [left.pop()]
        while queue:
            i = queue.pop()
            rows.add(i)
            fresh = set(np.flatnonzero(mask[i]).tolist()) - columns
            columns |= fresh
            for j in fresh:
                more = set(np.flatnonzero(mask[:, j]).tolist()) & left
                left -= more
                queue += more
        if columns:
            one, two = sorted(rows), sorted(columns)
            block = score[np.ix_(one, two)]
            found += [(one[i], two[j]) for i, j in _hungarian(block) if mask[one[i], two[j]]]
    return sorted(found)


def _hungarian(score: Matrix) -> list[tuple[int, int]]:
    """Kuhn and Munkres' assignment in the form of Jonker and Volgenant: shortest augmenting paths; O(n³)."""
    import numpy as np

    if score.shape[0] > score.shape[1]:
        return [(i, j) for j, i in _hungarian(score.T)]
    cost = -np.maximum(score, -1e6)
    n, m = cost.shape
    u, v = np.zeros(n + 1), np.zeros(m + 1)
    match = np.zeros(m + 1, dtype=int)
    for i in range(1, n + 1):
        match[0], at = i, 0
        least, way, used = np.full(m + 1, np.inf), np.zeros(m + 1, dtype=int), np.zeros(m + 1, dtype=bool)
        while True:
            used[at] = True
            row = match[at]
            reduced = cost[row - 1] - u[row] - v[1:]
            better = ~used[1:] & (reduced < least[1:])
            least[1:][better] = reduced[better]
            way[1:][better] = at
            open_ = np.where(used[1:], np.inf, least[1:])
            step = int(open_.argmin()) + 1
            delta = open_[step - 1]
            u[match[used]] += delta
            v[used] -= delta
            least[~used] -= delta
            at = step
            if match[at] == 0:
                break
        while at:
            before = int(way[at])
            match[at] = match[before]
            at = before
    return [(int(match[j]) - 1, j - 1) for j in range(1, m + 1) if match[j]]
