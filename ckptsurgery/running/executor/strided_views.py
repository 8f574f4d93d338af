"""Elements at their places in files, by views: to compare both sides of a rearrangement, or to make it."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ...planning.layout import Piece
from ...planning.steps import Program
from ...specs import DTYPES
from ...storage.checkpoint import Checkpoint

__all__ = ["Elements", "equal_at", "has_views"]

_TILE = 1 << 18  # elements
_MAP_FROM = 1 << 20
_FORGET_AFTER = 64  # tiles


@dataclass(frozen=True, slots=True)
class Elements:
    """A tensor's elements in one row, as bits: NaN is equal to itself, and 0 is not -0."""

    row: Any
    mapped: mmap.mmap | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, key: str) -> Elements:
        """A tensor's elements, mapped where they lie in a run of a file that is worth it, else read."""
        import numpy as np

        size, extent = DTYPES[checkpoint.specs[key].dtype].itemsize, checkpoint.extent(key)
        if extent is None or extent.nbytes < _MAP_FROM:
            return cls(np.frombuffer(checkpoint.read(key), f"<u{size}"), None)
        start = extent.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = extent.offset - start + extent.nbytes
        try:
            with checkpoint.using(extent.file) as descriptor:
                if descriptor is None:
                    return cls(np.frombuffer(checkpoint.read(key), f"<u{size}"), None)
                mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start)
        except (OSError, ValueError):  # no such thing here, or the file became shorter: reading says so properly
            return cls(np.frombuffer(checkpoint.read(key), f"<u{size}"), None)
        return cls(np.frombuffer(mapped, f"<u{size}", extent.nbytes // size, extent.offset - start), mapped)

    def box(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Any:
        """A view of some of them; strides and offset in elements."""
        import numpy as np

        size = self.row.itemsize
        return np.lib.stride_tricks.as_strided(
            self.row[offset:], shape, tuple(size * stride for stride in strides), writeable=False
        )

    def forget(self) -> None:
        """Give pages back; what is looked at again is fetched again."""
        if self.mapped is not None:
            with contextlib.suppress(OSError, AttributeError):
                self.mapped.madvise(mmap.MADV_DONTNEED)


def has_views(program: Program) -> bool:
    """Return whether a program is one rearrangement, of elements of 1, 2, 4 or 8 bytes."""
    specs = (*program.inputs, *program.outputs)
    return program.moves is not None and all(DTYPES[s.dtype].bits in (8, 16, 32, 64) for s in specs)


def equal_at(source: Elements, target: Elements, piece: Piece) -> bool:
    """Whether a piece's elements are equal on both sides, looked at in tiles."""
    for count, tile in enumerate(_tiles(piece)):
        a = source.box(tile.shape, tile.source_strides, tile.source_offset)
        b = target.box(tile.shape, tile.target_strides, tile.target_offset)
        if not (a == b).all():
            return False
        if count % _FORGET_AFTER == _FORGET_AFTER - 1:
            source.forget()
            target.forget()
    return True


def _tiles(piece: Piece) -> Iterator[Piece]:
    """A piece in parts that are as compact as may be on both sides: halved along the longest axis until small."""
    if piece.numel <= _TILE:
        yield piece
        return
    axis = max(range(len(piece.shape)), key=lambda n: piece.shape[n])
    half = piece.shape[axis] // 2
    for start, count in ((0, half), (half, piece.shape[axis] - half)):
        yield from _tiles(
            replace(
                piece,
                shape=(*piece.shape[:axis], count, *piece.shape[axis + 1 :]),
                source_offset=piece.source_offset + start * piece.source_strides[axis],
                target_offset=piece.target_offset + start * piece.target_strides[axis],
            )
        )
