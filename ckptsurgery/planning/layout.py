"""A rearrangement as affine pieces: which elements of which source go where in which target.

Every move that the language can say (split, concatenate, stack, transpose, interleave, regroup, ragged or not) is a
list of pieces, each a box of elements with an offset and strides on both sides. Pieces say what a slice of a target
needs, they invert by swapping sides, and a piece whose elements lie in one run on both sides is a copy of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from ..errors import Diagnostic
from ..language.axes import Axis
from .solving import ConcreteDims, Equations, SizeError, extent

__all__ = ["Layout", "Piece", "Shape", "View", "arrange", "merged_axes", "run_piece", "side_by_side", "view"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of elements that moves as one.

    Args:
        source, target: which tensor on each side.
        shape: extents of the box, largest target stride first; neighbours that run on are merged, ones are left out.
        source_offset, source_strides, target_offset, target_strides: where the box lies, in elements.
    """

    source: int
    target: int
    shape: Shape
    source_offset: int
    source_strides: Shape
    target_offset: int
    target_strides: Shape

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the box is one run of elements on both sides."""
        return not self.shape or (self.source_strides == (1,) and self.target_strides == (1,))

    def inverse(self) -> Piece:
        """The same box, moved back."""
        boxes = sorted(zip(self.source_strides, self.shape, self.target_strides), reverse=True)
        strides, shape, back = zip(*boxes) if boxes else ((), (), ())
        return Piece(self.target, self.source, shape, self.target_offset, back, self.source_offset, strides)


@dataclass(frozen=True)
class Layout:
    """A rearrangement of tensors of one dtype.

    Args:
        sources, targets: shapes on both sides.
        pieces: what moves; together they fill every target exactly once.
    """

    sources: tuple[Shape, ...]
    targets: tuple[Shape, ...]
    pieces: tuple[Piece, ...]

    @cached_property
    def copies(self) -> tuple[int, ...] | None:
        """For each target the source that it is byte for byte (its shape may differ), or None."""
        found: dict[int, int] = {}
        for number, shape in enumerate(self.targets):
            if 0 in shape:
                # No piece leads to a target without elements: its source is the only one, or the one beside it.
                source = 0 if len(self.sources) == 1 else number
                if source >= len(self.sources) or 0 not in self.sources[source]:
                    return None
                found[number] = source
        for piece in self.pieces:
            whole = piece.contiguous and piece.numel == math.prod(self.targets[piece.target])
            same = piece.numel == math.prod(self.sources[piece.source])
            if not (whole and same):
                return None
            found[piece.target] = piece.source
        if len(found) == len(self.targets):
            return tuple(found[t] for t in range(len(self.targets)))
        return None

    @cached_property
    def contiguous(self) -> bool:
        """Whether every piece is one run on both sides, so that moving bytes is enough."""
        return all(p.contiguous for p in self.pieces)

    def into(self, target: int) -> Sequence[Piece]:
        """Return the pieces of one target, in the order of their first element."""
        return self._by_target.get(target, ())

    @cached_property
    def _by_target(self) -> Mapping[int, Sequence[Piece]]:
        found: dict[int, list[Piece]] = {}
        for piece in sorted(self.pieces, key=lambda p: p.target_offset):
            found.setdefault(piece.target, []).append(piece)
        return found

    def inverse(self) -> Layout:
        """The rearrangement back; it fills every source, unless elements were repeated or left out."""
        return Layout(self.targets, self.sources, tuple(p.inverse() for p in self.pieces))

    @property
    def invertible(self) -> bool:
        """Whether every source element goes to exactly one place."""
        moved = sum(p.numel for p in self.pieces)
        repeats = any(0 in p.source_strides for p in self.pieces)
        return not repeats and moved == sum(map(math.prod, self.sources))

    @classmethod
    def identity(cls, shapes: Sequence[Shape]) -> Layout:
        """Tensors that stay as they are."""
        pieces = tuple(run_piece(i, i, math.prod(s)) for i, s in enumerate(shapes) if math.prod(s))
        return cls(tuple(shapes), tuple(shapes), pieces)


def run_piece(source: int, target: int, numel: int, source_offset: int = 0, target_offset: int = 0) -> Piece:
    """One run of elements."""
    shape, strides = ((numel,), (1,)) if numel != 1 else ((), ())
    return Piece(source, target, shape, source_offset, strides, target_offset, strides)


def side_by_side(layouts: Sequence[Layout]) -> Layout:
    """Rearrangements of tensors that stand next to each other, as one."""
    if len(layouts) == 1:
        return layouts[0]
    sources: list[Shape] = []
    targets: list[Shape] = []
    pieces: list[Piece] = []
    for layout in layouts:
        a, b = len(sources), len(targets)
        pieces += [replace(p, source=p.source + a, target=p.target + b) for p in layout.pieces]
        sources += layout.sources
        targets += layout.targets
    return Layout(tuple(sources), tuple(targets), tuple(pieces))


@dataclass(frozen=True, slots=True)
class View:
    """One tensor as its elementary axes: shape, offset of the fixed ones, (size, stride) of the free ones."""

    shape: Shape
    offset: int
    axes: Mapping[str, tuple[int, int]]


def view(dims: ConcreteDims, fixed: Mapping[str, int], known: Mapping[str, int], sizes: Equations) -> View:
    """How a tensor lies, with the axes in `fixed` held at one index and the others free.

    Args:
        known: the value of every marker here, whether the key fixes it or `fixed` does.

    Raises:
        SizeError: a size that is not known.
    """
    shape = tuple(extent(sizes, axes, known) for axes in dims)
    offset, free = 0, {}
    step = math.prod(shape)
    for axes, size in zip(dims, shape):
        step = step // size if size else 0
        for at, axis in enumerate(axes):
            inner = axes[at + 1 :]
            if axis.name in fixed and axis.size is None:
                offset += step * _before(axis, inner, fixed[axis.name], known, sizes)
            elif axis.size != 1:
                free[axis.name] = (extent(sizes, (axis,), known), step * extent(sizes, inner, known))
    return View(shape, offset, free)


def _before(axis: Axis, inner: Sequence[Axis], value: int, known: Mapping[str, int], sizes: Equations) -> int:
    """Elements of a dimension before this value of one of its axes."""
    if not any(a.marker == axis.name for a in inner):
        return value * extent(sizes, inner, known)
    return sum(extent(sizes, inner, {**known, axis.name: v}) for v in range(value))


@dataclass(frozen=True, slots=True)
class Side:
    """The tensors of one side of a group: their dimensions and, for each, the index of every key-bound axis."""

    dims: ConcreteDims
    bound: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...]


def arrange(source: Side, target: Side, markers: Mapping[str, int], env: Mapping[str, int], sizes: Equations) -> Layout:
    """The pieces that take the tensors of one side to the other.

    Args:
        markers: axes on both sides that some axis' size depends on, with their extents; they are held fixed in turn.
        env: marker values that the group fixes.
    """
    places = {index: n for n, index in enumerate(target.indices)}
    scattered = sorted(set(target.bound) - set(source.bound))
    ranges = [sorted({i[target.bound.index(n)] for i in target.indices}) for n in scattered]
    loose = [n for n in markers if n not in source.bound and n not in scattered]
    looks_here, looks_there = _views(source, env, sizes), _views(target, env, sizes)
    pieces: list[Piece] = []
    shapes: dict[int, Shape] = {}
    target_shapes: dict[int, Shape] = {}
    for number, index in enumerate(source.indices):
        here = dict(zip(source.bound, index))
        for values in product(*ranges, *(range(markers[n]) for n in loose)):
            fixed = {**here, **dict(zip((*scattered, *loose), values))}
            where = places[tuple(fixed[n] for n in target.bound)]
            a, b = looks_here(fixed), looks_there(fixed)
            shapes[number], target_shapes[where] = a.shape, b.shape
            pieces.append(_piece(number, where, a, b))
    if len(shapes) < len(source.indices) or len(target_shapes) < len(target.indices):
        nothing = ", ".join([n for n, r in zip(scattered, ranges) if not r] + [n for n in loose if not markers[n]])
        raise SizeError(
            Diagnostic("no-extent", f"{nothing or 'an axis'} is 0, so nothing can be made", help="drop the key instead")
        )
    return Layout(
        tuple(shapes[n] for n in range(len(source.indices))),
        tuple(target_shapes[n] for n in range(len(target.indices))),
        tuple(p for p in pieces if p.numel),
    )


def _views(side: Side, env: Mapping[str, int], sizes: Equations) -> Callable[[Mapping[str, int]], View]:
    """How the tensors of a side lie, worked out once for all indices that make no difference to it."""
    names = {axis.name for axes in side.dims for axis in axes}
    asked = sorted(names | {axis.marker for axes in side.dims for axis in axes if axis.marker})
    seen: dict[tuple[int | None, ...], View] = {}

    def look(fixed: Mapping[str, int]) -> View:
        place = tuple(map(fixed.get, asked))
        if place not in seen:
            seen[place] = view(side.dims, {n: v for n, v in fixed.items() if n in names}, {**env, **fixed}, sizes)
        return seen[place]

    return look


def _piece(source: int, target: int, a: View, b: View) -> Piece:
    boxes = []
    for name, (size, stride) in b.axes.items():
        if size != 1:
            boxes.append((stride, size, a.axes[name][1] if name in a.axes else 0))
    merged = list(merged_axes(sorted(boxes, reverse=True)))
    shape = tuple(size for _, size, _ in merged)
    return Piece(
        source, target, shape, a.offset, tuple(s for _, _, s in merged), b.offset, tuple(t for t, _, _ in merged)
    )


def merged_axes(boxes: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Make axes one that run on, on both sides, given as (target stride, size, source stride), largest stride first."""
    open_box: tuple[int, int, int] | None = None
    for stride, size, back in boxes:
        if open_box and open_box[0] == stride * size and open_box[2] == back * size:
            open_box = (stride, open_box[1] * size, back)
        else:
            if open_box:
                yield open_box
            open_box = (stride, size, back)
    if open_box:
        yield open_box
