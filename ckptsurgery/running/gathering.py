"""Gathering the elements of a region from files: read as they lie there, put in their places by numpy.

To move elements nobody has to know what they mean, so they are integers here, and torch is not imported. A matrix is
turned a panel of rows at a time, which lies in a core's cache while its columns become rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import local
from typing import TYPE_CHECKING, Any

from ..planning.costing import TOGETHER
from ..planning.cutting import Region, extent_of
from ..planning.layout import Piece
from ..storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Batch", "Gatherer", "batches_of"]

_ELEMENTS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}
_LONG_ROW = 256  # elements
_LINE = 64  # bytes


class _Buffers(local):
    """Memory of each thread that its tasks use again: fresh memory costs as much as what is done with it."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def take(self, name: str, count: int, size: int) -> np.ndarray[Any, Any]:
        """So many elements of a size; what the name gave before is used again."""
        import numpy as np

        kept = self._kept.get(name)
        if kept is None or len(kept) < count * size:
            self._kept[name] = kept = np.empty(count * size, "u1")
        return kept[: count * size].view(_ELEMENTS[size])


@dataclass(frozen=True, slots=True)
class Batch:
    """Pieces of one geometry at even distances in the target: read one after another, put in place by one copy.

    Args:
        first: what the others are like.
        places: source and offset of each.
        span: elements that each spans in its source.
        step: elements from one to the next in the target.
    """

    first: Piece
    places: tuple[tuple[int, int], ...]
    span: int
    step: int

    @property
    def straight(self) -> bool:
        """Whether the target has the elements in the order in which they are read."""
        first = self.first
        return self.step == self.span == first.numel and first.source_strides == first.target_strides


def batches_of(region: Region) -> list[Batch]:
    """A region's pieces, neighbours that are alike together, as many as are worth it."""
    return [_batch(pieces) for pieces in _alike(region.pieces)]


def _batch(pieces: Sequence[Piece]) -> Batch:
    first = pieces[0]
    span = extent_of(first.shape, first.source_strides)
    step = pieces[1].target_offset - first.target_offset if len(pieces) > 1 else span
    return Batch(first, tuple((p.source, p.source_offset) for p in pieces), span, step)


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


@dataclass(frozen=True, slots=True)
class Gatherer:
    """Gathers regions; what a thread got is its own until it asks for the next one."""

    checkpoint: Checkpoint
    buffers: _Buffers = field(default_factory=_Buffers)

    def gathered(
        self, region: Region, batches: Iterable[Batch], sources: Sequence[str], size: int
    ) -> np.ndarray[Any, Any]:
        """A region's elements in one row.

        Args:
            sources: the keys of the step.
            size: bytes of an element.
        """
        flat = self.buffers.take("made", region.stop - region.start, size)
        for batch in batches:
            self._fill(flat, batch.first.target_offset - region.start, batch, sources)
        return flat

    def _fill(self, flat: np.ndarray[Any, Any], at: int, batch: Batch, sources: Sequence[str]) -> None:
        first, count, span, size = batch.first, len(batch.places), batch.span, flat.itemsize
        if batch.straight:
            self._read(batch, sources, flat[at : at + count * span])
            return
        box = self.buffers.take("read", count * span, size)
        self._read(batch, sources, box)
        strides = (span, *first.source_strides)
        row = max(first.source_strides, default=0)
        if row >= _LONG_ROW and span == row * first.shape[first.source_strides.index(row)]:
            # Rows at distances of a power of two would displace each other in a core's cache.
            apart = row + _LINE // size
            padded = self.buffers.take("padded", count * span // row * apart, size)
            padded.reshape(-1, apart)[:, :row] = box.reshape(-1, row)
            box, strides = padded, tuple(n // row * apart if n >= row else n for n in strides)
        shape = (count, *first.shape)
        _view(flat, at, shape, (batch.step, *first.target_strides))[...] = _view(box, 0, shape, strides)

    def _read(self, batch: Batch, sources: Sequence[str], box: np.ndarray[Any, Any]) -> None:
        """The runs that pieces span, one after another."""
        entries, read = self.checkpoint.entries, self.checkpoint.read_file_into
        size, buffer, at = box.itemsize, box.view("u1").data, 0
        nbytes = batch.span * size
        for source, offset in batch.places:
            entry = entries[sources[source]]
            read(str(entry.file), entry.offset + offset * size, buffer[at : at + nbytes])
            at += nbytes


def _view(
    flat: np.ndarray[Any, Any], at: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """A view of some elements; offset and strides in elements."""
    import numpy as np

    size = flat.itemsize
    return np.ndarray(shape, flat.dtype, flat, at * size, tuple(n * size for n in strides))
