"""Numpy's files: an `.npy` is one array, an `.npz` a zip file of them; their bytes are mapped where they are stored."""

from __future__ import annotations

import ast
import os
from typing import Any

from ...errors import CheckpointError, Diagnostic
from ..contents import Contents
from ..sources.system_errors import os_error
from ..unpickling.inert import Array, Blob, NumpyType, Opaque, Storage
from .storages import Region, place_all
from .zip_archive import ZipArchive, refused

__all__ = ["is_npz", "read_npy", "read_npz"]

_MAGIC = b"\x93NUMPY"
_LONGEST = 1 << 16  # bytes of a header; numpy itself refuses longer ones unless told otherwise
_OBJECTS = "import numpy, pickle; pickle.dump(numpy.load({path!r}, allow_pickle=True).tolist(), open('new.pkl', 'wb'))"
_STORED = "import numpy; numpy.savez('new.npz', **numpy.load({path!r}))"


def is_npz(names: list[str]) -> bool:
    """Whether a zip file of these names is numpy's."""
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npy(path: str) -> Contents:
    """The array of an `.npy` file, under the key `tensor`.

    Raises:
        CheckpointError: its header cannot be read, it is truncated, or its elements are not numbers.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - the path is kept as the caller spells it
            array = _array(file.fileno(), 0, os.fstat(file.fileno()).st_size, path)
    except OSError as error:
        raise os_error(error, path) from error
    if isinstance(array, Opaque):
        text = f"{path!r} is a numpy array of {array.note}, which is not read here"
        help = f"if you trust the file, which runs code when it is loaded: {_OBJECTS.format(path=path)}"
        raise CheckpointError(Diagnostic("unsupported-format", text, path, help=help))
    return Contents(place_all({"tensor": array}, _region, path))


def read_npz(archive: ZipArchive) -> Contents:
    """The arrays of an `.npz` file by name; arrays of objects or texts are extras.

    Raises:
        CheckpointError: it is compressed, a header cannot be read, or there is no array of numbers.
    """
    source, leaves, extras = archive.source, dict[str, Any](), dict[str, Any]()
    for name in archive.records:
        record = archive.stored(name, _STORED.format(path=source))
        array = _array(archive.file.fileno(), record.offset, record.offset + record.nbytes, source)
        (leaves if type(array) is Array else extras)[name.removesuffix(".npy")] = array
    if not leaves:
        raise refused(source, "no-tensors", "holds no arrays of numbers", "name another file")
    return Contents(place_all(leaves, _region, source), extras=extras)


def _region(storage: Storage) -> Region:
    raise ValueError("a numpy array has no storage")


def _array(descriptor: int, start: int, end: int, source: str) -> Array | Opaque:
    """The array whose header is at `start`: its place and type, or what its elements are instead of numbers."""
    head = os.pread(descriptor, 12, start)
    size, width = (head[8:10], 2) if head[6:7] == b"\1" else (head[8:12], 4)
    begin, length = start + 8 + width, int.from_bytes(size, "little")
    try:
        if not head.startswith(_MAGIC) or length > _LONGEST or begin + length > end:
            raise ValueError("it is truncated")
        header = ast.literal_eval(os.pread(descriptor, length, begin).decode("utf-8" if width == 4 else "latin-1"))
        kind, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
        if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("its shape makes no sense")
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        why = f"is a numpy array whose header cannot be read: {str(error).splitlines()[0][:200]}"
        raise refused(source, "unsupported-format", why, "copy it again, or have it written again by numpy") from None
    array = Array()
    array.type = NumpyType(kind.lstrip("<>|="), kind.startswith(">")) if type(kind) is str else None
    array.shape, array.fortran = shape, fortran is True
    array.data = Blob(begin + length, end - begin - length, source)
    if array.dtype is None:
        return Opaque("numpy", "ndarray", (), "objects" if kind == "|O" else f"type {kind!r}"[:200])
    return array
