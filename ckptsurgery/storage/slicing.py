"""Indexing a tensor that has not been read: which rows an index touches, and reading no others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from ..specs import DTYPES, TensorSpec
from .chunked_tensors import Chunk, Chunked, chunks_of
from .contents import Entry

__all__ = ["rows_in", "rows_of"]


def rows_of(index: Any, length: int) -> tuple[int, int, Any] | None:
    """The rows that an index on the first dimension touches, and the same index within them; None for "ask torch".

    >>> rows_of(slice(2, 8, 3), 10), rows_of(-1, 10)
    ((2, 6, slice(None, None, 3)), (9, 10, 0))
    """
    if isinstance(index, slice):
        touched = range(length)[index]
        if not touched:
            return 0, 0, slice(None)
        # torch refuses negative steps; let it say so itself.
        return None if touched.step < 0 else (touched[0], touched[-1] + 1, slice(None, None, index.step))
    if isinstance(index, int) and not isinstance(index, bool) and -length <= index < length:
        row = index % length
        return row, row + 1, 0
    return None


def rows_in(entry: Entry, index: Any) -> tuple[Entry, Any] | None:
    """The part of a tensor that an index touches, and the index within it; None where all of it must be read."""
    first, *rest = index if isinstance(index, tuple) and index else (index,)
    in_files = entry.file is not None or chunks_of(entry)
    rows = rows_of(first, entry.spec.shape[0]) if in_files and _by_rows(entry.spec) else None
    if rows is None:
        return None
    lo, hi, within = rows
    return _part(entry, lo, hi), (within, *rest)


def _by_rows(spec: TensorSpec) -> bool:
    """Whether a row is a whole number of bytes, and torch counts rows as the header does."""
    return bool(spec.shape) and (DTYPES[spec.dtype].bits >= 8 or (len(spec.shape) > 1 and spec.shape[-1] % 2 == 0))


def _part(entry: Entry, lo: int, hi: int) -> Entry:
    shape, dtype = entry.spec.shape, DTYPES[entry.spec.dtype]
    if entry.strides is None:
        start = lo * (math.prod(shape[1:]) * dtype.bits // 8)
    else:
        start = lo * entry.strides[0] * dtype.itemsize
    spec = TensorSpec((hi - lo, *shape[1:]), entry.spec.dtype)
    if entry.file is None:
        return Entry(spec, tensor=Chunked(spec, tuple(_shifted(chunks_of(entry), lo, hi))))
    return Entry(spec, entry.file, entry.offset + start, entry.strides, entry.big_endian)


def _shifted(chunks: Iterable[Chunk], lo: int, hi: int) -> Iterator[Chunk]:
    """Chunks that hold some of the rows, counted from the first of these: one may begin before it, or end behind."""
    for chunk in chunks:
        if chunk.low[0] < hi and lo < chunk.box.high[0]:
            yield chunk._replace(low=(chunk.low[0] - lo, *chunk.low[1:]))
