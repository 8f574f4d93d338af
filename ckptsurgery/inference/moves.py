"""From matched units to tensors: which parts make which, with which axes, and what that takes on trust."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from ..narrowing import present
from .shapes import ShapeRelation, relations
from .sides import UnitSide
from .units import Leaf, Unit

__all__ = ["TensorMove", "resolve"]

_LETTERS = "abcdefgh"
_CUT = ("heads", "width")  # names of two axes that are one axis on the other side
_EMBEDDED = frozenset({"embedding", "token", "position", "segment", "classtoken"})


@dataclass(frozen=True)
class TensorMove:
    """What becomes of some tensors; one of the two sides has one key, or both have.

    Args:
        sources, targets: keys, in the order in which they are concatenated or stacked.
        left, right: the axis lists; empty where the tensor moves as it is. The axis that fuses is `p`, the stacked `e`.
        fuse: how several are one, as in `Leaf`.
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
    votes = _Votes(a.kernels != b.kernels)
    for i, j in listed:
        votes.hear(a.units[i], b.units[j], a.bags[i])
    moves = []
    for i, j in listed:
        one, two = a.units[i], b.units[j]
        for role, leaf in two.leaves.items():
            if role in one.leaves:
                vote = _bare(one, two, a.bags[i]) or votes.moved(one, a.bags[i])
                moves += _moves(one, two, one.leaves[role], leaf, vote)
    return moves


def _bare(one: Unit, two: Unit, bag: Iterable[str]) -> bool:
    """Whether one is a bare matrix, multiplied from the right, and the other a layer's weight, from the left."""
    if one.roles | two.roles or _EMBEDDED & set(bag) or len(two.weight.shape) != 2:
        return False
    return (one.weight.keys[0] == one.path) != (two.weight.keys[0] == two.path)


class _Votes:
    """Whether matrices and convolutions change their axes' places, told by those whose shapes show it."""

    def __init__(self, turned: bool) -> None:
        self.count: Counter[tuple[str, bool]] = Counter({("matrix", True): int(turned)})

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
    square = ways[0].kind == "same" and (ways[-1].source == "[a b]" or agreeing[0].moved)
    return agreeing[0], frozenset({"square"} if square else ())


def _moves(one: Unit, two: Unit, x: Leaf, y: Leaf, vote: bool | None) -> list[TensorMove]:
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


Axis = tuple[tuple[str, ...], int]  # the names in one axis, and its size; several names are merged


@dataclass(frozen=True)
class _FusedWhole:
    """The tensor that parts make.

    Args:
        part: the names of a part's axes.
        axes: those of the whole; `p` or `e` counts the parts.
        sizes: of the parts along the axis where they are concatenated, where they differ.
        merged: whether axes of a part are one axis of the whole.
    """

    part: tuple[str, ...]
    axes: tuple[Axis, ...]
    sizes: tuple[int, ...] = ()
    merged: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole's sizes."""
        return tuple(n for _, n in self.axes)

    def spelled(self, way: ShapeRelation, widths: Sequence[int]) -> tuple[str, str] | None:
        """The axis lists of a part and of the single tensor, of which some axes are `widths` axes; None without any."""
        order: list[int | None] = list(range(len(self.axes)))  # None for an axis of size one that is added
        if way.kind != "same":
            letters = way.source[1:-1].split()
            if way.kind not in ("transpose", "squeeze") or len(letters) != len(self.axes) or "1" in letters:
                return None
            order = [letters.index(n) if n in letters else None for n in way.target[1:-1].split()]
        part = list(self.part)
        found: list[str] = []
        for place, width in zip(order, widths):
            names = ("1",) if place is None else self.axes[place][0]
            if width > 1:
                if len(names) > 1 or names[0] not in part:
                    return None  # the axis that counts the parts is not cut
                part[part.index(names[0])] = f"({' '.join(_CUT)})"
                found += _CUT
            else:
                found.append(names[0] if len(names) == 1 else f"({' '.join(names)})")
        return _list(part), _list(found)


def _views(shape: Sequence[int], names: Sequence[str]) -> Iterator[tuple[tuple[Axis, ...], bool]]:
    """A tensor's axes as they are, and with two neighbours as one: the heads of a kernel and their widths."""
    plain = [((name,), n) for name, n in zip(names, shape)]
    yield tuple(plain), False
    for k in range(len(shape) - 1) if 1 < len(shape) < 5 else ():
        if min(shape[k : k + 2]) > 1:
            yield (*plain[:k], (_CUT, shape[k] * shape[k + 1]), *plain[k + 2 :]), True


def _wholes(many: Leaf) -> Iterator[_FusedWhole]:
    """The tensors that the parts could make."""
    fuse, parts, shape = many.fuse or "", [p.shape for p in many.parts], many.parts[0].shape
    count = "e" if "index" in fuse or fuse == "stack" else "p"
    for view, merged in _views(shape, _LETTERS):
        part = tuple(n for names, _ in view for n in names)
        if fuse in ("stack", "stack parts"):
            yield _FusedWhole(part, (((count,), len(parts)), *view), (), merged)
            continue
        row = parts[:2] if fuse == "stack concat" else parts
        outer: tuple[Axis, ...] = ((("e",), len(parts) // 2),) if fuse == "stack concat" else ()
        for axis, (names, size) in enumerate(view):
            sizes = tuple(s[axis] for s in row) if not merged else (size,) * len(row)
            if not merged and any(s[:axis] + s[axis + 1 :] != shape[:axis] + shape[axis + 1 :] for s in row):
                continue
            if len(set(row)) > 1 and merged:
                continue
            ragged = len(set(sizes)) > 1
            own = names if merged and len(names) > 1 else ("rows:p",) if ragged else ("x",)
            axes = (*outer, *view[:axis], ((count, *own), sum(sizes)), *view[axis + 1 :])
            renamed = tuple(own[0] if n == names[0] and len(names) == 1 else n for n in part)
            yield _FusedWhole(renamed, axes, sizes if ragged else (), merged)


def _fused(many: Leaf, single: Leaf, vote: bool | None, forward: bool) -> list[TensorMove]:
    """Several tensors and the one that they make; written many to one, and turned around where it is the other way."""
    part = many.parts[0].shape
    square = len(part) == 2 and part[0] == part[1]
    trust = frozenset((*(("order",) if "concat" in (many.fuse or "") else ()), *(("square",) if square else ())))
    best: tuple[float, str, str, _FusedWhole, bool] | None = None
    for whole, (view, cut) in product(_wholes(many), _views(single.shape, _LETTERS)):
        if whole.merged and cut:
            continue
        for way in relations(whole.shape, tuple(n for _, n in view)):
            both = whole.spelled(way, [len(names) for names, _ in view])
            odd = 0.0 if vote is None or way.moved == vote else 2.0
            cost = way.cost + odd + 1.2 * (whole.merged or cut)
            if both is not None and (best is None or cost < best[0]):
                best = cost, *both, whole, cut
    if best is None:
        return []
    _, left, right, whole, cut = best
    keys = tuple(p.key for p in many.parts)
    shape = single.shape if cut else part
    dims: tuple[tuple[str, int], ...] = ()
    if cut == forward and (cut or whole.merged):
        listed = (right if cut else left)[1:-1].split()
        dims = ((_CUT[0], shape[listed.index(_CUT[0])]),)
    if not forward and "index" in (many.fuse or ""):
        dims = (*dims, ("e", len(keys)))
    if forward:
        return [TensorMove(keys, single.keys, left, right, many.fuse, whole.sizes, trust, dims)]
    return [TensorMove(single.keys, keys, right, left, many.fuse, whole.sizes, trust, dims)]


def _list(names: Sequence[str]) -> str:
    return f"[{' '.join(names)}]"
