"""A part of a byte source as a source of its own, such as a file in an archive."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from .byte_source import ByteSource, Range, read_at, truncated

__all__ = ["PartOfSource", "RangeReader"]


class PartOfSource:
    """Bytes `[offset, offset + size)` of a source, under its name.

    >>> from .byte_source import MemoryBuffer
    >>> part = PartOfSource(MemoryBuffer("an example", b"0123456789"), 3, 4)
    >>> with part.open() as file:
    ...     file.read()
    b'3456'

    Args:
        whole: the source.
        offset, size: which of its bytes.
    """

    def __init__(self, whole: ByteSource, offset: int, size: int) -> None:
        self.whole, self.offset, self.size = whole, offset, size
        self.name = whole.name

    @property
    def identity(self) -> tuple[object, ...]:
        """The identity of the whole, and which part of it this is."""
        return (*self.whole.identity, self.offset, self.size)

    def open(self) -> BinaryIO:
        """Open the part as a file."""
        file = self.whole.open()
        return io.BufferedReader(RangeReader(lambda at, n: read_at(file, self.offset + at, n), self.size, file.close))

    def read_into(self, ranges: Sequence[Range]) -> None:
        """Fill buffers."""
        for offset, buffer in ranges:
            if offset + len(buffer) > self.size:
                raise truncated(self.name, self.size, offset + len(buffer) - self.size)
        self.whole.read_into([(self.offset + offset, buffer) for offset, buffer in ranges])

    def close(self) -> None:
        """Release what the whole holds."""
        self.whole.close()


class RangeReader(io.RawIOBase):
    """A file over a function that reads ranges.

    Args:
        read: takes an offset and a number of bytes.
        size: the bytes that there are.
        done: called when the file is closed.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, done: Callable[[], Any]) -> None:
        super().__init__()
        self._read, self._size, self._done, self._at = read, size, done, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; return how many bytes there were."""
        view = memoryview(buffer).cast("B")
        data = self._read(self._at, min(len(view), max(0, self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close what is read from."""
        if not self.closed:
            self._done()
        super().close()
