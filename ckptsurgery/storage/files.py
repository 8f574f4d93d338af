"""Reading byte ranges: each file is opened once, checked to be the one whose header was read, and kept open."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import CheckpointError, Diagnostic

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
    each file's identity is taken at the start and compared when it is opened; from then on the descriptor holds it.
    """

    def __init__(self, paths: Iterable[str], stamps: Mapping[str, tuple[int, ...]] = {}) -> None:
        self._stamps = {path: stamps.get(path) or stamp(Path(path).stat()) for path in paths}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._finalizer = weakref.finalize(self, _close_all, self._descriptors)

    def descriptor(self, path: str) -> int:
        """The open descriptor of a file.

        Raises:
            CheckpointError: closed already, not readable, or another file than at the start.
        """
        found = self._descriptors.get(path)
        if found is not None:
            return found
        with self._lock:
            if self._closed:
                raise CheckpointError(
                    Diagnostic(
                        "closed-checkpoint",
                        "the checkpoint is closed",
                        path,
                        help="read before close(), or open it again",
                    )
                )
            if path not in self._descriptors:
                self._descriptors[path] = self._open(path)
            return self._descriptors[path]

    def _open(self, path: str) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise os_error(error, path) from error
        if stamp(os.fstat(descriptor)) != self._stamps.get(path):
            os.close(descriptor)
            raise _changed(path)
        return descriptor

    def check_unchanged(self) -> None:
        """Makes sure that nothing wrote to the files that are open since their headers were read."""
        with self._lock:
            for path, descriptor in self._descriptors.items():
                if stamp(os.fstat(descriptor)) != self._stamps.get(path):
                    raise _changed(path)

    def read(self, path: str, offset: int, nbytes: int) -> bytearray:
        """Bytes `[offset, offset + nbytes)` of a file."""
        buffer = bytearray(nbytes)
        self.read_into(path, offset, memoryview(buffer))
        return buffer

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fills a buffer from a file's bytes at `offset`."""
        descriptor, done = self.descriptor(path), 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise os_error(error, path) from error
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

    def map(self, path: str, offset: int, nbytes: int) -> tuple[mmap.mmap, int] | None:
        """A private, writable mapping that holds the range, and where the range starts in it; None if there is none."""
        page = mmap.ALLOCATIONGRANULARITY
        start = offset // page * page
        descriptor = self.descriptor(path)
        if os.fstat(descriptor).st_size < offset + nbytes:
            return None  # the plain read says so properly, where the mapping would kill the process
        try:
            return mmap.mmap(descriptor, offset + nbytes - start, access=mmap.ACCESS_COPY, offset=start), offset - start
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Closes what is open; tensors that were made already stay valid."""
        with self._lock:
            self._closed = True
            self._finalizer()
            self._descriptors.clear()


def _close_all(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


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
