"""Reading byte ranges: each file is opened once, checked to be the one whose header was read, and kept open."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from ...errors import CheckpointError, Diagnostic
from .descriptors import Descriptors
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
    """The files of one checkpoint, opened on first use.

    A path is no identity: the file behind it may be replaced between the reading of its header and that of its data. So
    each file's identity is taken at the start and compared whenever it is opened; from then on the descriptor holds it.
    """

    def __init__(self, paths: Iterable[str], stamps: Mapping[str, tuple[int, ...]] = {}) -> None:
        self._stamps = {path: stamps.get(path) or stamp(Path(path).stat()) for path in paths}
        self._read: set[str] = set()
        self._in_order: frozenset[str] = frozenset()
        self._windows = Windows()
        itself = weakref.ref(self)  # a cycle would keep the files open until a collection
        self._files = Descriptors(lambda path: itself()._open(path))  # type: ignore[union-attr]

    def using(self, path: str) -> AbstractContextManager[int]:
        """The descriptor of a file, which stays open meanwhile.

        Raises:
            CheckpointError: closed already, not readable, or another file than at the start.
        """
        return self._files.using(path)

    def _open(self, path: str) -> int:
        if self._files.closed:
            raise CheckpointError(
                Diagnostic(
                    "closed-checkpoint",
                    "the checkpoint is closed",
                    path,
                    help="read before close(), or open it again",
                )
            )
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._files.make_room():
                return self._open(path)
            raise os_error(error, path) from error
        if stamp(os.fstat(descriptor)) != self._stamps.get(path):
            os.close(descriptor)
            raise _changed(path)
        self._read.add(path)
        if path in self._in_order:
            _read_ahead(descriptor)
        return descriptor

    def read_in_order(self, paths: Iterable[str]) -> None:
        """Tell the system, now or when they are opened, that files will be read from front to back."""
        self._in_order |= set(paths)
        for path in self._files.held() & self._in_order:
            with self.using(path) as descriptor:
                _read_ahead(descriptor)

    def check_unchanged(self) -> None:
        """Makes sure that nothing wrote to the files that were read since their headers were read."""
        for path in [] if self._files.closed else sorted(self._read):
            with self.using(path) as descriptor:  # what had to make room is opened again, and so compared
                if stamp(os.fstat(descriptor)) != self._stamps.get(path):
                    raise _changed(path)

    def read(self, path: str, offset: int, nbytes: int) -> bytearray:
        """Bytes `[offset, offset + nbytes)` of a file."""
        buffer = bytearray(nbytes)
        self.read_into(path, offset, memoryview(buffer))
        return buffer

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fills a buffer from a file's bytes at `offset`."""
        held, done = self._files.take(path), 0
        try:
            while done < len(buffer):
                count = os.preadv(held.number, [buffer[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(
                        Diagnostic(
                            "truncated-file",
                            f"the file ends at byte {offset + done}, {len(buffer) - done} bytes early",
                            path,
                            help="download or copy the file again",
                        )
                    )
                done += count
        except OSError as error:
            raise os_error(error, path) from error
        finally:
            held.give()

    def map(self, path: str, offset: int, nbytes: int) -> tuple[mmap.mmap, int] | None:
        """A private, writable mapping that holds the range, and where the range starts in it; None if there is none."""
        with self.using(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size < offset + nbytes:
                return None  # the plain read says so properly, where the mapping would kill the process
            return self._windows.over(path, descriptor, offset, nbytes, size)

    def close(self) -> None:
        """Closes what is open; tensors that were made already stay valid, and reads that go on are finished."""
        self._files.close()


def _read_ahead(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def _changed(path: str) -> CheckpointError:
    text = "the file was replaced or changed after its header was read"
    return CheckpointError(Diagnostic("file-changed", text, path, help="let the writer finish, then do this again"))


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another in its place, and from itself after something wrote to it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


_HELP = {
    errno.ENOENT: ("missing-file", "no such file", "check the path"),
    errno.EACCES: ("permission-denied", "no permission", "check the permissions of the file and its folder"),
    errno.EPERM: ("permission-denied", "no permission", "check the permissions of the file and its folder"),
    errno.EROFS: ("read-only", "the file system is read-only", "choose another folder"),
    errno.ENOSPC: (
        "disk-full",
        "no space left on the disk",
        "free some space, or choose another folder; nothing was replaced",
    ),
    errno.EDQUOT: (
        "disk-full",
        "the disk quota is used up",
        "free some space, or choose another folder; nothing was replaced",
    ),
    errno.EFBIG: (
        "file-too-large",
        "the file system cannot hold a file of this size",
        'max_shard_size="4GB" writes several files',
    ),
    errno.EISDIR: ("is-a-folder", "a folder where a file is expected", "name the file in it"),
    errno.ENOTDIR: ("not-a-folder", "a part of the path is a file, not a folder", "check the path"),
    errno.EMFILE: ("too-many-files", "too many open files", "ulimit -n 4096"),
    errno.EINVAL: ("bad-path", "this is no path", "check the path"),
    errno.ENAMETOOLONG: ("bad-path", "the file name is too long", "choose a shorter name"),
}


_CHECK = "check the path and the disk (its kernel log), then try again"


def os_error(error: OSError, path: str, doing: str = "read") -> CheckpointError:
    """The diagnostic for what the operating system refused."""
    code, text, help = _HELP.get(error.errno or 0, (f"{doing}-failed", error.strerror or str(error), _CHECK))
    return CheckpointError(Diagnostic(code, f"cannot {doing} {path!r}: {text}", path, help=help))
