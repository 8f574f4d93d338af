"""What a compressed file unpacks to: in memory while it is small, else in a temporary file without a name."""

from __future__ import annotations

import bz2
import io
import lzma
import os
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import BinaryIO

from ...errors import CheckpointError, Diagnostic
from .byte_source import ByteSource, MemoryBuffer, Range, read_fully
from .parts import RangeReader
from .system_errors import os_error

__all__ = ["UNPACKED", "UnpackedFile", "compression_of", "unpack", "unpack_command"]

UNPACKED = " (unpacked)"
"""Behind the name of a compressed file, the name of what it unpacks to."""

_IN_MEMORY = 64 << 20
_FREE, _TIMES = 1 << 30, 20  # bytes that any file may unpack to, and for each byte of a larger one
_BLOCK = 1 << 20
_XZ_MEMORY = 256 << 20
_PYTHON = "import zlib, sys; sys.stdout.buffer.write(zlib.decompress(sys.stdin.buffer.read()))"
_SHELL = {
    "gzip": "gunzip -c", "bzip2": "bunzip2 -c", "xz": "xz -dc", "lzma": "lzma -dc",
    "zlib": f'python -c "{_PYTHON}" <',
}  # fmt: skip
_FAILURES = (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)


def compression_of(head: bytes) -> str | None:
    """Return the compression by which a file begins: `gzip`, `bzip2`, `xz`, `lzma`, `zlib` or None.

    >>> compression_of(zlib.compress(b"x")), compression_of(bz2.compress(b"x")), compression_of(b"plain")
    ('zlib', 'bzip2', None)
    """
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "bzip2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if head[:2] in (b"x\x01", b"x\x9c", b"x\xda", b"x^"):
        try:
            return "zlib" if zlib.decompressobj().decompress(head, 1) else None
        except zlib.error:
            return None
    return "lzma" if _is_lzma(head) else None


def _is_lzma(head: bytes) -> bool:
    """Whether a stream of the older format of xz begins, which has no magic bytes: joblib's `lzma`."""
    window = int.from_bytes(head[1:5], "little")
    if head[:1] != b"]" or len(head) < 14 or window < 4096 or window & (window - 1) or head[13] != 0:
        return False
    try:
        lzma.LZMADecompressor(lzma.FORMAT_ALONE, _XZ_MEMORY).decompress(head, 1)
    except lzma.LZMAError:
        return False
    return True


def unpack(source: ByteSource, kind: str) -> ByteSource:
    """Return what a source unpacks to, as a source of its own.

    Args:
        source: the source.
        kind: its compression, as `compression_of` names it.

    Raises:
        CheckpointError: it is damaged, or unpacks to more than 1 GiB and 20 times its size.
    """
    name, limit = f"{source.name}{UNPACKED}", max(_FREE, _TIMES * source.size)
    memory, file, size = bytearray(), None, 0
    block: bytes | bytearray
    with source.open() as packed, ExitStack() as undone:
        for block in _explained(_blocks(packed, kind), source.name):
            size += len(block)
            if size > limit:
                text = f"{source.name!r} unpacks to more than {limit:,} bytes"
                help = f"if it is sound, unpack it: {unpack_command(kind, source.name)}"
                raise CheckpointError(Diagnostic("unsupported-format", text, source.name, help=help))
            if file is None:
                memory += block
                if len(memory) <= _IN_MEMORY:
                    continue
                file, block, memory = _temporary(name), memory, bytearray()
                undone.callback(_close, file)
            _write(file, block, name)
        undone.pop_all()
    if file is None:
        held = MemoryBuffer(name, memory)
        held.identity = (*source.identity, "unpacked")
        return held
    return UnpackedFile(name, file, size, (*source.identity, "unpacked"))


def unpack_command(kind: str, path: str) -> str:
    """Return a line for a shell that unpacks a file.

    >>> unpack_command("gzip", "x.pt.gz")
    "gunzip -c 'x.pt.gz' > new.bin"
    """
    return f"{_SHELL[kind]} {path!r} > new.bin"


class UnpackedFile:
    """Bytes in a temporary file without a name, which is gone when nothing refers to it any more."""

    def __init__(self, name: str, file: BinaryIO, size: int, identity: tuple[object, ...]) -> None:
        self.name, self.size, self.identity = name, size, identity
        self._descriptor = os.dup(file.fileno())
        file.close()
        weakref.finalize(self, os.close, self._descriptor)

    def open(self) -> BinaryIO:
        """Open the bytes as a file."""
        return io.BufferedReader(RangeReader(lambda at, n: os.pread(self._descriptor, n, at), self.size, lambda: None))

    def read_into(self, ranges: Sequence[Range]) -> None:
        """Fill buffers."""
        for offset, buffer in ranges:
            read_fully(self._descriptor, offset, buffer, self.name)

    def close(self) -> None:
        """Do nothing: what is unpacked once is kept as long as it can be asked for."""


def _temporary(name: str) -> BinaryIO:
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise os_error(error, name, "write") from error


def _close(file: BinaryIO) -> None:
    with suppress(OSError):  # what could not be written is tried once more
        file.close()


def _write(file: BinaryIO, block: bytes | bytearray, name: str) -> None:
    try:
        file.write(block)
        file.flush()
    except OSError as error:
        raise os_error(error, name, "write") from error


def _explained(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The blocks; a damaged file has an error of its own."""
    try:
        yield from blocks
    except _FAILURES as error:
        if isinstance(error, CheckpointError):
            raise
        text = f"{name!r} cannot be unpacked: {str(error)[:200]}"
        help = "it is truncated or damaged: copy or download it again"
        raise CheckpointError(Diagnostic("damaged-zip", text, name, help=help)) from None


def _blocks(packed: BinaryIO, kind: str) -> Iterator[bytes]:
    """The unpacked bytes, of one stream after another."""
    start: Callable[[], Unpacker] = {
        "gzip": lambda: _Deflate(31),
        "zlib": lambda: _Deflate(15),
        "bzip2": bz2.BZ2Decompressor,
        "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY),
        "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, _XZ_MEMORY),
    }[kind]  # type: ignore[assignment]
    stream, data = start(), b""
    while True:
        if stream.eof:
            data = (stream.unused_data or packed.read(_BLOCK)).lstrip(b"\0")  # zeros may fill the last block
            if not data:
                return
            stream = start()
        elif stream.needs_input:
            data = packed.read(_BLOCK)
            if not data:
                raise EOFError("it ends too early")
        else:
            data = b""
        yield stream.decompress(data, _BLOCK)


class Unpacker:
    """What the decompressors of `bz2` and `lzma` have in common."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, most: int) -> bytes:
        """Return at most so many bytes of what data unpack to."""
        raise NotImplementedError


class _Deflate(Unpacker):
    """zlib's decompressor with the face of the others."""

    def __init__(self, bits: int) -> None:
        self._stream = zlib.decompressobj(bits)

    @property
    def eof(self) -> bool:  # type: ignore[override]
        return self._stream.eof

    @property
    def needs_input(self) -> bool:  # type: ignore[override]
        return not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:  # type: ignore[override]
        return self._stream.unused_data

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, most)
