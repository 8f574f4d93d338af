"""How alike two units are before any context speaks: names, roles, ranks, sizes; as matrices, source by target."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from .index_evidence import (
    aligned_loops,
    by_counts,
    by_index,
    by_loops,
    by_sequence,
    by_series,
    canonical,
    ranks,
    spread,
)
from .placement import Placement
from .roles import SORTS
from .shapes import relations
from .sides import UnitSide
from .units import Unit
from .vocabulary import EXCLUSIVE, STRUCTURAL

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["WEIGHTS", "Evidence", "gather"]

# What each kind of evidence is worth. Set by hand; `scripts/score_inference.py --ablate` shows what each one gives.
WEIGHTS: Mapping[str, float] = {
    "name": 5.0,
    "spelling": 1.5,
    "exclusive": 1.5,
    "balance": 1.0,
    "role": 1.5,
    "leaves": 0.6,
    "shape": 0.8,
    "index": 1.2,
    "loops": 1.5,
    "series": 3.0,
    "order": 1.0,
    "size": 1.2,
    "norms": 1.5,
    "only": 2.5,
    "sequence": 2.0,
    "nest": 0.8,
    "count": 1.0,
}
_COPY = "average"
_FLOATS = ("weight", "bias", "mean", "var", "weight_g", "weight_v")


@dataclass
class Evidence:
    """Which pairs are possible, and what speaks for each.

    Args:
        mask: pairs whose shapes agree up to a rearrangement.
        features: kind of evidence -> matrix.
    """

    mask: Matrix
    features: dict[str, Matrix] = field(default_factory=dict)

    def total(self, weights: Mapping[str, float]) -> Matrix:
        """The weighted sum."""
        import numpy as np

        total = np.zeros(self.mask.shape)
        for name, matrix in self.features.items():
            total += weights.get(name, 0.0) * matrix
        return total


def gather(a: UnitSide, b: UnitSide, placement: Placement | None = None) -> Evidence:
    """All evidence between two sides, of whose stacks some are known to correspond."""
    import numpy as np

    mask, leaves, shape = _shapes(a, b)
    mask = mask * (_exclusive(a, b, (SORTS,)) == 0)  # a part of one attention is none of the other
    if placement is not None:
        mask = mask * placement.allowed(a, b)
    one, two = ([u.weight.shape for u in side.units] for side in (a, b))
    turned = _turned(a, b)
    alike = spread(one, two, lambda x, y: float(x == (y[::-1] if turned and len(y) == 2 else y)))
    aligned = aligned_loops(a, b)
    a.backwards = frozenset(p for (p, _), (_, back) in aligned.items() if back)
    found = Evidence(mask)
    found.features = {
        "name": _names(a, b),
        "spelling": _spelling(a, b),
        "exclusive": _exclusive(a, b),
        "balance": _balance(a, b),
        "role": _roles(a, b),
        "leaves": leaves,
        "shape": shape,
        "index": by_index(a, b, mask),
        "loops": by_loops(a, b, aligned),
        "series": by_series(a, b),
        "order": _order(a, b, mask),
        "size": _sizes(a, b),
        "norms": _norms(a, b),
        "only": np.maximum(_only(mask), 0.6 * _only(mask * alike)),
        "sequence": by_sequence(a, b),
        "nest": _nest(a, b),
        "count": by_counts(a, b, aligned),
    }
    return found


def _signature(unit: Unit) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return tuple((role, leaf.shape, leaf.kind) for role, leaf in unit.leaves.items())


def _shapes(a: UnitSide, b: UnitSide) -> tuple[Matrix, Matrix, Matrix]:
    """The mask; how many leaves have no partner; how much rearranging it takes."""
    one, two = [_signature(u) for u in a.units], [_signature(u) for u in b.units]
    costs: dict[tuple[Any, Any], tuple[float, float, float]] = {}

    def of(x: Any, y: Any) -> tuple[float, float, float]:
        if (x, y) not in costs:
            costs[x, y] = _fit({r: (s, k) for r, s, k in x}, {r: (s, k) for r, s, k in y})
        return costs[x, y]

    mask, leaves, shape = (spread(one, two, lambda x, y, i=i: of(x, y)[i]) for i in range(3))
    if _turned(a, b):
        shape = spread(one, two, lambda x, y: min(0.0, of(x, y)[2] + 1.0) if of(x, y)[0] else 0.0)
    return mask, leaves, shape


def _turned(a: UnitSide, b: UnitSide) -> bool:
    """Whether matrices lie the other way round on the other side: most that are not square fit only when turned.

    Where shapes leave it open, kernels of dense layers are [in, out] and weights [out, in], as their names are used.
    """
    if a.kernels != b.kernels:
        return True
    shapes = [
        {tuple(n for n in u.weight.shape if n > 1) for u in side.units if "weight" in u.leaves} for side in (a, b)
    ]
    there = [{s for s in side if len(s) == 2 and s[0] != s[1]} for side in shapes]
    same = len(there[0] & there[1])
    return len({s[::-1] for s in there[0]} & there[1]) > same


def _fit(x: Mapping[str, tuple[Any, str]], y: Mapping[str, tuple[Any, str]]) -> tuple[float, float, float]:
    shared = [r for r in x if r in y]
    if not shared or ("weight" in x) != ("weight" in y):
        return 0.0, 0.0, 0.0
    cost = 0.0
    for role in shared:
        ways = relations(x[role][0], y[role][0])
        if not ways or x[role][1] != y[role][1]:
            return 0.0, 0.0, 0.0
        cost += ways[0].cost
    apart = sum(r in _FLOATS for r in x.keys() ^ y.keys()) + 0.1 * len(x.keys() ^ y.keys())
    return 1.0, -float(apart), -min(cost, 1.5)


def _rarity(a: UnitSide, b: UnitSide) -> dict[str, float]:
    """Concept -> what it is worth: more where it is rare, little where only one side has it."""
    counts = [Counter(c for bag in side.bags for c in bag) for side in (a, b)]
    worth = {}
    for concept in sorted(counts[0].keys() | counts[1].keys()):
        shares = [counts[i][concept] / max(1, len(side)) for i, side in enumerate((a, b))]
        if 0.0 in shares:
            worth[concept] = 0.12
        else:
            worth[concept] = 0.25 + math.log(1.0 / math.sqrt(shares[0] * shares[1])) / math.log(2 + max(len(a), len(b)))
    worth[STRUCTURAL] = 0.1
    return worth


def _frozen(bags: Sequence[Mapping[str, float]]) -> list[tuple[tuple[str, float], ...]]:
    return [tuple(bag.items()) for bag in bags]


def _names(a: UnitSide, b: UnitSide) -> Matrix:
    worth = _rarity(a, b)

    def of(x: Any, y: Any) -> float:
        one, two = dict(x), dict(y)
        # fsum: a set of words has no order, and a rounded sum depends on one
        both = math.fsum(min(w, two[c]) * worth[c] for c, w in one.items() if c in two)
        any_ = math.fsum(max(one.get(c, 0.0), two.get(c, 0.0)) * worth[c] for c in one.keys() | two.keys())
        return both / any_ if any_ else 0.0

    return spread(_frozen(a.bags), _frozen(b.bags), of)


def _spelling(a: UnitSide, b: UnitSide) -> Matrix:
    """Runs of three characters that the last segments share; the whole family being the same counts too."""

    def grams(text: str) -> Counter[str]:
        text = "^" + text.lower().replace("_", "") + "$"
        return Counter(text[i : i + 3] for i in range(len(text) - 2))

    table: dict[str, tuple[Counter[str], str]] = {}
    for side in (a, b):
        for family in side.families:
            table.setdefault(family, (grams(".".join(family.replace("/", ".").split(".")[-3:])), family))

    def of(x: str, y: str) -> float:
        one, two = table[x][0], table[y][0]
        union = (one | two).total()
        return (one & two).total() / union + (0.5 if x == y else 0.0) if union else 0.0

    return spread(a.families, b.families, of)


def _exclusive(a: UnitSide, b: UnitSide, groups: Sequence[frozenset[str]] = EXCLUSIVE) -> Matrix:
    def of(x: Any, y: Any) -> float:
        total = 0.0
        for group in groups:
            one, two = {c: w for c, w in x if c in group and w > 0.2}, {c: w for c, w in y if c in group and w > 0.2}
            if one and two and not one.keys() & two.keys():
                total -= min(max(one.values()), max(two.values())) ** 0.5
        if groups is EXCLUSIVE and (_COPY in dict(x)) != (_COPY in dict(y)):
            total -= 0.3  # the weights themselves before their copies
        return max(total, -3.0)

    return spread(_frozen(a.bags), _frozen(b.bags), of)


def _balance(a: UnitSide, b: UnitSide) -> Matrix:
    """A concept that is as frequent on one side as on the other belongs to both units of a pair or to none."""
    counts = [Counter(c for bag in side.bags for c in bag) for side in (a, b)]
    balanced = {c for c, n in counts[0].items() if counts[1].get(c) == n and n < 0.9 * min(len(a), len(b))} - {
        STRUCTURAL
    }

    def of(x: Any, y: Any) -> float:
        one, two = dict(x), dict(y)
        return -min(2.0, math.fsum(max(one.get(c, 0.0), two.get(c, 0.0)) for c in (one.keys() ^ two.keys()) & balanced))

    return spread(_frozen(a.bags), _frozen(b.bags), of)


def _roles(a: UnitSide, b: UnitSide) -> Matrix:
    def of(x: frozenset[str], y: frozenset[str]) -> float:
        if not x or not y:
            return 0.0
        return 1.0 if x & y else -2.0

    return spread([u.roles for u in a.units], [u.roles for u in b.units], of)


def _order(a: UnitSide, b: UnitSide, mask: Matrix) -> Matrix:
    """Rank of definition among units of one shape; nothing where a side is sorted by name."""
    import numpy as np

    if not (a.ordered and b.ordered):
        return np.zeros(mask.shape)
    rows = []
    for side in (a, b):
        keys = [(canonical(u), "mean" in u.leaves, len(u.weight.shape) > 1) for u in side.units]
        rows.append(ranks(side, keys, [u.order for u in side.units]))
    (rank_a, size_a), (rank_b, size_b) = rows
    ra, sa, rb, sb = (np.array(v, dtype=float) for v in (rank_a, size_a, rank_b, size_b))
    turned = np.array([any(p in a.backwards for p, _ in row) for row in a.slots])
    same = (sa[:, None] == sb[None, :]) * np.exp(-np.abs(ra[:, None] - rb[None, :]))
    near = 0.5 * np.exp(-8.0 * np.abs(ra[:, None] / sa[:, None] - rb[None, :] / sb[None, :]))
    result: Matrix = np.maximum(same, near) * mask * ~turned[:, None]
    return result


def _norms(a: UnitSide, b: UnitSide) -> Matrix:
    """The first norm of a block belongs to the first, the last to the last; of unequally many, by their words."""
    rank = tuple[tuple[tuple[int, int, bool], ...], float | None]

    def of(x: rank, y: rank) -> float:
        for (i, n, kin), (j, m, others) in product(x[0], y[0]):
            if n == m > 1 and kin == others:
                return 1.0 if i == j else -1.0
        if x[1] is None or y[1] is None or not (x[0] or y[0]):
            return 0.0
        # "After attention" and "before the feed-forward" are one place where a layer has one norm there.
        return 0.5 if x[1] == y[1] else 0.2 if {x[1], y[1]} == {1.0, 2.0} else -2.0

    return spread(list(zip(a.norm_ranks, a.norm_stages)), list(zip(b.norm_ranks, b.norm_stages)), of)


def _only(mask: Matrix) -> Matrix:
    """Each the only one that the other can be."""
    result: Matrix = mask * (mask.sum(axis=0, keepdims=True) == 1) * (mask.sum(axis=1, keepdims=True) == 1)
    return result


def _nest(a: UnitSide, b: UnitSide) -> Matrix:
    """What stands in a layer belongs to what stands in a layer."""
    return spread([bool(s) for s in a.slots], [bool(s) for s in b.slots], lambda x, y: 0.0 if x == y else -1.0)


def _sizes(a: UnitSide, b: UnitSide) -> Matrix:
    """Modules around both units that hold exactly the same number of elements."""
    counts = [Counter(side.elements.values()) for side in (a, b)]

    def rows(side: UnitSide) -> list[tuple[int, ...]]:
        total = max(side.elements.values(), default=1)
        return [
            tuple(dict.fromkeys(side.elements[p] for p in row if side.elements[p] < 0.95 * total))
            for row in side.prefixes
        ]

    def of(x: tuple[int, ...], y: tuple[int, ...]) -> float:
        shared = [n for n in x if n in y]
        if not shared:
            return 0.0
        return max(1.0 / math.sqrt(1 + abs(counts[0][n] - counts[1][n])) for n in shared)

    return spread(rows(a), rows(b), of)
