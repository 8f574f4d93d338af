"""Tensors that are archives within a file: `torch.save`d one after another, as distributed checkpoints hold them.

A checkpoint may hold 100,000 of them, of which one rank reads a few, so each is looked into only when it is read. Its
directory names the records; the local header, which torch pads, says where the elements begin; the pickle says how
they are strided. Pickles of tensors of one shape are equal, and each is read once.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ...errors import CheckpointError, Diagnostic
from ...specs import TensorSpec
from ..contents import Entry
from ..unpickling.inert import Storage, Tensor
from ..unpickling.pickle_machine import Unpickler
from .storages import StorageRun, place_tensor
from .torch_zip import persistent_storages

__all__ = ["Archive", "Archived", "locate"]

Read = Callable[[str, int, memoryview], None]

_TAIL = 1 << 10
_LARGEST = 16 << 20  # bytes of a directory or a pickle
_LOCAL = struct.Struct("<4s22xHH")
_END, _WIDE_END = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q")
_LOCATOR = 20
_ENTRY = struct.Struct("<4s6xH8xII3H8xI")
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_AGAIN = "copy or download the folder again"


class Archived(NamedTuple):
    """A tensor that is an archive of its own within a file.

    Args:
        spec: shape and dtype, as the checkpoint's metadata has them.
        file, offset, nbytes: the archive.
    """

    spec: TensorSpec
    file: str
    offset: int
    nbytes: int


def locate(place: Archived, read: Read) -> Entry:
    """Return the entry of an archived tensor.

    Raises:
        CheckpointError: the archive is damaged, or holds another tensor than the metadata says.
    """
    archive = Archive(place.file, place.offset, place.nbytes, read)
    tensor = _tensor_in(archive.bytes_of("data.pkl"), place.file)
    if tensor is None:
        raise archive.damaged("holds no plain tensor")
    try:
        entry = place_tensor(tensor, archive.region(tensor.storage))
    except ValueError as error:
        raise archive.damaged(f"holds a tensor that cannot be read: {error}") from None
    if entry.spec != place.spec:
        raise archive.damaged(f"holds {entry.spec}; the metadata says {place.spec}")
    return entry


@lru_cache(1024)
def _tensor_in(pickle: bytes, source: str) -> Tensor | None:
    """The tensor that a pickle describes; None where it is anything else."""
    value = Unpickler(io.BytesIO(pickle), len(pickle), source, persistent_storages(source)).load()
    return value if type(value) is Tensor else None


class Archive:
    """The records of a zip archive that is a part of a file.

    Args:
        file, offset, nbytes: the archive.
        read: reads bytes of files.

    Raises:
        CheckpointError: it is no such archive.
    """

    def __init__(self, file: str, offset: int, nbytes: int, read: Read) -> None:
        self.file, self.offset, self.nbytes, self._read = file, offset, nbytes, read
        try:
            self.records = self._directory()
        except (struct.error, IndexError, ValueError) as error:
            raise self.damaged(f"is no torch archive ({error})") from None

    def damaged(self, why: str) -> CheckpointError:
        """The error for an archive that makes no sense."""
        text = f"the part of {self.file!r} at byte {self.offset:,} {why}"
        return CheckpointError(Diagnostic("damaged-chunk", text, self.file, help=_AGAIN))

    def _bytes(self, start: int, stop: int) -> bytes:
        """Bytes of the archive, counted from its beginning."""
        buffer = bytearray(stop - start)
        self._read(self.file, self.offset + start, memoryview(buffer))
        return bytes(buffer)

    def _directory(self) -> Mapping[str, tuple[int, int]]:
        """Name without the folder -> where the record's header is, and its size."""
        tail = self._bytes(max(0, self.nbytes - _TAIL), self.nbytes)
        sign, *_, count, nbytes, start, comment = _END.unpack(tail[-_END.size :])
        end = self.nbytes - _END.size
        if sign != b"PK\5\6" or comment:
            raise ValueError("it does not end as one does")
        if count == _MAX16 or _MAX32 in (nbytes, start):
            wide = tail[-_END.size - _LOCATOR - _WIDE_END.size : -_END.size - _LOCATOR]
            sign, *_, count, nbytes, start = _WIDE_END.unpack(wide)
            if sign != b"PK\6\6":
                raise ValueError("its directory is missing")
        if nbytes > _LARGEST or start + nbytes > end:
            raise ValueError("its directory is misplaced")
        first = self.nbytes - len(tail)
        data = tail[start - first :] if start >= first else self._bytes(start, start + nbytes)
        records: dict[str, tuple[int, int]] = {}
        at = 0
        for _ in range(count):
            sign, method, packed, size, name_size, extra_size, note_size, header = _ENTRY.unpack_from(data, at)
            at += 46
            name = data[at : at + name_size].decode()
            extra = data[at + name_size : at + name_size + extra_size]
            at += name_size + extra_size + note_size
            if sign != b"PK\1\2" or method or at > nbytes:
                raise ValueError("its records are compressed, or its directory is damaged")
            size, packed, header = _widened(extra, size, packed, header)
            name = name.partition("/")[2]
            if size != packed or header + size > start or name in records:
                raise ValueError(f"the record {name!r} is misplaced")
            records[name] = header, size
        return records

    def place(self, name: str) -> tuple[int, int]:
        """Where a record's bytes begin in the archive, and how many there are."""
        if name not in self.records:
            raise self.damaged(f"holds no record {name!r}")
        header, size = self.records[name]
        sign, name_size, extra_size = _LOCAL.unpack(self._bytes(header, header + _LOCAL.size))
        start = header + _LOCAL.size + name_size + extra_size
        if sign != b"PK\3\4" or start + size > self.nbytes:
            raise self.damaged(f"has a record {name!r} whose header is misplaced")
        return start, size

    def bytes_of(self, name: str) -> bytes:
        """The bytes of a small record."""
        start, size = self.place(name)
        if size > _LARGEST:
            raise self.damaged(f"has an absurdly large record {name!r}")
        return self._bytes(start, start + size)

    def region(self, storage: Storage) -> StorageRun:
        """Where the bytes of a storage are."""
        start, size = self.place(f"data/{storage.key}")
        big = "byteorder" in self.records and self.bytes_of("byteorder").strip() == b"big"
        return StorageRun(self.file, self.offset + start, size, big)


def _widened(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Sizes and place of a record, with those that do not fit into 32 bits taken from its extra field."""
    at = 0
    while _MAX32 in (size, packed, header) and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide: list[Any] = list(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            size = wide.pop(0) if size == _MAX32 else size
            packed = wide.pop(0) if packed == _MAX32 else packed
            header = wide.pop(0) if header == _MAX32 else header
            break
        at += 4 + length
    return size, packed, header
