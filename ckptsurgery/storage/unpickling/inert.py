"""Inert records, which a pickle's objects become when nothing of the file may run.

The unpickler builds these and plain Python values, nothing else. None of them calls, imports or allocates what a
file asks for; each keeps just enough for a reader to find a tensor's bytes or to show what was there.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Array", "Blob", "Fields", "FileBytes", "Joined", "NumpyType", "Opaque", "Ordered", "Storage", "Tensor"]


class Opaque:
    """A class, function or object of the file that has no meaning here: its name and what was done to it.

    >>> Opaque("lightning", "Config"), Opaque("torch._utils", "_rebuild_sparse_tensor", note="sparse tensor")
    (<lightning.Config>, <torch._utils._rebuild_sparse_tensor: sparse tensor>)

    Args:
        module, name: the global's name as the file spells it.
        args: what it was called with; None for the bare global.
        note: why a thing that was meant to be a tensor is none.
        path: both names with a dot between, where somebody has it already.
    """

    __slots__ = ("args", "items", "module", "name", "note", "pairs", "path", "state")

    def __init__(
        self, module: str, name: str, args: Any = None, note: str | None = None, path: str | None = None
    ) -> None:
        self.module = module
        self.name = name
        self.path = f"{module}.{name}" if path is None else path
        self.args = args
        self.note = note
        self.state: Any = None
        self.pairs: dict[Any, Any] | None = None
        self.items: list[Any] | None = None

    def __repr__(self) -> str:
        return f"<{self.path}: {self.note}>" if self.note else f"<{self.path}>"


class Ordered(dict[Any, Any]):
    """An `OrderedDict` with the attributes that were set on it, such as a state_dict's `_metadata`."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        super().__init__()
        self.attributes: dict[Any, Any] = {}


class Fields(dict[Any, Any]):
    """An object that is nothing but named fields, such as `argparse.Namespace`."""

    __slots__ = ()


class Blob:
    """A long byte string that was left in its file: where it lies."""

    __slots__ = ("file", "nbytes", "offset")

    def __init__(self, offset: int, nbytes: int, file: str) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.file = file

    def read(self) -> bytes | Blob:
        """The bytes themselves, or the record where the file does not give them."""
        try:
            with open(self.file, "rb") as file:  # noqa: PTH123 - the path is kept as the caller spells it
                file.seek(self.offset)
                return file.read(self.nbytes)
        except OSError:
            return self

    def __repr__(self) -> str:
        return f"<{self.nbytes} bytes>"


class FileBytes(bytes):
    """A short byte string that also knows where it lies in its file."""

    at: int


class Storage:
    """A flat run of elements that tensors view, known by the name that the file gives it.

    Args:
        key: the storage's name in the file.
        dtype: of its elements, or None where no dtype here matches (quantised ones); `"U8"` for untyped storages.
        numel: its elements.
        shift: elements of the named storage that lie before it, for old files with views of storages.
        place: `(offset, nbytes)` in the file for a storage that lies inside the pickle itself.
        location: the device it was saved from.
    """

    __slots__ = ("dtype", "key", "location", "numel", "place", "shift")

    def __init__(self, key: str, dtype: str | None, numel: int, location: str = "cpu", shift: int = 0) -> None:
        self.key = key
        self.dtype = dtype
        self.numel = numel
        self.location = location
        self.shift = shift
        self.place: tuple[int, int] | None = None


class Tensor:
    """A tensor as a view: storage, element offset, shape and strides in elements."""

    __slots__ = ("dtype", "offset", "requires_grad", "shape", "storage", "strides")

    def __init__(
        self,
        storage: Storage,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: str,
        requires_grad: bool = False,
    ) -> None:
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.requires_grad = requires_grad

    def __repr__(self) -> str:
        return f"<tensor {self.dtype} {list(self.shape)}>"


class NumpyType:
    """A numpy dtype: its code (`"f4"`) and whether its elements are big-endian."""

    __slots__ = ("big_endian", "code")

    def __init__(self, code: str, big_endian: bool = False) -> None:
        self.code = code
        self.big_endian = big_endian

    @property
    def dtype(self) -> str | None:
        """The safetensors name, or None for objects, strings, records and dates."""
        return _NUMPY.get(self.code)


class Array:
    """A numpy array: its bytes lie in the file (`Blob`) or had to be decoded (`bytes`); a list of any objects."""

    __slots__ = ("data", "fortran", "shape", "type")

    def __init__(self) -> None:
        self.type: NumpyType | None = None
        self.shape: tuple[int, ...] = (0,)
        self.fortran = False
        self.data: bytes | Blob | list[Any] | None = None

    @property
    def dtype(self) -> str | None:
        """The safetensors name, or None where the elements are no numbers."""
        return self.type.dtype if self.type is not None and self.data is not None else None

    def __repr__(self) -> str:
        return f"<array {self.type.code if self.type else '?'} {list(self.shape)}>"


class Joined:
    """An array that its file holds in slices: the flat parts in order, and the shape of the whole."""

    __slots__ = ("dtype", "parts", "shape")

    def __init__(self, parts: list[Array], shape: tuple[int, ...], dtype: str) -> None:
        self.parts = parts
        self.shape = shape
        self.dtype = dtype


_NUMPY = {
    "b1": "BOOL", "?": "BOOL", "u1": "U8", "i1": "I8", "u2": "U16", "i2": "I16", "u4": "U32", "i4": "I32", "u8": "U64",
    "i8": "I64", "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
