"""A byte source while its header is read: its file is open, and what was learned of it is kept."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..sources.byte_source import ByteSource, LocalFile, read_at
from ..sources.system_errors import os_error
from .zip_archive import ZipArchive

__all__ = ["HEAD", "OpenedSource", "opening"]

HEAD = 1024
"""Bytes by which a file is recognised."""

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")


class OpenedSource:
    """A byte source whose header is being read.

    >>> from ckptsurgery.storage.sources.byte_source import MemoryBuffer
    >>> with OpenedSource(MemoryBuffer("an example", b"0123456789")) as opened:
    ...     opened.head[:4], opened.read_at(7, 10), opened.names
    (b'0123', b'789', ())

    Args:
        source: the source.

    Raises:
        CheckpointError: it cannot be opened.
    """

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.name = source.name
        self.size = source.size
        raw = source.open()
        self.file: BinaryIO = io.BufferedReader(raw) if isinstance(raw, io.FileIO) else raw

    @cached_property
    def head(self) -> bytes:
        """The first kilobyte."""
        return self.read_at(0, HEAD)

    @cached_property
    def archive(self) -> ZipArchive:
        """The directory of a zip file.

        Raises:
            CheckpointError: it is not a zip file, or a damaged one.
        """
        return ZipArchive(self.file, self.name)

    @property
    def names(self) -> Sequence[str]:
        """The names in a zip file; none for any other."""
        return tuple(self.archive.records) if self.head.startswith(_ZIP) else ()

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Return bytes `[offset, offset + nbytes)`, fewer at the end of the file."""
        there = max(0, self.size - offset)  # a read takes memory for all that it asks for
        return read_at(self.file, offset, min(nbytes, there))

    def __enter__(self) -> OpenedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


@contextmanager
def opening(source: str | os.PathLike[str] | OpenedSource) -> Iterator[OpenedSource]:
    """Open a path for the reading of its header; a source that is open already stays so.

    Raises:
        CheckpointError: it cannot be read.
    """
    if isinstance(source, OpenedSource):
        yield source
        return
    path = os.fspath(source)
    try:
        with OpenedSource(LocalFile.of(path, Path(path).stat())) as opened:
            yield opened
    except OSError as error:
        raise os_error(error, path) from error
