"""Reading byte ranges: each file is opened once, checked to be the one whose header was read, and kept open.

A process may hold a thousand descriptors, and a checkpoint may have 10,000 shards: `Descriptors` are open files, so
many at once and no more. `Windows` are mappings that many tensors share; each holds a descriptor as long as one of its
tensors lives.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from .remote import RemoteSource
from .system_errors import os_error

__all__ = ["Descriptor", "Descriptors", "OpenFiles", "Windows", "fair_share", "os_error", "read_regular", "stamp"]

_MOST = 512


def fair_share() -> int:
    """How many descriptors one reader or one writer may take: a quarter of what the process may have."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if limit == resource.RLIM_INFINITY else max(4, min(_MOST, limit // 4))


class Descriptor:
    """One open file: whoever retires it while it is in use leaves the closing to the last user.

    A number that was closed is given to the next file that anybody opens, and a reader must not find itself there.
    """

    __slots__ = ("_left", "_retired", "_users", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self._left = [number]
        self._users: list[None] = []
        self._retired = False

    def take(self) -> bool:
        """Whether it can be used now; then `give` must follow."""
        # Lists, since to append and to pop are one step each, and cheaper than a lock for 100,000 small reads.
        self._users.append(None)
        if not self._retired:
            return True
        self.give()
        return False

    def give(self) -> None:
        """The use is over."""
        self._users.pop()
        if self._retired:
            self.retire()

    def retire(self) -> None:
        """Close it, now or when the last user is done; a second call does nothing."""
        self._retired = True
        if not self._users:
            try:
                number = self._left.pop()
            except IndexError:
                return
            os.close(number)


class Descriptors:
    """Open files by path; where they are too many, the one that was opened first is closed, and opened again if needed.

    The very first stays: a writer's lock on it tells others that the writer lives.

    Args:
        opened: opens a path; what it raises is raised.
        leaving: hears of a file, before it is closed to make room.
    """

    def __init__(self, opened: Callable[[str], int], leaving: Callable[[str, int], None] | None = None) -> None:
        self._opened, self._leaving = opened, leaving
        self._held: dict[str, Descriptor] = {}
        self._lock = threading.RLock()  # a finalizer may come in the midst
        self._room = fair_share()
        self.closed = False
        self._finalizer = weakref.finalize(self, _retire_all, self._held)

    def take(self, path: str) -> Descriptor:
        """The open file, taken: `give` it when done."""
        while True:
            found = self._held.get(path) or self._open(path)
            if found.take():
                return found

    @contextmanager
    def using(self, path: str) -> Iterator[int]:
        """The number of the open file, which stays open meanwhile."""
        held = self.take(path)
        try:
            yield held.number
        finally:
            held.give()

    def held(self) -> set[str]:
        """The paths that are open now."""
        with self._lock:
            return set(self._held)

    def make_room(self) -> bool:
        """Close all that may be closed, since the process has no descriptor left; whether there was any."""
        with self._lock:
            before = len(self._held)
            while len(self._held) > 1:
                self._close_oldest()
            return len(self._held) < before

    def close(self) -> None:
        """Close all, each when its last user is done; nothing is opened from now on."""
        with self._lock:
            self.closed = True
            _retire_all(self._held)

    def _open(self, path: str) -> Descriptor:
        with self._lock:
            found = self._held.get(path)
            if found is not None:
                return found
            while len(self._held) >= self._room:
                self._close_oldest()
            made = self._held[path] = Descriptor(self._opened(path))
            return made

    def _close_oldest(self) -> None:
        path = next(path for number, path in enumerate(self._held) if number == 1)
        if self._leaving is not None:
            with self.using(path) as number:
                self._leaving(path, number)
        self._held.pop(path).retire()


def _retire_all(held: dict[str, Descriptor]) -> None:
    while held:
        held.popitem()[1].retire()


_ALONE = 64
_FIRST = 64 << 20


class Windows:
    """Private, writable mappings of parts of files.

    While few are alive, each is as large as what was asked for, so that what nobody uses is given back at once. A
    process that holds on to thousands of tensors gets larger ones, twice as large each time that many are alive.
    """

    def __init__(self) -> None:
        self._alive: dict[str, list[tuple[int, int, weakref.ref[mmap.mmap]]]] = {}
        self._lock = threading.Lock()
        self._most = fair_share()

    def over(self, path: str, descriptor: int, offset: int, nbytes: int, size: int) -> tuple[mmap.mmap, int] | None:
        """A mapping that holds the range, and where the range starts in it; None if there is none, or they are many.

        Args:
            size: of the file, which no mapping exceeds.
        """
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self._lock:
            count = self._count()
            for first, end, ref in self._alive.get(path, ()) if count > _ALONE else ():
                if first <= offset and offset + nbytes <= end and (found := ref()) is not None:
                    return found, offset - first
            if count >= self._most:
                return None
            wide = 0 if count < _ALONE else _FIRST << (count // _ALONE - 1)
            stop = min(size, max(offset + nbytes, start + wide))
            try:
                made = mmap.mmap(descriptor, stop - start, access=mmap.ACCESS_COPY, offset=start)
            except (OSError, ValueError):
                return None
            self._alive.setdefault(path, []).append((start, stop, weakref.ref(made)))
            return made, offset - start

    def _count(self) -> int:
        for path, some in list(self._alive.items()):
            kept = [window for window in some if window[2]() is not None]
            if kept:
                self._alive[path] = kept
            else:
                del self._alive[path]
        return sum(map(len, self._alive.values()))


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
