"""Gathering the elements of a region from files: read as they lie there, put in their places by numpy.

To move elements nobody has to know what they mean, so they are integers here, and torch is not imported. A matrix is
turned a panel of rows at a time, which lies in a core's cache while its columns become rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import local
from typing import TYPE_CHECKING, Any, NamedTuple

from ...planning.costing import TOGETHER
from ...planning.cutting import Region, extent_of, panels_of, run_length
from ...planning.layout import Layout, Piece
from ...planning.steps import Step
from ...storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np

    Row = np.ndarray[Any, Any]

__all__ = ["Batch", "GatheredRegion", "Gatherer", "batches_of"]

_ELEMENTS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
_LONG_LINE = 256  # elements
_CACHE_LINE = 64  # bytes
_KEPT = 32 << 20  # bytes; what is larger costs less to get than to hold, beside the tasks of all other threads


class _Buffers(local):
    """Memory of each thread that its tasks use again: fresh memory costs as much as what is done with it."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def take(self, name: str, count: int, size: int) -> Row:
        """So many elements of a size; what the name gave before is used again."""
        import numpy as np

        kept, nbytes = self._kept.get(name), count * size
        if kept is None or len(kept) < nbytes:
            kept = np.empty(nbytes, "u1")
            if nbytes <= _KEPT:
                self._kept[name] = kept
        return kept[:nbytes].view(_ELEMENTS[size])


@dataclass(frozen=True, slots=True)
class Batch:
    """Pieces of one geometry at even distances in the target: read one after another, put in place by one copy.

    Args:
        first: what the others are like.
        places: source and offset of each.
        span: elements that each spans in its source.
        step: elements from one to the next in the target.
        axis: the outermost in the source.
        line: elements that one step along it spans.
    """

    first: Piece
    places: tuple[tuple[int, int], ...]
    span: int
    step: int
    axis: int
    line: int

    @property
    def straight(self) -> bool:
        """Whether the target has the elements in the order in which they are read."""
        first = self.first
        return self.step == self.span == first.numel and first.source_strides == first.target_strides

    @property
    def turned(self) -> bool:
        """Whether lines of the source, which do not overlap, become columns of the target."""
        strides = self.first.source_strides
        return bool(strides) and strides[-1] != 1 and self.line <= strides[self.axis]


def batches_of(region: Region) -> list[Batch]:
    """A region's pieces, neighbours that are alike together, as many as are worth it."""
    return [_batch(pieces) for pieces in _alike(region.pieces)]


def _batch(pieces: Sequence[Piece]) -> Batch:
    first = pieces[0]
    shape, strides = first.shape, first.source_strides
    span = extent_of(shape, strides)
    step = pieces[1].target_offset - first.target_offset if len(pieces) > 1 else span
    axis = max(range(len(shape)), key=strides.__getitem__, default=0)
    line = span - (shape[axis] - 1) * strides[axis] if shape else 1
    return Batch(first, tuple((p.source, p.source_offset) for p in pieces), span, step, axis, line)


def _alike(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Neighbours of one geometry at even distances, as many as are worth to be read together."""
    start = 0
    for at in range(1, len(pieces) + 1):
        if at < len(pieces) and _continues(pieces, start, at):
            continue
        yield pieces[start:at]
        start = at


def _continues(pieces: Sequence[Piece], start: int, at: int) -> bool:
    first, last, piece = pieces[start], pieces[at - 1], pieces[at]
    if (piece.shape, piece.source_strides, piece.target_strides) != (
        first.shape,
        first.source_strides,
        first.target_strides,
    ):
        return False
    if (at + 1 - start) * extent_of(first.shape, first.source_strides) > TOGETHER:
        return False
    distance = pieces[start + 1].target_offset - first.target_offset
    return piece.target_offset - last.target_offset == distance


class GatheredRegion(NamedTuple):
    """A region of a target of a step, and how to gather it."""

    step: Step
    region: Region
    batches: Sequence[Batch]


@dataclass(frozen=True, slots=True)
class Gatherer:
    """Gathers parts; what a thread got is its own until it asks for the next one."""

    checkpoint: Checkpoint
    buffers: _Buffers = field(default_factory=_Buffers)

    def gathered(self, parts: Sequence[GatheredRegion], size: int, room: memoryview | None = None) -> Row:
        """The elements of parts in one row, one after another.

        Args:
            size: bytes of an element.
            room: memory to gather them in; one of the thread's own buffers where there is none.
        """
        flat = self._row(sum([part.region.stop - part.region.start for part in parts]), size, room)
        reads, start = _Reads(self.checkpoint, flat), 0
        for step, region, batches in parts:
            for batch in batches:
                at = start + batch.first.target_offset - region.start
                if batch.straight:
                    reads.add(step.sources, batch, at)
                    continue
                box = self.buffers.take("read", len(batch.places) * batch.span, size)
                _Reads(self.checkpoint, box).add(step.sources, batch, 0).finish()
                self._put(flat, at, batch, box, 0)
            start += region.stop - region.start
        reads.finish()
        return flat

    def turned(self, layout: Layout, target: int, sources: Mapping[int, Row], room: memoryview | None = None) -> Row:
        """A whole target's elements in one row, from sources in one row each; `room` as for `gathered`."""
        pieces = [part for piece in layout.into(target) for part in (panels_of(piece) if _crosses(piece) else (piece,))]
        size = sources[pieces[0].source].itemsize if pieces else 1
        flat = self._row(sum(piece.numel for piece in pieces), size, room)
        for piece in pieces:
            self._put(flat, piece.target_offset, _batch((piece,)), sources[piece.source], piece.source_offset)
        return flat

    def _row(self, count: int, size: int, room: memoryview | None) -> Row:
        """So many elements of a size, in the room that there is."""
        if room is None:
            return self.buffers.take("made", count, size)
        import numpy as np

        return np.frombuffer(room, _ELEMENTS[size])

    def _put(self, flat: Row, at: int, batch: Batch, row: Row, start: int) -> None:
        """Copy pieces from a row, in which they begin at distances of their span, to their places in another."""
        first, count, strides = batch.first, len(batch.places), batch.first.source_strides
        step, box = batch.span, (count, *first.shape)
        if batch.turned and batch.line >= _LONG_LINE:
            # Lines at distances of a power of two would displace each other in a core's cache.
            lines, apart = first.shape[batch.axis], batch.line + _CACHE_LINE // row.itemsize
            padded = self.buffers.take("padded", count * lines * apart, row.itemsize)
            shape = count, lines, batch.line
            a, b = _view(row, start, shape, (step, strides[batch.axis], 1)), (lines * apart, apart, 1)
            _view(padded, 0, shape, b)[...] = a
            row, start, step = padded, 0, lines * apart
            strides = tuple(apart if n == batch.axis else stride for n, stride in enumerate(strides))
        target = _view(flat, at, box, (batch.step, *first.target_strides))
        target[...] = _view(row, start, box, (step, *strides))


def _crosses(piece: Piece) -> bool:
    """Whether neighbours on one side are none on the other, so that a core's cache has to hold them meanwhile."""
    return not piece.contiguous and run_length(piece) == 1


class _Reads:
    """Reads runs of files into a row; those that adjoin on both sides are one."""

    def __init__(self, checkpoint: Checkpoint, row: Row) -> None:
        self._entries, self._read = checkpoint.entries, checkpoint.read_file_into
        self._size, self._buffer = row.itemsize, row.view("u1").data
        self._file: str | None = None
        self._ahead = self._start = self._stop = 0

    def add(self, sources: Sequence[str], batch: Batch, at: int) -> _Reads:
        """The runs that pieces span, to lie one after another from an element on."""
        size, entries, buffer, read = self._size, self._entries, self._buffer, self._read
        file, ahead, start, stop = self._file, self._ahead, self._start, self._stop
        at, nbytes = at * size, batch.span * size
        for source, first in batch.places:
            _, name, offset, _, _, _ = entries[sources[source]]
            distance = offset + first * size - at
            if at != stop or distance != ahead or name != file:
                if file is not None:
                    read(file, start + ahead, buffer[start:stop])
                file, ahead, start = name, distance, at
            at = stop = at + nbytes
        self._file, self._ahead, self._start, self._stop = file, ahead, start, stop
        return self

    def finish(self) -> None:
        """Read what is left."""
        if self._file is not None:
            self._read(self._file, self._start + self._ahead, self._buffer[self._start : self._stop])
            self._file = None


def _view(flat: Row, at: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Row:
    """A view of some elements; offset and strides in elements."""
    import numpy as np

    size = flat.itemsize
    return np.ndarray(shape, flat.dtype, flat, at * size, tuple(n * size for n in strides))
