"""From matched units to tensors: which parts make which, with which axes, and what that takes on trust."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..narrowing import present
from .shapes import ShapeRelation, relations
from .sides import UnitSide
from .units import Leaf, Unit

__all__ = ["TensorMove", "resolve"]

_LETTERS = "abcdefgh"
_EMBEDDED = frozenset({"embedding", "token", "position", "segment", "classtoken"})


@dataclass(frozen=True)
class TensorMove:
    """What becomes of some tensors; one of the two sides has one key, or both have.

    Args:
        sources, targets: keys, in the order in which they are concatenated or stacked.
        left, right: the axis lists; empty where the tensor moves as it is. The axis that fuses is `p`, the stacked `e`.
        fuse: how several are one: None, `"concat"`, `"stack"`, `"stack concat"`.
        sizes: the parts' sizes along the concatenated axis where they differ.
        trust: what headers do not show of it, as kinds: "square", "order", "rows".
        dims: sizes that no shape of the source shows.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    left: str = ""
    right: str = ""
    fuse: str | None = None
    sizes: tuple[int, ...] = ()
    trust: frozenset[str] = field(default_factory=frozenset)
    dims: tuple[tuple[str, int], ...] = ()


def resolve(a: UnitSide, b: UnitSide, pairs: Iterable[tuple[int, int]]) -> list[TensorMove]:
    """The moves that matched units make, in the order of the target."""
    listed = sorted(pairs, key=lambda p: b.units[p[1]].order)
    votes = _Votes()
    for i, j in listed:
        votes.hear(a.units[i], b.units[j], a.bags[i])
    moves = []
    for i, j in listed:
        one, two = a.units[i], b.units[j]
        for role, leaf in two.leaves.items():
            if role in one.leaves:
                moves += _moves(one, two, one.leaves[role], leaf, votes.moved(one, a.bags[i]), votes)
    return moves


class _Votes:
    """Whether matrices and convolutions change their axes' places, told by those whose shapes show it."""

    def __init__(self) -> None:
        self.count: Counter[tuple[str, bool]] = Counter()

    def hear(self, one: Unit, two: Unit, bag: Iterable[str]) -> None:
        x, y = one.leaves.get("weight"), two.leaves.get("weight")
        if x is None or y is None or _EMBEDDED & set(bag):
            return
        ways = relations(x.shape, y.shape)
        if ways and len({w.moved for w in ways}) == 1 and len(x.shape) > 1:
            self.count[_sort(x.shape), ways[0].moved] += 1

    def moved(self, one: Unit, bag: Iterable[str]) -> bool | None:
        """What the neighbours say of a unit; None where they say nothing."""
        if _EMBEDDED & set(bag) and not one.roles:
            return False
        weight = one.leaves.get("weight")
        if weight is None:
            return None
        sort = _sort(weight.shape)
        for name in (sort, "conv" if sort == "matrix" else "matrix"):
            yes, no = self.count[name, True], self.count[name, False]
            if yes + no:
                return yes > no
        return None


def _sort(shape: Sequence[int]) -> str:
    return "conv" if len(shape) > 3 or (len(shape) == 3 and shape[-1] < 16) else "matrix"


def _choose(ways: Sequence[ShapeRelation], vote: bool | None) -> tuple[ShapeRelation, frozenset[str]]:
    """The likeliest of the ways, and what it takes on trust."""
    if len({w.moved for w in ways}) == 1:
        return ways[0], frozenset()
    agreeing = [w for w in ways if w.moved == bool(vote)]
    square = ways[0].kind == "same" and ways[-1].source == "[a b]"
    return agreeing[0], frozenset({"square"} if square else ())


def _moves(one: Unit, two: Unit, x: Leaf, y: Leaf, vote: bool | None, votes: _Votes) -> list[TensorMove]:
    if x.fuse and y.fuse:
        if len(x.parts) != len(y.parts):
            return []
        pairs = zip(x.parts, y.parts)
        return [
            _single(p.key, q.key, q.shape, *_choose(relations(p.shape, q.shape), vote))
            for p, q in pairs
            if relations(p.shape, q.shape)
        ]
    if x.fuse:
        return _fused(x, y, vote, forward=True)
    if y.fuse:
        return _fused(y, x, vote, forward=False)
    way, trust = _choose(relations(x.shape, y.shape), vote)
    return [_single(x.keys[0], y.keys[0], y.shape, way, trust)]


def _single(source: str, target: str, shape: Sequence[int], way: ShapeRelation, trust: frozenset[str]) -> TensorMove:
    if way.kind != "split":
        return TensorMove((source,), (target,), way.source, way.target, trust=trust)
    # What is split on the way has sizes that only the target shows.
    group = present(re.search(r"\(([^)]*)\)", way.source), "the axis group of a split")
    letters = group[1].split()
    names = dict(zip(letters, ("heads", "width", "depth", "breadth")))
    left, right = (re.sub(r"[a-z]+", lambda m: names.get(m[0], m[0]), text) for text in (way.source, way.target))
    order = way.target[1:-1].split()
    dims = tuple((names[n], shape[order.index(n)]) for n in letters[:-1])
    return TensorMove((source,), (target,), left, right, trust=trust, dims=dims)


def _fused(many: Leaf, single: Leaf, vote: bool | None, forward: bool) -> list[TensorMove]:
    """Several tensors and the one that they make; written many to one, and turned around where it is the other way."""
    part = many.parts[0].shape
    stacked = "stack" in (many.fuse or "")
    best: tuple[float, str, str, frozenset[str], tuple[int, ...]] | None = None
    for axis in range(len(part)) if many.fuse != "stack" else [-1]:
        wide = 2 if many.fuse == "stack concat" else len(many.parts)
        row = [p.shape for p in many.parts[:wide]]
        if axis >= 0 and any(s[:axis] + s[axis + 1 :] != part[:axis] + part[axis + 1 :] for s in row):
            continue
        sizes = tuple(s[axis] for s in row) if axis >= 0 else ()
        ragged = len(set(sizes)) > 1
        names = list(_LETTERS[: len(part)])
        if axis >= 0:
            names[axis] = "rows:p" if ragged else "x"
        whole_names = [f"(p {n})" if k == axis else n for k, n in enumerate(names)]
        whole = [sum(sizes) if k == axis else n for k, n in enumerate(part)]
        if stacked:
            whole_names.insert(0, "e")
            whole.insert(0, len(many.parts) // (wide if axis >= 0 else 1))
        for way in relations(tuple(whole), single.shape):
            right = _renamed(way, whole_names)
            if right is None:
                continue
            odd = 0.0 if vote is None or way.moved == vote else 2.0
            trust = {"order"} if many.fuse != "stack" else set()
            if len(part) == 2 and part[0] == part[1]:
                trust.add("square")
            candidate = (way.cost + odd, _list(names), right, frozenset(trust), sizes if ragged else ())
            if best is None or candidate[0] < best[0]:
                best = candidate
    if best is None:
        return []
    _, left, right, held, ragged_sizes = best
    keys = tuple(p.key for p in many.parts)
    if forward:
        return [TensorMove(keys, single.keys, left, right, many.fuse, ragged_sizes, held)]
    return [TensorMove(single.keys, keys, right, left, many.fuse, ragged_sizes, held)]


def _renamed(way: ShapeRelation, names: Sequence[str]) -> str | None:
    """The other side's axis list, in the names of the whole's axes; None where the whole's ones matter."""
    if way.kind == "same":
        return _list(names)
    left = way.source[1:-1].split()
    if way.kind not in ("transpose", "squeeze") or len(left) != len(names):
        return None
    table = dict(zip(left, names))
    if "1" in left:
        return None
    return _list([table.get(n, n) for n in way.target[1:-1].split()])


def _list(names: Sequence[str]) -> str:
    return f"[{' '.join(names)}]"
