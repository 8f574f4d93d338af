"""Numpy's files: an `.npy` is one array, an `.npz` a zip file of them; their bytes are read where they are stored.

A deflated array is unpacked when it is loaded, and then only as far as its header announces.
"""

from __future__ import annotations

import ast
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES
from ..contents import Contents, Entry
from ..sources.byte_source import ByteSource
from ..unpickling.inert import Array, Blob, NumpyType, Opaque, Storage
from ..unpickling.nodes import is_lost, lost
from ..unpickling.unreadable import unreadable_tensors
from .format import Announced, Format, OpenedSource
from .storages import StorageRun, place_all
from .zip_archive import Record, refused

if TYPE_CHECKING:
    from ..output.staging import Writer

__all__ = ["Inflated", "NpyFormat", "NpzFormat"]

_MAGIC = b"\x93NUMPY"
_LONGEST = 1 << 16  # bytes of a header; numpy itself refuses longer ones unless told otherwise
_OBJECTS = "import numpy, pickle; pickle.dump(numpy.load({path!r}, allow_pickle=True).tolist(), open('new.pkl', 'wb'))"
_FIELDS = "import numpy; a = numpy.load({path!r}); numpy.savez('new.npz', **{{n: a[n] for n in a.dtype.names}})"
_SEVERAL = (
    "import numpy, os; f = open({path!r}, 'rb'); numpy.savez('new.npz', *(numpy.load(f) for _ in "
    "iter(lambda: f.tell() < os.path.getsize({path!r}), False)))"
)
_ELSEWHERE = "save it where it was written in a type of numpy's own, such as float32"
_NUMBERS = {
    "V2": "import numpy, ml_dtypes; numpy.savez('new.npz', **{{k: v.view(ml_dtypes.bfloat16).astype('f4') "
    "if v.dtype == 'V2' else v for k, v in {arrays}}})",
    "f16": "import numpy; numpy.savez('new.npz', **{{k: v.astype('f8') if v.dtype.kind == 'f' else v "
    "for k, v in {arrays}}})",
}
_STORED = "import numpy; numpy.savez('new.npz', **numpy.load({path!r}))"


class NpyFormat(Format):
    """One array."""

    name = "npy"
    text = "a numpy array"
    suffixes = (".npy",)

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether numpy's magic bytes are at the start."""
        return head.startswith(_MAGIC)

    def read(self, opened: OpenedSource) -> Contents:
        """Return the array, under the key `tensor`.

        Raises:
            CheckpointError: its header cannot be read, it is truncated, or its elements are not numbers.
        """
        path = opened.name
        array = _array(opened.read_at(0, 12 + _LONGEST), 0, opened.size, path)
        if type(array) is Array and array.dtype is not None:
            end = opened.size - _nbytes_behind(array)
            if opened.read_at(end, len(_MAGIC)) == _MAGIC:
                text = f"{path!r} holds several arrays one after another, of which only the first would be read"
                raise CheckpointError(Diagnostic("trailing-bytes", text, path, help=_SEVERAL.format(path=path)))
        if isinstance(array, Opaque):
            what = array.note if is_lost(array) else f"a numpy array of {array.note}"
            text = f"{path!r} is {what}, which is not read here"
            help = f"if you trust the file, which runs code when it is loaded: {_OBJECTS.format(path=path)}"
            if (array.note or "").startswith("type ["):
                help = _FIELDS.format(path=path)
            elif is_lost(array):
                help = _converted(array, f"[('tensor', numpy.load({path!r}))]") or _ELSEWHERE
            raise CheckpointError(Diagnostic("unsupported-format", text, path, help=help))
        return Contents(place_all({"tensor": array}, _region, path))


class NpzFormat(Format):
    """A zip file of arrays, stored or deflated."""

    name = "npz"
    text = "a zip file of numpy arrays"
    suffixes = (".npz",)
    writes = (".npz",)

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether all names end as numpy's do."""
        return bool(names) and all(name.endswith(".npy") for name in names)

    def read(self, opened: OpenedSource) -> Contents:
        """Return the arrays by name; arrays of objects or texts are extras.

        Raises:
            CheckpointError: a header cannot be read, or there is no array of numbers.
        """
        source, archive, late = opened.name, opened.archive, dict[str, Entry]()
        leaves, extras = dict[str, Any](), dict[str, Any]()
        for name, record in archive.records.items():
            if record.deflated:
                head = _inflated(opened.read_at(record.offset, min(record.packed, 2 * _LONGEST)), 12 + _LONGEST)
                array = _array(head, 0, record.nbytes, source)
            else:
                stored = archive.stored(name, _STORED.format(path=source))
                head = opened.read_at(stored.offset, min(stored.nbytes, 12 + _LONGEST))
                array = _array(head, stored.offset, stored.nbytes, source)
            key = name.removesuffix(".npy")
            (leaves if type(array) is Array else extras)[key] = array
            if record.deflated and type(array) is Array:
                late[key] = _late(place_all({key: array}, _region, source)[key], record, opened.source)
        gone = {key: array for key, array in extras.items() if is_lost(array)}
        if gone and not leaves:
            kinds = {key: array.note or "" for key, array in gone.items()}
            help = _converted(next(iter(gone.values())), f"numpy.load({source!r}).items()")
            raise CheckpointError(unreadable_tensors(kinds, place=source, help=help))
        if not leaves:
            raise refused(source, "no-tensors", "holds no arrays of numbers", "name another file")
        return Contents(place_all(leaves, _region, source) | late, extras=extras)

    def writer(self, announced: Announced) -> Writer:
        """Return a writer of stored arrays.

        Raises:
            CheckpointError: a dtype that numpy does not have, or a tied name.
        """
        from ..output.npz_writer import NpzWriter

        a = announced
        made = NpzWriter(a.path, a.specs, a.aliases, a.durability)
        made.left_out = list(a.extras)
        return made


@dataclass(frozen=True, slots=True)
class Inflated:
    """An array in a deflated record, which is unpacked when it is called.

    Args:
        entry: where it lies in the record once that is unpacked.
        record: the record.
        source: what holds it.
    """

    entry: Entry
    record: Record
    source: ByteSource

    def __call__(self) -> Any:
        from ..tensors import span, swap_bytes, tensor_from

        spec, start, record = self.entry.spec, self.entry.offset, self.record
        packed = bytearray(record.packed)
        self.source.read_into(((record.offset, memoryview(packed)),))
        nbytes = spec.nbytes
        if self.entry.strides is not None:
            nbytes = span(spec.shape, self.entry.strides) * DTYPES[spec.dtype].itemsize
        data = _inflated(packed, start + nbytes)[start:]
        if len(data) < nbytes:
            why = f"is damaged: {record.name!r} unpacks to {len(data):,} bytes of {nbytes:,}"
            raise refused(self.source.name, "damaged-zip", why)
        buffer = bytearray(data)
        if self.entry.big_endian:
            buffer = swap_bytes(buffer, spec.dtype)
        return tensor_from(buffer, 0, spec, record.name, self.entry.strides)


def _late(entry: Entry, record: Record, source: ByteSource) -> Entry:
    return Entry(entry.spec, tensor=Inflated(entry, record, source))


def _inflated(packed: bytes | bytearray, most: int) -> bytes:
    """The first so many bytes of what was deflated, fewer where it is damaged or ends."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, most)
    except zlib.error:
        return b""


def _nbytes_behind(array: Array) -> int:
    """Bytes of an array's data that its shape does not need."""
    held = array.data.nbytes if type(array.data) is Blob else 0
    return max(0, held - prod(array.shape) * DTYPES[array.dtype or "U8"].itemsize)


def _region(storage: Storage) -> StorageRun:
    raise ValueError("a numpy array has no storage")


def _array(head: bytes, start: int, nbytes: int, source: str) -> Array | Opaque:
    """The array that begins with these bytes: its place and type, or what its elements are instead of numbers.

    Args:
        head: its first bytes, which hold its header.
        start: where it begins in the file.
        nbytes: how long it is, header included.
    """
    size, width = (head[8:10], 2) if head[6:7] == b"\1" else (head[8:12], 4)
    begin, length = 8 + width, int.from_bytes(size, "little")
    try:
        if not head.startswith(_MAGIC) or length > _LONGEST or begin + length > nbytes:
            raise ValueError("it is truncated")
        header = ast.literal_eval(head[begin : begin + length].decode("utf-8" if width == 4 else "latin-1"))
        kind, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
        if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("its shape makes no sense")
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        why = f"is a numpy array whose header cannot be read: {str(error).splitlines()[0][:200]}"
        raise refused(source, "unsupported-format", why, "copy it again, or have it written again by numpy") from None
    array = Array()
    array.type = NumpyType(kind.lstrip("<>|="), kind.startswith(">")) if type(kind) is str else None
    array.shape, array.fortran = shape, fortran is True
    array.data = Blob(start + begin + length, nbytes - begin - length, source)
    if array.dtype is not None:
        return array
    if type(kind) is str and kind.lstrip("<>|=")[:1] in ("f", "c", "i", "u", "V"):
        # numpy stores the types of ml_dtypes, such as bfloat16, as bytes without a meaning.
        raw = ", raw bytes as numpy stores bfloat16" if kind.endswith("V2") else ""
        return lost(f"a numpy array of type {kind!r}{raw}"[:200])
    return Opaque("numpy", "ndarray", (), "objects" if kind == "|O" else f"type {kind!r}"[:200])


def _converted(array: Opaque, arrays: str) -> str | None:
    """The line that writes arrays of numbers of a type that is not read here in one that is, or None."""
    for kind, line in _NUMBERS.items():
        if kind in (array.note or ""):
            return line.format(arrays=arrays)
    return None
