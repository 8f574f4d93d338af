"""Checkpoints within other files: records of a zip file, members of a tar archive."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from ..contents import Contents, Entry
from ..sources.byte_source import MemoryBuffer
from ..sources.parts import PartOfSource
from .format import OpenedSource
from .zip_archive import refused

__all__ = ["open_part", "open_record", "record_bytes"]

Read = Callable[[OpenedSource], Contents]

_TIMES = 1100  # bytes that deflate makes of one, and some more


def open_part(opened: OpenedSource, offset: int, nbytes: int, read: Read) -> Contents:
    """Return the contents of a part of a file; what lies there as it is, is read from the file itself.

    Args:
        opened: the file.
        offset, nbytes: the part.
        read: the reader of its format.

    Raises:
        CheckpointError: as the reader does.
    """
    with OpenedSource(PartOfSource(opened.source, offset, nbytes)) as inner:
        contents = read(inner)
    contents.entries = {key: _moved(entry, opened.name, offset) for key, entry in contents.entries.items()}
    contents.extras = {path: _moved(value, opened.name, offset) for path, value in contents.extras.items()}
    contents.sources[opened.name] = opened.source
    return contents


def open_record(opened: OpenedSource, name: str, read: Read) -> Contents:
    """Return the contents of a record of a zip file; a deflated one is unpacked in memory.

    Raises:
        CheckpointError: it is damaged, or as the reader does.
    """
    record = opened.archive.records[name]
    if record.stored:
        return open_part(opened, record.offset, record.nbytes, read)
    with OpenedSource(MemoryBuffer(f"{opened.name} ({name})", record_bytes(opened, name))) as inner:
        contents = read(inner)
        contents.sources[inner.name] = inner.source
    return contents


def record_bytes(opened: OpenedSource, name: str, at_most: int = 1 << 30) -> bytes:
    """Return the bytes of a record of a zip file, stored or deflated.

    Raises:
        CheckpointError: it is damaged, too large, or compressed in another way.
    """
    record = opened.archive.records[name]
    data = b""
    if record.nbytes <= min(at_most, _TIMES * opened.size):
        packed = opened.read_at(record.offset, record.packed)
        try:
            deflated = zlib.decompressobj(-zlib.MAX_WBITS)
            data = packed if record.stored else deflated.decompress(packed, record.nbytes + 1)
        except zlib.error:
            data = b""
    if len(data) != record.nbytes:
        raise refused(opened.name, "damaged-zip", f"has a record {name!r} that cannot be unpacked")
    return data


def _moved(value: Any, name: str, by: int) -> Any:
    """The same with all places in a file moved by so many bytes; parts that are shared are shared no more."""
    if isinstance(value, Entry):
        return value._replace(offset=value.offset + by) if value.file == name else value
    if type(value) is dict:
        return {key: _moved(part, name, by) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(part, name, by) for part in value)
    return value
