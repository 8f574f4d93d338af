"""Where units may go: what is known of two sides' stacks, as pairs of units that are possible or not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from ..narrowing import present
from .sides import UnitSide
from .stacks import Pairing, Stack, align, opposed, stacks_of
from .units import Unit

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["Placement", "Pool"]

_NUMBER = re.compile(r"[0-9]+")
_SURE = 0.95  # stacks that are less alike may have parts elsewhere
_CLAIM = 0.55  # of the smaller side's matrices at least this share has a partner, or nothing has


@dataclass(frozen=True)
class Placement:
    """The stacks of two sides.

    Args:
        source, target: the outermost stacks.
        pairings: those that correspond, inner ones too.
        apart: those that cannot.
    """

    source: Sequence[Stack] = ()
    target: Sequence[Stack] = ()
    pairings: Sequence[Pairing] = ()
    apart: Sequence[tuple[Stack, Stack]] = ()

    @classmethod
    def of(cls, source: Sequence[Unit], target: Sequence[Unit]) -> Placement:
        """What the units of two sides show."""
        one, two = stacks_of(source), stacks_of(target)
        return cls(one, two, align(one, two), opposed(one, two))

    def counted(self, side: int) -> frozenset[str]:
        """The paths before numbers that both sides have; side 0 is the source."""
        return frozenset((p.source, p.target)[side].at for p in self.pairings)

    def prefixes(self, side: int) -> frozenset[str]:
        """The same with numbers as `#`."""
        return frozenset(_NUMBER.sub("#", at) for at in self.counted(side))

    def allowed(self, a: UnitSide, b: UnitSide) -> Matrix:
        """Which pairs keep to their stacks.

        What every layer has comes from the layer that corresponds. What stands beside a stack goes beside its partner.
        """
        import numpy as np

        found = np.ones((len(a), len(b)))
        for pairing in self.pairings:
            if pairing.alike < _SURE:
                continue
            one, two = _places(a, pairing.source), _places(b, pairing.target)
            here = np.array([pairing.layers.get(v, -2) if v is not None else -1 for v, *_ in one])
            there = np.array([w if w is not None else -1 for w, *_ in two])
            # What one layer alone has may stand outside the layers on the other side.
            alone = [np.array([x for _, x, _ in rows]) for rows in (one, two)]
            free = (alone[0][:, None] & (there == -1)[None, :]) | ((here == -1)[:, None] & alone[1][None, :])
            found *= (here[:, None] == there[None, :]) | free
        for s, t in self.apart:
            found *= ~(_inside(a, s)[:, None] & _inside(b, t)[None, :])
        result: Matrix = found * self._beside(a, b) * self._repeated(a, b)
        return result

    def _repeated(self, a: UnitSide, b: UnitSide) -> Matrix:
        """What all layers have alike goes to what stands in layers, whichever these are."""
        import numpy as np

        if not self.source or not self.target:
            return np.ones((len(a), len(b)))
        ends = []
        for side, stacks in ((a, self.source), (b, self.target)):
            rows = [_places(side, stack) for stack in stacks]
            inside = np.array([any(r[n][0] is not None for r in rows) for n in range(len(side))])
            several = np.array([any(r[n][2] for r in rows) for n in range(len(side))])
            ends.append((inside, several))
        (inside, several), (within, many) = ends
        lost = (several[:, None] & ~within[None, :]) | (~inside[:, None] & many[None, :])
        kept: Matrix = (~lost).astype(float)
        return kept

    def region(self, side: int, path: str, least: float = _SURE) -> int:
        """The number of the pairing whose layers hold a path, 0 where none does; side 0 is the source.

        Args:
            least: how alike its stacks are at least.
        """
        for number, pairing in enumerate(self.pairings, 1):
            if pairing.alike >= least and (pairing.source, pairing.target)[side].holds(path) is not None:
                return number
        return 0

    def layer(self, side: int, path: str) -> tuple[int, int]:
        """The number of the pairing whose layers hold a path, and the target's number of the layer.

        Beside the layers of a tower the second is -1; 0, 0 where a path is in none.
        """
        number = self.region(side, path, least=0.0)
        if not number:
            return self.towers[side].get(path, 0), -1
        pairing = self.pairings[number - 1]
        layer = present((pairing.source, pairing.target)[side].holds(path), "the layer of a path in a stack")
        return number, layer if side else pairing.layers.get(layer, -1 - layer)

    @cached_property
    def towers(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """For each side: the path of a unit beside paired stacks -> the number of the pairing."""
        found: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for number, pairing in enumerate(self.pairings, 1):
            for side, stack in enumerate((pairing.source, pairing.target)):
                for unit in stack.around:
                    found[side].setdefault(unit.path, number)
        return found

    def _beside(self, a: UnitSide, b: UnitSide) -> Matrix:
        """Units beside stacks go to units beside their partners, where both belong to some tower."""
        import numpy as np

        one = {id(s): _among(a, {u.path for u in s.around}) for s in self.source}
        two = {id(t): _among(b, {u.path for u in t.around}) for t in self.target}
        shared, known = np.zeros((len(a), len(b)), dtype=bool), np.zeros(len(b), dtype=bool)
        for p in self.pairings:
            if id(p.source) in one and id(p.target) in two:
                shared |= one[id(p.source)][:, None] & two[id(p.target)][None, :]
                known |= two[id(p.target)]
        towers = np.logical_or.reduce([*one.values(), np.zeros(len(a), dtype=bool)])
        found = ~(towers[:, None] & known[None, :]) | shared
        apart = {(id(s), id(t)) for s, t in self.apart}
        # A unit may be beside several stacks, of which some do not contradict each other.
        for s, t in product(self.source, self.target) if apart else ():
            if (id(s), id(t)) not in apart:
                shared = shared | (one[id(s)][:, None] & two[id(t)][None, :])
        for s, t in self.apart:
            found &= ~(one[id(s)][:, None] & two[id(t)][None, :]) | shared
        kept: Matrix = found.astype(float)
        return kept

    def pool(self, a: UnitSide, b: UnitSide) -> Pool:
        """The pairs that are the same pair in another layer."""
        import numpy as np

        names: dict[tuple[Any, Any], int] = {}
        rows: list[Any] = []
        columns: list[Any] = []
        groups: list[int] = []
        seen: set[tuple[int, int]] = set()
        for pairing in reversed(self.pairings):  # inner ones come behind those that they are in
            if pairing.alike < _SURE:
                continue
            one, two = _members(a, pairing.source), _members(b, pairing.target)
            at = _NUMBER.sub("#", pairing.source.at), _NUMBER.sub("#", pairing.target.at)
            for v, w in pairing.layers.items():
                for i, first in one.get(v, ()):
                    for j, second in two.get(w, ()):
                        if (i, j) not in seen:
                            seen.add((i, j))
                            rows.append(i)
                            columns.append(j)
                            groups.append(names.setdefault(((at[0], first), (at[1], second)), len(names)))
        return Pool(np.array(rows, dtype=int), np.array(columns, dtype=int), np.array(groups, dtype=int))

    def unclaimed(
        self, a: UnitSide, b: UnitSide, pairs: Sequence[tuple[int, int]], doubted: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The pairs between stacks, or sides, that have too little in common for any part of one to go to the other.

        Modules have something in common where both own the same: of two networks, a module with a bias is not the one
        without.

        Args:
            doubted: pairs that count as something in common, though which of them hold is not known.
        """
        listed = [*pairs, *doubted]
        common = {(i, j) for i, j in listed if _is_matrix(a.units[i]) and _owned(a.units[i]) == _owned(b.units[j])}
        lost: set[tuple[int, int]] = set()
        for pairing in self.pairings:
            one, two = _inside(a, pairing.source), _inside(b, pairing.target)
            both = [(i, j) for i, j in listed if one[i] and two[j]]
            known = set(pairing.layers), set(pairing.layers.values())
            sizes = (
                sum(_is_matrix(u) and pairing.source.holds(u.path) in known[0] for u in a.units),
                sum(_is_matrix(u) and pairing.target.holds(u.path) in known[1] for u in b.units),
            )
            if sum(p in common for p in both) < _CLAIM * min(sizes):
                lost.update(both)
        left = [p for p in listed if p not in lost]
        sizes = sum(map(_is_matrix, a.units)), sum(map(_is_matrix, b.units))
        if sum(p in common for p in left) < _CLAIM * min(sizes):
            lost.update(left)
        return [p for p in pairs if p in lost]


@dataclass(frozen=True)
class Pool:
    """Pairs of units that are the same pair in several layers: what speaks for one speaks for all.

    Args:
        rows, columns: the pairs.
        groups: the number of the pair that each of them is an instance of.
    """

    rows: Any
    columns: Any
    groups: Any

    def mean(self, matrix: Matrix, mask: Any) -> Matrix:
        """A matrix in which all instances of a pair have the mean of those that are possible."""
        import numpy as np

        if not len(self.rows):
            return matrix
        here = mask[self.rows, self.columns]
        rows, columns, groups = self.rows[here], self.columns[here], self.groups[here]
        size = int(self.groups.max()) + 1
        total = np.bincount(groups, weights=matrix[rows, columns], minlength=size)
        count = np.bincount(groups, minlength=size)
        result: Matrix = matrix.copy()
        result[rows, columns] = (total / np.maximum(count, 1))[groups]
        return result


def _members(side: UnitSide, stack: Stack) -> dict[int, list[tuple[int, str]]]:
    """For each layer, its units with their paths in it."""
    found: dict[int, list[tuple[int, str]]] = {}
    for i, unit in enumerate(side.units):
        layer = stack.holds(unit.path)
        if layer is not None:
            found.setdefault(layer, []).append((i, unit.path[len(stack.at) + len(str(layer)) :]))
    return found


def _owned(unit: Unit) -> frozenset[str]:
    return frozenset(role for role, leaf in unit.leaves.items() if leaf.kind == "float")


def _is_matrix(unit: Unit) -> bool:
    return sum(n > 1 for n in unit.weight.shape) >= 2


def _places(side: UnitSide, stack: Stack) -> list[tuple[int | None, bool, bool]]:
    """For each unit, its layer in a stack, whether no other layer has such a unit, and whether all have it alike."""
    layers = [stack.holds(u.path) for u in side.units]
    tails = [u.path[len(stack.at) + len(str(v)) :] if v is not None else "" for u, v in zip(side.units, layers)]
    many = Counter(tails)
    alone = [v is not None and many[t] == 1 < len(stack.layers) for v, t in zip(layers, tails)]
    alike = Counter((t, u.weight.shape) for u, v, t in zip(side.units, layers, tails) if v is not None)
    every = [
        v is not None and alike[t, u.weight.shape] == len(stack.layers) > 1
        for u, v, t in zip(side.units, layers, tails)
    ]
    return list(zip(layers, alone, every))


def _inside(side: UnitSide, stack: Stack) -> Any:
    import numpy as np

    return np.array([stack.holds(u.path) is not None for u in side.units])


def _among(side: UnitSide, paths: set[str]) -> Any:
    import numpy as np

    return np.array([u.path in paths for u in side.units])
