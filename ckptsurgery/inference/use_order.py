"""Two models whose tensors are listed in their order of use: both orders aligned, whatever the names are.

The alignment is monotonic: what is used earlier in one model goes to what is used earlier in the other. Neighbours that
are separate on one side and one tensor on the other count as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from .moves import TensorMove, resolve
from .shapes import relations
from .sides import UnitSide
from .units import Leaf, Unit

__all__ = ["Following", "follow"]

_WIDEST = 4  # neighbours that are looked at as one


@dataclass(frozen=True)
class Following:
    """Units of two models that correspond by their order of use.

    Args:
        pairs: units of both sides; several on one side are fused into the one on the other.
    """

    pairs: Sequence[tuple[tuple[Unit, ...], tuple[Unit, ...]]]

    def moves(self) -> Iterator[list[TensorMove]]:
        """What makes what: fused parts in their order of use first, then in each other order, the same everywhere."""
        widths = sorted({len(side) for pair in self.pairs for side in pair if len(side) > 1})
        yield self._moves({})
        for width in widths:
            for order in permutations(range(width)):
                if order != tuple(range(width)):
                    yield self._moves({width: order})

    def _moves(self, orders: dict[int, tuple[int, ...]]) -> list[TensorMove]:
        ends: tuple[list[Unit], list[Unit]] = ([], [])
        for one, two in self.pairs:
            ends[0].append(_as_one(_permuted(one, orders), two))
            ends[1].append(_as_one(_permuted(two, orders), one))
        both = UnitSide(ends[0], True), UnitSide(ends[1], True)
        return resolve(*both, [(n, n) for n in range(len(self.pairs))])


def follow(source: Sequence[Unit], target: Sequence[Unit]) -> Following:
    """Align two sequences of units so that as many tensors as possible have a partner.

    >>> from ..specs import TensorSpec
    >>> from .units import read_units
    >>> one = {"p.weight": TensorSpec((6, 3), "F32"), "x.weight": TensorSpec((3, 6), "F32")}
    >>> two = {f"{n}.weight": TensorSpec((3, 3), "F32") for n in "uv"} | {"y.weight": one["x.weight"]}
    >>> found = follow(read_units(one.items()), read_units(two.items()))
    >>> [([u.path for u in a], [u.path for u in b]) for a, b in found.pairs]
    [(['p'], ['u', 'v']), (['x'], ['y'])]
    """
    n, m = len(source), len(target)
    best = [[0.0] * (m + 1) for _ in range(n + 1)]
    came: dict[tuple[int, int], tuple[int, int]] = {}
    for i in range(n + 1):
        for j in range(m + 1):
            steps = [(1, 0), (0, 1)] + [(1, w) for w in range(1, _WIDEST + 1)] + [(w, 1) for w in range(2, _WIDEST + 1)]
            top = (-1.0, (0, 0))
            for di, dj in steps:
                if di > i or dj > j:
                    continue
                gain = 0.0 if 0 in (di, dj) else _fit(source[i - di : i], target[j - dj : j])
                if 0 in (di, dj) or gain > 0:
                    top = max(top, (best[i - di][j - dj] + gain, (-di, -dj)))
            if top[0] >= 0:
                best[i][j], (di, dj) = top[0], top[1]
                came[i, j] = -di, -dj
    found = []
    i, j = n, m
    while (i, j) in came:
        di, dj = came[i, j]
        if di and dj:
            found.append((tuple(source[i - di : i]), tuple(target[j - dj : j])))
        i, j = i - di, j - dj
    return Following(found[::-1])


def _fit(one: Sequence[Unit], two: Sequence[Unit]) -> float:
    """How many tensors of both sides go to each other; 0 where a shape does not fit."""
    many, single = (one, two[0]) if len(one) > 1 else (two, one[0])
    roles = [r for r in single.leaves if all(r in u.leaves for u in many)]
    if not roles or ("weight" in single.leaves) != all("weight" in u.leaves for u in many):
        return 0.0
    total = 0
    for role in roles:
        wanted = single.leaves[role]
        if len(many) == 1:
            fits = bool(relations(many[0].leaves[role].shape, wanted.shape))
        else:
            fits = _joined([u.leaves[role] for u in many], wanted) is not None
        if not fits or wanted.kind != many[0].leaves[role].kind:
            return 0.0
        total += 1 + len(many)
    missing = sum(len(u.leaves) - len(roles) for u in (*many, single))
    return total - 0.5 * missing - 0.1 * (len(many) - 1)


def _joined(leaves: Sequence[Leaf], wanted: Leaf) -> Leaf | None:
    """Several tensors as one along the axis on which they make the wanted shape; None where there is none."""
    shape = leaves[0].shape
    for axis in range(len(shape)):
        if any(len(x.shape) != len(shape) or x.shape[:axis] + x.shape[axis + 1 :] != shape[:axis] + shape[axis + 1 :]
               for x in leaves):  # fmt: skip
            continue
        whole = (*shape[:axis], sum(x.shape[axis] for x in leaves), *shape[axis + 1 :])
        if relations(whole, wanted.shape):
            return Leaf(whole, leaves[0].kind, tuple(p for x in leaves for p in x.parts), "concat")
    return None


def _permuted(units: tuple[Unit, ...], orders: dict[int, tuple[int, ...]]) -> tuple[Unit, ...]:
    return tuple(units[n] for n in orders[len(units)]) if len(units) in orders else units


def _as_one(units: tuple[Unit, ...], other: tuple[Unit, ...]) -> Unit:
    """A unit, or several as the one that they are on the other side."""
    if len(units) == 1:
        return units[0]
    leaves = {
        role: whole
        for role, leaf in other[0].leaves.items()
        if all(role in u.leaves for u in units)
        and (whole := _joined([u.leaves[role] for u in units], leaf)) is not None
    }
    return replace(units[0], leaves=leaves, members=tuple(u.path for u in units))
