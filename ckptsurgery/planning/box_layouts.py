"""Rearrangements cut down to boxes.

A piece of a `Layout` relates elements of whole tensors. `restrict` cuts a piece to a box and renumbers its elements
within the box, and `between` does so for every box on both sides, so that what is left is a layout over plain, dense
arrays: the boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from operator import mul

from ..boxes import Box
from .layout import Layout, Piece, Shape, merged_axes

__all__ = ["between", "restrict", "strided"]


def restrict(piece: Piece, shape: Shape, box: Box) -> list[Piece]:
    """Cut a piece to a box of its source; source offsets and strides then count elements within the box.

    >>> rows = Piece(0, 0, (12,), 0, (1,), 0, (1,))
    >>> restrict(rows, (4, 3), Box((1, 0), (2, 3)))
    [Piece(source=0, target=0, shape=(6,), source_offset=0, source_strides=(1,), target_offset=3, target_strides=(1,))]

    Args:
        piece: a piece whose source is a dense tensor of this shape.
        shape: the source's shape.
        box: the part of the source that is at hand.
    """
    strides, inner = _dense(shape), _dense(box.extent)
    found = []
    for even, places in _without_carry(piece, shape, strides):
        start = _index(even.source_offset, shape, strides)
        parts = [even]
        for dimension, first in enumerate(start):
            axes = sorted(
                ((even.source_strides[n] // strides[dimension], n) for n, d in enumerate(places) if d == dimension),
                reverse=True,
            )
            low = box.low[dimension] - first
            parts = [cut for part in parts for cut in _within(part, axes, low, low + box.extent[dimension])]
        for part in parts:
            index = _index(part.source_offset, shape, strides)
            offset = sum((i - low) * stride for i, low, stride in zip(index, box.low, inner))
            steps = (
                0 if d is None else stride // strides[d] * inner[d] for d, stride in zip(places, part.source_strides)
            )
            found.append(_normal(replace(part, source_offset=offset, source_strides=tuple(steps))))
    return found


def between(layout: Layout, sources: Sequence[Sequence[Box]], targets: Sequence[Sequence[Box]]) -> Layout:
    """Relate the boxes of the sources to those of the targets.

    The tensors of the result are the boxes, one after another: all of the first source, all of the second, and so on.

    >>> turn = Layout(((2, 2),), ((2, 2),), (Piece(0, 0, (2, 2), 0, (1, 2), 0, (2, 1)),))
    >>> rows = [[Box((0, 0), (1, 2)), Box((1, 0), (1, 2))]]
    >>> len(between(turn, rows, [[Box.whole((2, 2))]]).pieces)
    2

    Args:
        sources, targets: for each tensor of the layout the boxes that are at hand; each is dense in C order.
    """
    firsts = [*accumulate(map(len, sources), initial=0)], [*accumulate(map(len, targets), initial=0)]
    pieces: list[Piece] = []
    for piece in layout.pieces:
        for a, here in enumerate(sources[piece.source], firsts[0][piece.source]):
            for part in restrict(piece, layout.sources[piece.source], here):
                back = part.inverse()
                for b, there in enumerate(targets[piece.target], firsts[1][piece.target]):
                    cut = restrict(back, layout.targets[piece.target], there)
                    pieces += (replace(p.inverse(), source=a, target=b) for p in cut)
    extents = [tuple(box.extent for boxes in side for box in boxes) for side in (sources, targets)]
    return Layout(extents[0], extents[1], tuple(pieces))


def strided(piece: Piece, shape: Shape, strides: Shape) -> list[Piece]:
    """Renumber a piece of a dense source for one whose memory has other strides.

    >>> piece, = strided(Piece(0, 0, (6,), 0, (1,), 0, (1,)), (2, 3), (10, 2))
    >>> piece.shape, piece.source_strides, piece.target_strides
    ((2, 3), (10, 2), (3, 1))

    Args:
        piece: a piece whose source is a dense tensor of this shape.
        shape: the source's shape.
        strides: those of its memory, in elements.
    """
    dense = _dense(shape)
    found = []
    for even, places in _without_carry(piece, shape, dense):
        offset = sum(i * step for i, step in zip(_index(even.source_offset, shape, dense), strides))
        steps = (0 if d is None else stride // dense[d] * strides[d] for d, stride in zip(places, even.source_strides))
        found.append(replace(even, source_offset=offset, source_strides=tuple(steps)))
    return found


def _dense(shape: Shape) -> Shape:
    """The strides of a dense tensor in C order, in elements."""
    return tuple(reversed([*accumulate(reversed(shape[1:]), mul, initial=1)])) if shape else ()


def _index(offset: int, shape: Shape, strides: Shape) -> Shape:
    """The index of the element at an offset of a dense tensor."""
    return tuple(offset // stride % size for size, stride in zip(shape, strides))


_Places = tuple[int | None, ...]
"""For each axis of a piece the dimension of the source that it runs along; None for one that stays in place."""


def _without_carry(piece: Piece, shape: Shape, strides: Shape) -> Iterator[tuple[Piece, _Places]]:
    """Part a piece until a step along any of its axes changes the index along one dimension of the source only.

    A run of elements that goes on from one row to the next becomes the rest of the first row, whole rows, and the
    beginning of the last one.
    """
    places = tuple(
        _dimension(stride, shape, strides) if size > 1 else None
        for size, stride in zip(piece.shape, piece.source_strides)
    )
    start = _index(piece.source_offset, shape, strides)
    for dimension, unit in enumerate(strides):
        axes = [n for n, place in enumerate(places) if place == dimension]
        even = all(piece.source_strides[n] % unit == 0 for n in axes)
        reach = sum((piece.shape[n] - 1) * piece.source_strides[n] for n in axes) // unit
        if not even or start[dimension] + reach >= shape[dimension]:
            for part in _parted(piece, axes, unit, start[dimension], shape[dimension]):
                yield from _without_carry(part, shape, strides)
            return
    yield piece, places


def _dimension(stride: int, shape: Shape, strides: Shape) -> int | None:
    """The dimension along which a stride is a step of less than its size."""
    inside = (n for n, size in enumerate(shape) if size > 1 and strides[n] <= stride < strides[n] * size)
    return next(inside, None)


def _parted(piece: Piece, axes: Sequence[int], unit: int, start: int, size: int) -> Iterator[Piece]:
    """The parts of a piece whose axes carry out of a dimension, which has this unit of elements and this size."""
    axis = max(axes, key=lambda n: piece.source_strides[n] * (piece.shape[n] - 1))
    count, (step, uneven) = piece.shape[axis], divmod(piece.source_strides[axis], unit)
    cuts: tuple[int, ...] = (0, count // 2, count)
    if not uneven and len(axes) == 1 and size % step == 0:
        row = size // step  # steps from one row to the same place in the next
        head = -(-(size - start) // step) if start >= step else 0
        if not head and count % row == 0:
            yield _in_rows(piece, axis, row)
            return
        cuts = (0, head or count // row * row, count)
    yield from (_along(piece, axis, begin, end) for begin, end in pairwise(cuts))


def _in_rows(piece: Piece, axis: int, row: int) -> Piece:
    """The same piece with an axis written as two, the inner one of this many elements."""

    def two(values: Shape, outer: int, inner: int) -> Shape:
        return (*values[:axis], outer, inner, *values[axis + 1 :])

    a, b = piece.source_strides[axis], piece.target_strides[axis]
    return replace(
        piece,
        shape=two(piece.shape, piece.shape[axis] // row, row),
        source_strides=two(piece.source_strides, a * row, a),
        target_strides=two(piece.target_strides, b * row, b),
    )


def _along(piece: Piece, axis: int, start: int, stop: int) -> Piece:
    """The elements `[start, stop)` of a piece along one of its axes, which stays an axis even where it is of one."""
    return replace(
        piece,
        shape=tuple(stop - start if n == axis else size for n, size in enumerate(piece.shape)),
        source_offset=piece.source_offset + start * piece.source_strides[axis],
        target_offset=piece.target_offset + start * piece.target_strides[axis],
    )


def _within(piece: Piece, axes: Sequence[tuple[int, int]], low: int, high: int) -> Iterator[Piece]:
    """The parts of a piece whose index along one dimension lies in `[low, high)`, counted from its first element.

    Args:
        axes: (step, axis) of each axis that runs along the dimension, the largest step first.
    """
    if not axes:
        if low <= 0 < high:
            yield piece
        return
    (step, axis), inner = axes[0], axes[1:]
    reach = sum((piece.shape[n] - 1) * s for s, n in inner)
    count = piece.shape[axis]
    first, last = max(0, -(-(low - reach) // step)), min(count, -(-high // step))  # those that have anything inside
    begin, end = max(first, -(-low // step)), min(last, (high - reach - 1) // step + 1)  # those that are all inside
    if begin >= end:
        begin = end = last
    else:
        yield _along(piece, axis, begin, end)
    for n in (*range(first, begin), *range(end, last)):
        yield from _within(_along(piece, axis, n, n + 1), inner, low - n * step, high - n * step)


def _normal(piece: Piece) -> Piece:
    """The piece with axes that run on made one, and without axes of one element."""
    boxes = sorted(zip(piece.target_strides, piece.shape, piece.source_strides), reverse=True)
    axes = list(merged_axes([box for box in boxes if box[1] != 1]))
    shape, source, target = (tuple(axis[n] for axis in axes) for n in (1, 2, 0))
    return replace(piece, shape=shape, source_strides=source, target_strides=target)
