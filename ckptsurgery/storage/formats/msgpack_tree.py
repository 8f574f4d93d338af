"""Trees in msgpack: plain values are made, arrays are left where they are stored.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md. Arrays are Flax's extension types: 1 an array, 3 a
scalar of numpy, each a list in msgpack of shape, name of the dtype, and bytes; 2 a complex number. An array of more
than 2^30 bytes is a mapping of its shape and its flat chunks, marked by a key. Those of the package msgpack-numpy are
mappings whose keys are byte strings.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ...errors import CheckpointError
from ...specs import DTYPES, dtype_name
from ..unpickling.inert import Blob, NumpyType, Opaque, Storage, Tensor
from ..unpickling.nodes import lost
from .cursor import Damaged, HeaderCursor
from .storages import contiguous_strides

__all__ = ["CHUNKED", "ChunkedStorage", "TreeReader"]

CHUNKED = "__msgpack_chunked_array__"
"""The key that marks a mapping as an array in chunks."""

_DEPTH = 64
_VALUES = 1_000_000
"""Values that a tree may hold: one byte of a file can make an empty mapping of 64."""

_SHORT = 1 << 16  # bytes of a text or a byte string that is read
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h",
            0xD2: ">i", 0xD3: ">q"}  # fmt: skip
_PLAIN: dict[int, Any] = {0xC0: None, 0xC2: False, 0xC3: True}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_OF_MSGPACK_NUMPY = frozenset({b"nd", b"type", b"kind", b"shape", b"data", b"complex"})
_SIZES = {1: ">B", 2: ">H", 4: ">I"}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class ChunkedStorage(Storage):
    """Elements that are stored in several runs of bytes: `(offset, nbytes)` each."""

    __slots__ = ("runs",)

    def __init__(self, dtype: str, runs: tuple[tuple[int, int], ...]) -> None:
        super().__init__("chunks", dtype, sum(nbytes for _, nbytes in runs))
        self.runs = runs


class TreeReader:
    """Reads one value.

    Args:
        cursor: where it begins.
        file: name of the byte source, for what is left there.

    Raises:
        Damaged: it makes no sense, or holds too many values.
    """

    def __init__(self, cursor: HeaderCursor, file: str) -> None:
        self._cursor, self._file = cursor, file
        self._left = _VALUES

    def value(self, depth: int = 0) -> Any:
        """Return the next value: mappings, lists, plain values and the tensors of `inert`."""
        self._left -= 1
        if self._left < 0 or depth > _DEPTH:
            raise Damaged(f"it holds more than {_VALUES:,} values, or is nested deeper than {_DEPTH}")
        cursor, head = self._cursor, self._cursor.take(1)[0]
        if head < 0x80 or head >= 0xE0:
            return head if head < 0x80 else head - 256
        if head in _PLAIN:
            return _PLAIN[head]
        if head in _NUMBERS:
            return struct.unpack(_NUMBERS[head], cursor.take(struct.calcsize(_NUMBERS[head])))[0]
        if head in _EXTENSIONS or head in _FIXED_EXTENSIONS:
            return self._extension(_FIXED_EXTENSIONS.get(head) or self._size(_EXTENSIONS[head]))
        for marks, read in self._kinds:
            if head in marks:
                width = marks[head]
                return read(width & 0x1F if width < 0 else self._size(width), depth)
        if 0xA0 <= head < 0xC0:
            return self._text(head & 0x1F, depth)
        if head < 0xC0:
            return (self._mapping if head < 0x90 else self._list)(head & 0x0F, depth)
        raise Damaged(f"a value begins with the byte {head:#04x}, which means nothing")

    @property
    def _kinds(self) -> tuple[tuple[dict[int, int], Callable[[int, int], Any]], ...]:
        """The first bytes of values with a length, the bytes of that, and what reads them."""
        return (
            ({0xD9: 1, 0xDA: 2, 0xDB: 4}, self._text),
            (_BYTES, self._bytes),
            ({0xDC: 2, 0xDD: 4}, self._list),
            ({0xDE: 2, 0xDF: 4}, self._mapping),
        )

    def _size(self, width: int) -> int:
        return self._cursor.number(_SIZES[width])

    def _text(self, nbytes: int, depth: int) -> Any:
        return self._cursor.text(nbytes) if nbytes <= _SHORT else self._blob(nbytes)

    def _bytes(self, nbytes: int, depth: int) -> Any:
        return self._cursor.take(nbytes) if nbytes <= _SHORT else self._blob(nbytes)

    def _blob(self, nbytes: int) -> Blob:
        return Blob(self._cursor.skip(nbytes), nbytes, self._file)

    def _list(self, count: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(self._count(count))]

    def _mapping(self, count: int, depth: int) -> Any:
        made: dict[Any, Any] = {}
        for _ in range(self._count(2 * count) // 2):
            key = self.value(depth + 1)
            if type(key) not in (str, int, bool, bytes) or key in made:
                raise Damaged(f"a key is given twice, or is a {type(key).__name__}")
            if type(key) is bytes and key not in _OF_MSGPACK_NUMPY:
                raise Damaged(f"a key is the bytes {key[:40]!r}, and no text")
            made[key] = self._bytes_in_place() if key == b"data" else self.value(depth + 1)
        if b"data" in made:
            return _of_numpy(made)
        return _chunked(made) if CHUNKED in made else made

    def _bytes_in_place(self) -> tuple[int, int]:
        """Where the byte string at the cursor is, and its length."""
        head = self._cursor.take(1)[0]
        if head not in _BYTES:
            raise Damaged("an array has no bytes")
        nbytes = self._size(_BYTES[head])
        return self._cursor.skip(nbytes), nbytes

    def _count(self, count: int) -> int:
        """A number of values, of a byte at least, which must be left in the file."""
        if count > self._cursor.left:
            raise Damaged(f"it announces {count:,} values, more than its bytes can hold")
        return count

    def _extension(self, nbytes: int) -> Any:
        cursor = self._cursor
        kind, start = cursor.number(">b"), cursor.at
        stop = start + nbytes
        if stop > cursor.stop:
            raise Damaged("it ends within an array")
        if kind in (_ARRAY, _SCALAR):
            made: Any = self._array(stop)
        elif kind == _COMPLEX:
            parts = self.value()
            if type(parts) is not list or len(parts) != 2 or not all(type(p) in (int, float) for p in parts):
                raise Damaged("a complex number is none")
            made = complex(*parts)
        else:
            cursor.skip(nbytes)
            return Opaque("msgpack", f"ExtType_{kind}", (), f"{nbytes} bytes")
        if cursor.at != stop:
            raise Damaged("an array does not end where it is said to")
        return made

    def _array(self, stop: int) -> Any:
        """An array, of which the cursor is at the beginning."""
        cursor = self._cursor
        if cursor.take(1) != b"\x93":
            raise Damaged("an array is none")
        shape, dtype = self.value(), self.value()
        if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape) or type(dtype) is not str:
            raise Damaged("the shape or the dtype of an array makes no sense")
        start, nbytes = self._bytes_in_place()
        if start + nbytes > stop:
            raise Damaged("the bytes of an array reach past its end")
        try:
            name = dtype_name(dtype)
        except CheckpointError:
            return Opaque("torch", "Tensor", (), f"its dtype {dtype[:80]!r} is unknown here")
        storage = Storage(f"{start}", name, nbytes)
        storage.place = start, nbytes
        return Tensor(storage, 0, tuple(shape), contiguous_strides(shape), name)


def _chunked(made: dict[Any, Any]) -> Any:
    """The array whose shape and flat chunks a mapping holds."""
    sizes, parts = _numbered(made.get("shape")), _numbered(made.get("chunks"))
    if not parts or not all(type(part) is Tensor and part.dtype == parts[0].dtype for part in parts):
        raise Damaged("an array in chunks has none, or chunks of several dtypes")
    if not all(type(n) is int and n >= 0 for n in sizes):
        raise Damaged("the shape of an array in chunks makes no sense")
    first: Tensor = parts[0]
    storage = ChunkedStorage(first.dtype, tuple(part.storage.place for part in parts))
    return Tensor(storage, 0, tuple(sizes), contiguous_strides(sizes), first.dtype)


def _of_numpy(made: dict[Any, Any]) -> Any:
    """The array or the scalar that a mapping of msgpack-numpy 0.4 describes."""
    start, nbytes = made[b"data"]
    if b"complex" in made:
        return Opaque("msgpack_numpy", "complex", (), f"{nbytes} bytes")
    shape, kind = made.get(b"shape", []), made.get(b"type")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise Damaged("the shape of an array makes no sense")
    if type(kind) is not str or kind.startswith("|O"):
        return Opaque("msgpack_numpy", "ndarray", (), f"an array of {'objects' if type(kind) is str else 'records'}")
    name = NumpyType(kind.lstrip("<>|=")).dtype
    if name is None or (kind.startswith(">") and DTYPES[name].itemsize > 1):
        return lost(f"a numpy array of type {kind[:80]!r}")
    storage = Storage(f"{start}", name, nbytes)
    storage.place = start, nbytes
    return Tensor(storage, 0, tuple(shape), contiguous_strides(shape), name)


def _numbered(made: Any) -> list[Any]:
    """The values of a mapping that stands for a tuple: its keys are 0, 1, …"""
    if type(made) is not dict or list(map(str, made)) != [str(i) for i in range(len(made))]:
        raise Damaged("an array in chunks is described in an unknown way")
    return list(made.values())
