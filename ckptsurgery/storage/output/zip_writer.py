"""`ZipWriter`: a zip file whose records are laid out beforehand and filled in any order; their checksums are kept."""

from __future__ import annotations

import bisect
import os
import threading
import zlib
from collections.abc import Sequence
from typing import Any

from ..contents import Extent
from ..formats.zip_records import Records
from .durability import SYNCED, Durability
from .staging import Output, Writer

__all__ = ["ZipWriter"]

_CHUNK = 1 << 20


class ZipWriter(Writer):
    """Writes a zip file; the bytes of its tensors, of a record each, may come in any order and from any thread.

    Args:
        output: the file, with what is known of its beginning.
        places: key -> where its bytes go.
        records: all records of the file.
        first: the number of the first that holds a tensor.
        sizes: bytes of each tensor; those that the caller does not owe come last.
        heads: bytes that stand before each tensor in its record; none by default.
        durability: whether to wait until all of it is on the disk.
    """

    def __init__(
        self,
        output: Output,
        places: dict[str, Extent],
        records: Records,
        first: int,
        sizes: Sequence[int],
        heads: Sequence[bytes] = (),
        durability: Durability = SYNCED,
    ) -> None:
        self._records, self._first, self._sizes_of = records, first, list(sizes)
        self._heads = list(heads) or [b""] * len(sizes)
        self._starts = [records.starts[first + n] + len(head) for n, head in enumerate(self._heads)]
        self._temporary = str(output.temporary)
        super().__init__([output], places, durability=durability)
        self._begun = list(map(zlib.crc32, self._heads))  # the checksum before the tensor's own bytes
        self._sums = [None if nbytes else crc for nbytes, crc in zip(self._sizes_of, self._begun)]
        self._sealed = bytearray(len(self._sums))  # whether the bytes before each tensor are written
        self._running: dict[int, tuple[int, int]] = {}  # tensor -> bytes seen in order, their checksum
        self._guard = threading.Lock()

    def adjoin(self, stop: int, offset: int) -> bool:
        """Whether a storage ends at one byte and the next that has any bytes begins at the other."""
        number = bisect.bisect_left(self._starts, stop) - 1
        if stop == offset or number < 0 or self._starts[number] + self._sizes_of[number] != stop:
            return stop == offset
        after = next((n for n in range(number + 1, len(self._starts)) if self._sizes_of[n]), number)
        return self._starts[after] == offset

    def write(self, file: str, offset: int, data: Any) -> None:
        """Writes a buffer at an offset of the file that `places` names; checksums are kept of what comes in order.

        One that spans several storages is written into: what stands between them is put there.
        """
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        number = max(0, bisect.bisect_right(self._starts, offset) - 1)
        if not view or offset + len(view) <= self._starts[number] + self._sizes_of[number]:
            super().write(file, offset, view)
            if view:
                self._sum(number, offset - self._starts[number], view)
        else:
            self._put(file, offset, view, self._fill(number, offset, view))

    def copy(self, file: str, offset: int, source: int, source_offset: int, nbytes: int) -> int:
        """Copy nothing: a zip file needs each record's checksum, so its bytes have to pass through memory."""
        return 0

    def _fill(self, number: int, offset: int, view: memoryview) -> int:
        """Take the checksums of the storages that a buffer spans, and put what stands between them there.

        Args:
            number: of the first.

        Returns:
            bytes of storages among those of the buffer.
        """
        starts, sizes, records, owed = self._starts, self._sizes_of, self._records, 0
        last = bisect.bisect_left(starts, offset + len(view)) - 1
        for n in range(number, last + 1):
            start, stop = max(0, starts[n] - offset), starts[n] + sizes[n] - offset
            part = view[start:stop]
            self._sum(n, offset + start - starts[n], part)
            owed += len(part)
            crc = self._sums[n]
            if crc is None or n == last:
                continue
            records.crcs[self._first + n] = crc
            view[stop : starts[n + 1] - offset] = records.seam(self._first + n + 1) + self._heads[n + 1]
            self._sealed[n + 1] = 1
        return owed

    def _sum(self, number: int, at: int, view: memoryview) -> None:
        """Carries the checksum of a storage on by the bytes that lie from `at` on."""
        if not at and len(view) == self._sizes_of[number]:
            self._sums[number] = zlib.crc32(view, self._begun[number])
            return
        with self._guard:
            # The checksum is made outside of the lock; who comes meanwhile finds itself out of order.
            seen, crc = self._running.get(number, (0, self._begun[number]))
            self._running[number] = (-1, 0)
        state = (seen + len(view), zlib.crc32(view, crc)) if at == seen else (-1, 0)
        with self._guard:
            self._running[number] = state
        if state[0] == self._sizes_of[number]:
            self._sums[number] = state[1]

    def _settle(self) -> None:
        """Take the checksums that are missing, and write the bytes before each tensor."""
        records, first, count = self._records, self._first, len(self._sums)
        sums = [self._checksum(number) if known is None else known for number, known in enumerate(self._sums)]
        records.crcs[first : first + count] = sums
        for number, sealed in enumerate(self._sealed):
            if not sealed:
                self._seam(first + number, self._heads[number])

    def _seam(self, number: int, data: bytes) -> None:
        """Writes what stands before a record's data, and the data."""
        before = self._records.seam(number)
        self._pwrite(self._temporary, self._records.starts[number] - len(before), memoryview(before + data))

    def _checksum(self, number: int) -> int:
        crc, at = self._begun[number], self._starts[number]
        with self._descriptors.using(self._temporary) as descriptor:
            for start in range(0, self._sizes_of[number], _CHUNK):
                count = min(_CHUNK, self._sizes_of[number] - start)
                crc = zlib.crc32(os.pread(descriptor, count, at + start), crc)
        return crc
