"""Stacks of layers, and which stack of one side is which of the other.

A stack is a number in the keys behind which several layers are listed. Two stacks correspond as a whole: their layers
go by rank, the first to the first. Where one is longer, its last layers have no counterpart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from .units import Unit
from .vocabulary import EXCLUSIVE, STRUCTURAL, concepts, words

__all__ = ["Pairing", "Stack", "Tower", "align", "beyond", "opposed", "stacks_of"]

_NUMBER = re.compile(r"(\d+)")
_SEPARATORS = re.compile(r"[./]")
_ALIKE = 0.6  # layers of corresponding stacks have at least this share of each other's elements, on average
_INSIDE = 0.95  # the same inside a layer, where numbers count parts more often than layers
_BACK = 0.05  # by how much layers have to be more alike when one stack is counted backwards
_CLOSE = 0.15  # scores that differ by less than this do not tell two stacks apart
_CONTAINED = 0.9  # how alike a layer is to one that has all of its tensors, and more
_ODD = 0.3  # two layers that are less alike than this do not correspond, and neither do their stacks
_SLOPES = (  # the parts of a network that narrows and widens again
    frozenset(["down", "downs", "input", "encoder", "enc", "contracting"]),
    frozenset(["mid", "middle", "bottleneck"]),
    frozenset(["up", "ups", "output", "decoder", "dec", "expanding"]),
)
_INPUTS = next(group for group in EXCLUSIVE if "text" in group)
_TOWERS = tuple(g for g in EXCLUSIVE if g & {"encoder", "text", "upsample"})


@dataclass(frozen=True)
class Stack:
    """Layers behind one number.

    Args:
        at: the path before the number, outer numbers as they stand.
        layers: number -> how many elements the layer has.
        shapes: number -> the shapes in the layer, without ones, each sorted.
        inner: number -> the stacks inside that layer.
        around: the units of the tower that this stack belongs to, outside of all stacks.
    """

    at: str
    layers: Mapping[int, int]
    shapes: Mapping[int, Counter[tuple[int, ...]]] = field(default_factory=dict, repr=False)
    inner: Mapping[int, tuple[Stack, ...]] = field(default_factory=dict)
    around: tuple[Unit, ...] = ()

    def holds(self, path: str) -> int | None:
        """Return the number of the layer that contains a path, or None."""
        if not path.startswith(self.at):
            return None
        number = _NUMBER.match(path, len(self.at))
        return int(number[0]) if number and int(number[0]) in self.layers else None

    @property
    def nested(self) -> int:
        """How many layers there are when those inside are counted."""
        return sum(max(1, sum(len(s.layers) for s in self.inner.get(v, ()))) for v in self.layers)


@dataclass(frozen=True)
class Pairing:
    """Two stacks that correspond.

    Args:
        source, target: the stacks.
        layers: number in the source -> number in the target.
        alike: how alike corresponding layers are in size, 0 to 1.
        rivals: other stacks that fit one of the two as well, by their paths.
    """

    source: Stack
    target: Stack
    layers: Mapping[int, int]
    alike: float
    rivals: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether both have as many layers."""
        return len(self.source.layers) == len(self.target.layers)


def stacks_of(units: Sequence[Unit]) -> list[Stack]:
    """The outermost stacks of a side.

    >>> from .units import read_units
    >>> from ..specs import TensorSpec
    >>> keys = [f"enc.h.{i}.{m}.weight" for i in range(3) for m in ("fc", "norm")]
    >>> [(s.at, dict(s.layers)) for s in stacks_of(read_units((k, TensorSpec((2,), "F32")) for k in keys))]
    [('enc.h.', {0: 4, 1: 4, 2: 4})]
    """
    found = _stacks(units, 0)
    inside = {u.path for u in units if any(s.holds(u.path) is not None for s in found)}
    outside = [u for u in units if u.path not in inside]
    return [replace(s, around=_around(s, found, outside)) for s in found]


def _stacks(units: Sequence[Unit], start: int) -> list[Stack]:
    """The outermost stacks whose numbers begin behind a place in the paths."""
    under: dict[str, dict[int, list[Unit]]] = {}
    for unit in units:
        for number in _NUMBER.finditer(unit.path, start):
            under.setdefault(unit.path[: number.start()], {}).setdefault(int(number[0]), []).append(unit)
    found: list[Stack] = []
    for at in sorted(under, key=len):
        layers = under[at]
        sizes = sorted(len(members) for members in layers.values())
        deep = at.endswith((".", "/")) or len(layers) > 1 or _counts(at)
        if sizes[len(sizes) // 2] < 2 or not deep or any(_within(at, s) for s in found):
            continue
        if len(layers) == 1 and min(layers) > 1:
            continue
        inner = {}
        for value, members in layers.items():
            inside = _stacks(members, len(at) + len(str(value)))
            inner[value] = tuple(inside)
        counts = {v: sum(_elements(u) for u in members) for v, members in sorted(layers.items())}
        shapes = {v: Counter(_shapes(members)) for v, members in layers.items()}
        found.append(Stack(at, counts, shapes, inner))
    return found


def _counts(at: str) -> bool:
    """Whether the word before a number is one for layers, though there is only one layer."""
    return STRUCTURAL in {c for c, _ in concepts(_SEPARATORS.split(at)[-1])}


def _within(at: str, stack: Stack) -> bool:
    return at != stack.at and at.startswith(stack.at) and _NUMBER.match(at, len(stack.at)) is not None


def _shapes(units: Iterable[Unit]) -> list[tuple[int, ...]]:
    return [_canonical(leaf.shape) for unit in units for leaf in unit.leaves.values() if leaf.kind == "float"]


def _elements(unit: Unit) -> int:
    return sum(prod(leaf.shape) for leaf in unit.leaves.values() if leaf.kind == "float")


def _around(stack: Stack, stacks: Sequence[Stack], outside: Sequence[Unit]) -> tuple[Unit, ...]:
    """The units beside a stack: under the nearest module around it that has some, and nearer to no other stack."""
    cuts = [0, *(m.end() for m in _SEPARATORS.finditer(stack.at))]
    for cut in reversed(cuts):
        module = stack.at[:cut]
        apart = {
            _child(s.at, cut) for s in stacks if s.at.startswith(module) and not s.at.startswith(stack.at[: cut + 1])
        }
        apart -= {_child(stack.at, cut)}
        found = [u for u in outside if u.path.startswith(module) and _child(u.path, cut) not in apart]
        if found:
            return _of_one_input(stack.at, found)
    return ()


def _of_one_input(at: str, around: Sequence[Unit]) -> tuple[Unit, ...]:
    """The units beside a stack without those called after another kind of input, where these read two kinds.

    A tower whose layers are missing has no stack of its own, and what is left of it would be taken for the other's.
    """
    own = {c for segment in _SEPARATORS.split(at) for c, _ in concepts(segment)} & _INPUTS
    kept = [u for u in around if not (_called_after(u) - own)]
    return tuple(kept) if kept and len({*_entries(around)}) > 1 else tuple(around)


def _called_after(unit: Unit) -> set[str]:
    return {c for segment in unit.segments[:-1] for c, _ in concepts(segment)} & _INPUTS


def _child(path: str, cut: int) -> str:
    return _SEPARATORS.split(path[cut:], maxsplit=1)[0]


@dataclass(frozen=True)
class Tower:
    """What names and shapes say of the tower that a stack belongs to."""

    meant: frozenset[str]
    spelled: frozenset[str]
    shapes: Counter[tuple[int, ...]]
    entries: frozenset[str]

    @classmethod
    def of(cls, stack: Stack) -> Tower:
        """What is known of a stack's tower."""
        segments = [s for s in _SEPARATORS.split(_NUMBER.sub("", stack.at)) if s]
        shapes = Counter(_shapes(stack.around))
        return cls(
            frozenset(c for s in segments for c, _ in concepts(s)),
            frozenset(w for s in segments for w in words(s)),
            shapes,
            frozenset(_entries(stack.around)),
        )

    def contradicts(self, other: Tower) -> bool:
        """Whether the two are called by names that exclude each other, or read different kinds of input."""
        called = any(
            self.meant & group and other.meant & group and not self.meant & other.meant & group for group in _TOWERS
        )
        slopes = [[slope for slope in _SLOPES if slope & tower.spelled] for tower in (self, other)]
        called |= all(slopes) and not any(slope in slopes[1] for slope in slopes[0])
        return called or bool(self.entries and other.entries and not self.entries & other.entries)

    def affinity(self, other: Tower) -> float:
        """How much speaks for the two beside their layers."""
        found = 0.0
        for group in _TOWERS:
            one, two = self.meant & group, other.meant & group
            found += 1.0 if one & two else -0.3 if one or two else 0.0
        union = (self.shapes | other.shapes).total()
        found += (self.shapes & other.shapes).total() / union if union else 0.0
        found -= 0.1 * ("average" in self.meant ^ other.meant)  # the weights themselves before their averages
        spelled = self.spelled | other.spelled
        return found + 0.6 * len(self.spelled & other.spelled) / max(1, len(spelled))


def _canonical(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


def _entries(around: Iterable[Unit]) -> Iterable[str]:
    """What the units beside a stack read: `"image"` through a convolution, `"tokens"` through a table."""
    for unit in around:
        shape = [n for n in unit.weight.shape if n > 1]
        meant = {c for segment in unit.segments[-3:] for c, _ in concepts(segment)}
        if len(unit.weight.shape) >= 4 and not meant & {"shortcut", "head"}:
            yield "image"
        elif len(shape) == 2 and "token" in meant and not meant & {"segment", "position", "classtoken", "mask"}:
            yield "tokens"


def opposed(source: Sequence[Stack], target: Sequence[Stack]) -> list[tuple[Stack, Stack]]:
    """The pairs of stacks whose towers contradict each other."""
    towers = {id(s): Tower.of(s) for s in (*source, *target)}
    return [(s, t) for s in source for t in target if towers[id(s)].contradicts(towers[id(t)])]


def align(source: Sequence[Stack], target: Sequence[Stack], least: float = _ALIKE) -> list[Pairing]:
    """The stacks that correspond, inner ones behind those that they are in.

    Args:
        least: how alike stacks of unequal depth have to be.
    """
    towers = {id(s): Tower.of(s) for s in (*source, *target)}
    scored: list[tuple[float, float, Stack, Stack]] = []
    for one in source:
        for two in target:
            alike = _alike(one, two)
            same = len(one.layers) == len(two.layers)
            if (
                alike < (_ALIKE if same else least)
                or towers[id(one)].contradicts(towers[id(two)])
                or _flattened(one, two, alike)
            ):
                continue
            affinity = towers[id(one)].affinity(towers[id(two)])
            scored.append((3.0 * alike + affinity + 0.5 * same, alike, one, two))
    scored.sort(key=lambda row: (-row[0], row[2].at, row[3].at))
    found: list[Pairing] = []
    taken: set[str] = set()
    for score, alike, one, two in scored:
        if "s" + one.at in taken or "t" + two.at in taken:
            continue
        taken |= {"s" + one.at, "t" + two.at}
        rivals = [
            s.at if t is two else t.at
            for other, _, s, t in scored
            if score - other < _CLOSE and (s is one) != (t is two)
            and not ("s" + s.at in taken and s is not one) and not ("t" + t.at in taken and t is not two)
        ]  # fmt: skip
        layers = dict(_ranked(one, two))
        found.append(Pairing(one, two, layers, alike, tuple(rivals)))
        for v, w in layers.items():
            found += align(one.inner.get(v, ()), two.inner.get(w, ()), _INSIDE)
    return found


def _ranked(one: Stack, two: Stack) -> list[tuple[int, int]]:
    """Layers by rank, backwards where that is clearly better; by number where both count from the same one."""
    if len(one.layers) != len(two.layers) and min(one.layers) == min(two.layers):
        return [(v, v) for v in one.layers if v in two.layers]
    forth, back = list(zip(one.layers, two.layers)), list(zip(one.layers, reversed(two.layers)))
    if len(one.layers) != len(two.layers):
        return forth
    return back if _likeness(one, two, back) > _likeness(one, two, forth) + _BACK else forth


def _alike(one: Stack, two: Stack) -> float:
    return _likeness(one, two, _ranked(one, two))


def _likeness(one: Stack, two: Stack, ranked: Iterable[tuple[int, int]]) -> float:
    """How alike the layers that correspond are, on average; not at all where two of them are of different kinds."""
    found = []
    for v, w in ranked:
        n, m = one.layers[v], two.layers[w]
        size, both = min(n, m) / max(n, m, 1), one.shapes[v] & two.shapes[w]
        fewer = min(one.shapes[v], two.shapes[w], key=Counter.total)
        if max(size, _elements_of(both) / max(1, min(n, m))) < _ODD:
            return 0.0
        found.append(max(size, _CONTAINED * both.total() / max(1, fewer.total()) if fewer.total() > 2 else 0.0))
    return sum(found) / len(found) if found else 0.0


def _elements_of(shapes: Counter[tuple[int, ...]]) -> int:
    return sum(prod(shape) * count for shape, count in shapes.items())


def _flattened(one: Stack, two: Stack, alike: float) -> bool:
    """Whether one counts in stages, which hold several layers, what the other counts through."""
    if alike >= _INSIDE or (alike > _CONTAINED and len(one.layers) == len(two.layers)):
        return False
    for small, large in ((one, two), (two, one)):
        inner = [shapes for stacks in large.inner.values() for s in stacks for shapes in s.shapes.values()]
        first = next(iter(small.shapes.values()))
        size = _elements_of(first)
        if any(_elements_of(first & s) >= 0.9 * min(size, _elements_of(s)) > 0.5 * size for s in inner):
            return True  # a layer of one is like a layer inside the layers of the other
    if len(one.layers) == len(two.layers):
        return False
    return len(one.layers) == two.nested or one.nested == len(two.layers) or one.nested == two.nested > 1


def beyond(pairings: Iterable[Pairing], side: int, paths: Iterable[str]) -> set[str]:
    """The paths in layers of a paired stack that have no counterpart; side 0 is the source."""
    ends = [((p.source, p.target)[side], set(p.layers.values() if side else p.layers)) for p in pairings if not p.whole]
    found = set()
    for path in paths:
        for stack, known in ends:
            layer = stack.holds(path)
            if layer is not None and layer not in known:
                found.add(path)
    return found
