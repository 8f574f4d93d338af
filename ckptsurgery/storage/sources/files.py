"""Reading byte ranges: each file is opened once, checked to be the one whose header was read, and kept open."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import CheckpointError, Diagnostic
from .byte_source import (
    MEMORY,
    ByteSource,
    LocalFile,
    MemoryBuffer,
    ProcessMemory,
    Range,
    changed,
    read_fully,
    stamp,
)
from .descriptors import Descriptors
from .remote import RemoteSource
from .system_errors import os_error
from .windows import Windows

__all__ = ["OpenFiles", "os_error", "read_regular", "stamp"]


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file that is one: a pipe would be waited for, and a device has no end.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "neither a file nor a folder", os.fspath(path))
        return file.read()


class OpenFiles:
    """The byte sources of one checkpoint. Local files are opened on first use, and kept open.

    A path is not an identity: the file behind it may be replaced between the reading of its header and that of its
    data. So each source's identity is recorded when its header is read, and compared whenever it is opened.

    Args:
        names: of the sources.
        sources: name -> source; a name that is not in it is the path of a local file.
    """

    def __init__(self, names: Iterable[str], sources: Mapping[str, ByteSource] = {}) -> None:
        found = {name: sources.get(name) or LocalFile.of(name, Path(name).stat()) for name in names}
        self._stamps = {name: source.identity for name, source in found.items() if isinstance(source, LocalFile)}
        self._others = {name: source for name, source in found.items() if name not in self._stamps}
        self._others[MEMORY] = ProcessMemory()
        self._read: set[str] = set()
        self._in_order: frozenset[str] = frozenset()
        self._windows = Windows()
        itself = weakref.ref(self)  # a cycle would keep the files open until a collection
        self._files = Descriptors(lambda path: itself()._open(path))  # type: ignore[union-attr]

    @contextmanager
    def using(self, name: str) -> Iterator[int | None]:
        """The descriptor of a local file, which stays open meanwhile; None for any other source.

        Raises:
            CheckpointError: closed already, not readable, or another file than at the start.
        """
        if name in self._others:
            yield None
            return
        with self._files.using(name) as descriptor:
            yield descriptor

    def _open(self, path: str) -> int:
        if self._files.closed:
            raise _closed(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._files.make_room():
                return self._open(path)
            raise os_error(error, path) from error
        if stamp(os.fstat(descriptor)) != self._stamps.get(path):
            os.close(descriptor)
            raise changed(path)
        self._read.add(path)
        if path in self._in_order:
            _read_ahead(descriptor)
        return descriptor

    def read_in_order(self, names: Iterable[str]) -> None:
        """Tell the system, now or when they are opened, that files will be read from front to back."""
        self._in_order |= set(names)
        for path in self._files.held() & self._in_order:
            with self._files.using(path) as descriptor:
                _read_ahead(descriptor)

    def check_unchanged(self) -> None:
        """Check that nothing wrote to the files that were read since their headers were read."""
        for path in [] if self._files.closed else sorted(self._read):
            with self._files.using(path) as descriptor:  # what had to make room is opened again, and so compared
                if stamp(os.fstat(descriptor)) != self._stamps.get(path):
                    raise changed(path)

    def read(self, name: str, offset: int, nbytes: int) -> bytearray:
        """Return bytes `[offset, offset + nbytes)` of a source."""
        buffer = bytearray(nbytes)
        self.read_into(name, offset, memoryview(buffer))
        return buffer

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a source's bytes at `offset`."""
        other = self._others.get(name)
        if other is not None:
            self._usable(name)
            other.read_into(((offset, buffer),))
            return
        held = self._files.take(name)
        try:
            read_fully(held.number, offset, buffer, name)
        finally:
            held.give()

    def read_ranges(self, name: str, ranges: Sequence[Range]) -> None:
        """Fill many buffers from one source, several at once where the source does that."""
        other = self._others.get(name)
        if other is None:
            for offset, buffer in ranges:
                self.read_into(name, offset, buffer)
        else:
            self._usable(name)
            other.read_into(ranges)

    def is_remote(self, name: str) -> bool:
        """Return whether a source is read faster by many ranges at once than one after another."""
        return isinstance(self._others.get(name), RemoteSource)

    def view(self, name: str, offset: int, nbytes: int) -> memoryview | None:
        """Return bytes of a source in memory without a copy; None for any other source."""
        other = self._others.get(name)
        return other.view(offset, nbytes) if isinstance(other, (ProcessMemory, MemoryBuffer)) else None

    def _usable(self, name: str) -> None:
        if self._files.closed and name != MEMORY:
            raise _closed(name)

    def map(self, path: str, offset: int, nbytes: int) -> tuple[mmap.mmap, int] | None:
        """A private, writable mapping that holds the range, and where the range starts in it; None if there is none."""
        if path in self._others:
            return None
        with self._files.using(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size < offset + nbytes:
                return None  # the plain read says so properly, where the mapping would kill the process
            return self._windows.over(path, descriptor, offset, nbytes, size)

    def close(self) -> None:
        """Closes what is open; tensors that were made already stay valid, and reads that go on are finished."""
        self._files.close()
        for source in self._others.values():
            source.close()


def _closed(name: str) -> CheckpointError:
    help = "read before close(), or open it again"
    return CheckpointError(Diagnostic("closed-checkpoint", "the checkpoint is closed", name, help=help))


def _read_ahead(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
