"""Reading a header value by value, each of which must end within its part of the file.

Readers raise `Damaged`, a `ValueError`, with a reason; `reading` turns it into the error that a caller sees.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import CheckpointError, Diagnostic
from .format import OpenedSource

__all__ = ["Damaged", "HeaderCursor", "reading"]

_WINDOW = 4096
"""Bytes that are read at once; a header between two tensors is shorter."""


class Damaged(ValueError):
    """A header makes no sense; the text has the reason."""


class HeaderCursor:
    """A position in an opened file.

    >>> from ckptsurgery.storage.sources.byte_source import MemoryBuffer
    >>> with OpenedSource(MemoryBuffer("an example", bytes(range(10)))) as opened:
    ...     cursor = HeaderCursor(opened)
    ...     cursor.take(2), cursor.number("<H"), cursor.at, cursor.left
    (b'\\x00\\x01', 770, 4, 6)

    Args:
        opened: the file.
        at: where to begin.
        stop: where to end; the end of the file by default.
    """

    __slots__ = ("_held", "_opened", "_start", "at", "stop")

    def __init__(self, opened: OpenedSource, at: int = 0, stop: int | None = None) -> None:
        self._opened = opened
        self.at = at
        self.stop = opened.size if stop is None else stop
        self._start, self._held = 0, b""

    @property
    def left(self) -> int:
        """The bytes up to the end."""
        return self.stop - self.at

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes.

        Raises:
            Damaged: there are fewer.
        """
        begin = self.at - self._start
        if not 0 <= begin <= begin + nbytes <= len(self._held):
            if not 0 <= nbytes <= self.left:
                raise Damaged("it ends in its header")
            self._start, begin = self.at, 0
            self._held = self._opened.read_at(self.at, max(nbytes, min(_WINDOW, self.left)))
            if len(self._held) < nbytes:
                raise Damaged("it ends in its header")
        self.at += nbytes
        return self._held[begin : begin + nbytes]

    def skip(self, nbytes: int) -> int:
        """Pass over bytes without reading them; return where they begin."""
        if not 0 <= nbytes <= self.left:
            raise Damaged("it ends in its header")
        self.at += nbytes
        return self.at - nbytes

    def number(self, layout: str) -> int:
        """Return one number, by its code in `struct`."""
        found: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return found

    def text(self, nbytes: int) -> str:
        """Return UTF-8 text."""
        try:
            return self.take(nbytes).decode()
        except UnicodeDecodeError as error:
            raise Damaged(f"a text is not UTF-8: {error.reason}") from None


@contextmanager
def reading(name: str, help: str = "copy or download the file again") -> Iterator[None]:
    """Turn `Damaged` into the error for a header that makes no sense.

    Args:
        name: of the file.
        help: what to do.

    Raises:
        CheckpointError: the body raised `Damaged`.
    """
    try:
        yield
    except Damaged as error:
        text = f"{name!r} is damaged: {error}"
        raise CheckpointError(Diagnostic("bad-header", text, name, help=help)) from None
