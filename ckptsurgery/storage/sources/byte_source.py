"""Byte sources: whatever bytes can be read from by ranges. A local file is one, memory is one, a remote object is one.

An `Entry` names its source by a string, `Contents.sources` maps the names to the sources.
"""

from __future__ import annotations

import ctypes
import io
import os
import stat as stat_module
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple, Protocol

from ...errors import CheckpointError, Diagnostic
from ...wording import counted
from .system_errors import os_error

__all__ = [
    "MEMORY",
    "ByteSource",
    "LocalFile",
    "MemoryBuffer",
    "ProcessMemory",
    "Range",
    "changed",
    "read_at",
    "read_fully",
    "read_run",
    "stamp",
    "truncated",
]

MEMORY = "memory"
"""Name of the source whose offsets are addresses of this process."""

Range = tuple[int, memoryview]
"""An offset, and the buffer to fill from there."""


class ByteSource(Protocol):
    """Bytes that can be read by ranges, from any thread."""

    @property
    def name(self) -> str:
        """The path or address, which messages show."""
        ...

    @property
    def size(self) -> int:
        """The number of bytes."""
        ...

    @property
    def identity(self) -> tuple[object, ...]:
        """What distinguishes these bytes from others under the same name: a file's stamp, an ETag, a commit."""
        ...

    def open(self) -> BinaryIO:
        """Open the bytes as a file that can be sought in, to read a header. The caller closes it."""
        ...

    def read_into(self, ranges: Sequence[Range]) -> None:
        """Fill buffers, several at once where that is faster.

        Raises:
            CheckpointError: a read failed, the source ends early, or its identity changed.
        """
        ...

    def close(self) -> None:
        """Release connections and descriptors. A later read opens them again."""
        ...


class LocalFile(NamedTuple):
    """A file of this machine. A checkpoint reads it through `OpenFiles`, which keeps descriptors open.

    Args:
        name: its path.
        size: in bytes.
        identity: its stamp when its header was read.
    """

    name: str
    size: int
    identity: tuple[int, ...]

    @classmethod
    def of(cls, name: str, status: os.stat_result) -> LocalFile:
        """A file as its status describes it."""
        return cls(name, status.st_size, stamp(status))

    def beside(self, name: str) -> LocalFile:
        """Return a file in the same folder, or below it."""
        path = os.path.join(os.path.dirname(self.name), *name.split("/"))  # noqa: PTH118, PTH120 - as the caller spells it
        try:
            status = os.stat(path)  # noqa: PTH116
        except (OSError, ValueError) as error:
            raise os_error(error if isinstance(error, OSError) else OSError(str(error)), path) from error
        if not stat_module.S_ISREG(status.st_mode):
            text = f"{path!r} is neither a file nor a folder"
            raise CheckpointError(Diagnostic("not-a-file", text, path, help="copy it into a file first"))
        return LocalFile.of(path, status)

    def open(self) -> BinaryIO:
        """Open the file, unbuffered."""
        try:
            file = open(self.name, "rb", buffering=0)  # noqa: PTH123, SIM115 - the path is kept as the caller spells it
        except OSError as error:
            raise os_error(error, self.name) from error
        if stamp(os.fstat(file.fileno())) != self.identity:
            file.close()
            raise changed(self.name)
        return file

    def read_into(self, ranges: Sequence[Range]) -> None:
        """Fill buffers."""
        with self.open() as file:
            for offset, buffer in ranges:
                read_fully(file.fileno(), offset, buffer, self.name)

    def close(self) -> None:
        """Do nothing: no descriptor is kept."""


class MemoryBuffer:
    """Bytes in memory under a name, such as what a compressed archive holds.

    >>> buffer = bytearray(3)
    >>> MemoryBuffer("an example", b"01234").read_into([(1, memoryview(buffer))])
    >>> bytes(buffer)
    b'123'
    """

    def __init__(self, name: str, data: bytes | bytearray | memoryview) -> None:
        self.name = name
        self._data = memoryview(data).cast("B")
        self.size = len(self._data)
        self.identity: tuple[object, ...] = (id(data), self.size)

    def open(self) -> BinaryIO:
        """Open a copy of the bytes as a file."""
        return io.BytesIO(self._data)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return some of the bytes, without a copy."""
        return self._data[offset : offset + nbytes]

    def read_into(self, ranges: Sequence[Range]) -> None:
        """Fill buffers."""
        for offset, buffer in ranges:
            found = self._data[offset : offset + len(buffer)]
            if len(found) < len(buffer):
                raise truncated(self.name, self.size, offset + len(buffer) - self.size)
            buffer[:] = found

    def close(self) -> None:
        """Do nothing: the memory is the caller's."""


class ProcessMemory:
    """The memory of this process; an offset is an address. Whoever reads keeps alive what is stored there."""

    name = MEMORY
    size = 1 << 64
    identity: tuple[object, ...] = ()

    def open(self) -> BinaryIO:
        """Refuse: the whole memory is not a file."""
        raise io.UnsupportedOperation("the memory of a process cannot be opened")

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return the bytes at an address, without a copy."""
        return memoryview((ctypes.c_ubyte * nbytes).from_address(offset)).cast("B")

    def read_into(self, ranges: Sequence[Range]) -> None:
        """Fill buffers."""
        for offset, buffer in ranges:
            # A second copy of a few bytes costs less than the array type that a view of them needs.
            buffer[:] = ctypes.string_at(offset, len(buffer)) if len(buffer) < 4096 else self.view(offset, len(buffer))

    def close(self) -> None:
        """Do nothing."""


def stamp(status: os.stat_result) -> tuple[int, ...]:
    """Return what distinguishes a file from another in its place, and from itself after something wrote to it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_fully(descriptor: int, offset: int, buffer: memoryview, name: str) -> None:
    """Fill a buffer from an open file.

    Raises:
        CheckpointError: the file ends early, or the system refuses.
    """
    done = 0
    try:
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise truncated(name, offset + done, len(buffer) - done)
            done += count
    except OSError as error:
        raise os_error(error, name) from error


def read_at(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    """Return bytes of an open file, fewer at its end; its position may change."""
    if isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        return os.pread(file.fileno(), nbytes, offset)  # one call where the others take two
    file.seek(offset)
    return file.read(nbytes)


def read_run(source: ByteSource, offset: int, nbytes: int) -> bytearray:
    """Return bytes of a source.

    Raises:
        CheckpointError: the source ends early, and what its `read_into` raises.
    """
    if offset + nbytes > source.size:  # before memory is taken for what a header announces
        raise truncated(source.name, source.size, offset + nbytes - source.size)
    data = bytearray(nbytes)
    source.read_into(((offset, memoryview(data)),))
    return data


def changed(name: str) -> CheckpointError:
    """Return the error for a source that is another one than when its header was read."""
    text = "the file was replaced or changed after its header was read"
    return CheckpointError(Diagnostic("file-changed", text, name, help="let the writer finish, then do this again"))


def truncated(name: str, end: int, missing: int) -> CheckpointError:
    """Return the error for a source that ends early."""
    text = f"the file ends at byte {end}, {counted(missing, 'byte')} early"
    return CheckpointError(Diagnostic("truncated-file", text, name, help="download or copy the file again"))
