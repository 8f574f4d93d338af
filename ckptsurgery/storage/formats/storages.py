"""From a tensor as the pickle describes it to the bytes it has in a file.

A description is not to be trusted: a view may reach outside of its storage, an array may announce more than it holds.
Both are refused by key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES, TensorSpec, shape_problem
from ..contents import Entry
from ..sources.byte_source import ByteSource, read_run
from ..unpickling.inert import Array, Blob, FileBytes, Joined, Storage, Tensor
from ..unpickling.nodes import name_of

__all__ = ["LateTensor", "StorageRun", "contiguous_strides", "place_all", "place_array", "place_tensor"]


_EXPANDED = 1 << 26  # bytes; a view that repeats its elements is written out when it is loaded
_REPEATS = 64


class StorageRun(NamedTuple):
    """Where the bytes of a storage lie."""

    file: str
    offset: int
    nbytes: int
    big_endian: bool = False


@dataclass(frozen=True, slots=True)
class LateTensor:
    """A tensor whose bytes do not lie in one run of a file: built when it is called, with torch.

    Args:
        spec: what comes out.
        pieces: `bytes`, or `(offset, nbytes)` to read; joined in order, little-endian.
        fortran: whether the elements come in column-major order.
        source: the source of the pieces to read; None where there are none.
    """

    spec: TensorSpec
    pieces: tuple[bytes | tuple[int, int], ...]
    fortran: bool = False
    source: ByteSource | None = None

    def __call__(self) -> Any:
        import torch

        data = bytearray()
        for piece in self.pieces:
            data += piece if isinstance(piece, bytes) else read_run(cast("ByteSource", self.source), *piece)
        dtype = getattr(torch, DTYPES[self.spec.dtype].torch or "")
        shape = self.spec.shape[::-1] if self.fortran else self.spec.shape
        if not self.spec.numel:
            return torch.empty(self.spec.shape, dtype=dtype)
        flat = torch.frombuffer(data, dtype=dtype).reshape(shape)
        return flat.permute(tuple(range(len(shape)))[::-1]) if self.fortran else flat


def contiguous_strides(shape: Iterable[int]) -> tuple[int, ...]:
    """The strides, in elements, of a C-contiguous tensor.

    >>> contiguous_strides([2, 3, 4])
    (12, 4, 1)
    """
    strides, step = [], 1
    for n in reversed(tuple(shape)):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def place_tensor(tensor: Tensor, region: StorageRun) -> Entry:
    """The entry of a view of a storage; a `ValueError` says why there is none."""
    spec = _spec(tensor.shape, tensor.dtype)
    if DTYPES[tensor.dtype].bits < 8:
        return _place_packed(tensor, region)
    size = DTYPES[tensor.dtype].itemsize
    start = (tensor.offset + tensor.storage.shift) * size
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides)) if spec.numel else -1
    if start > region.nbytes or start + (last + 1) * size > region.nbytes:
        strided = ", ".join(map(name_of, tensor.strides))
        raise ValueError(
            f"{spec} at element {name_of(tensor.offset)} with strides [{strided}] reaches outside its storage of "
            f"{region.nbytes} bytes"
        )
    if spec.nbytes > _EXPANDED and spec.nbytes > _REPEATS * max(region.nbytes, 1):
        raise ValueError(f"{spec} repeats the {region.nbytes} bytes of its storage until they are {spec.nbytes:,}")
    step = 1
    strides: tuple[int, ...] | None = None
    if spec.numel:
        for n, stride in zip(reversed(tensor.shape), reversed(tensor.strides)):
            if n != 1:
                if stride != step:
                    strides = tensor.strides
                    break
                step *= n
    return Entry(spec, region.file, region.offset + start, strides, region.big_endian and size > 1)


def _place_packed(tensor: Tensor, region: StorageRun) -> Entry:
    # torch counts elements of two values each
    if not tensor.shape or tensor.strides != contiguous_strides(tensor.shape):
        raise ValueError(f"a view of packed {tensor.dtype} values that is not contiguous")
    if tensor.offset + math.prod(tensor.shape) > region.nbytes:
        raise ValueError(f"it reaches outside its storage of {region.nbytes} bytes")
    spec = TensorSpec((*tensor.shape[:-1], tensor.shape[-1] * 2), tensor.dtype)
    return Entry(spec, region.file, region.offset + tensor.offset)


def place_joined(joined: Joined, file: str) -> Entry:
    """The entry of an array that lies in slices, which are joined when it is loaded."""
    spec = _spec(joined.shape, joined.dtype)
    pieces: list[bytes | tuple[int, int]] = []
    for part in joined.parts:
        entry = place_array(part, file)
        if entry.spec.dtype != spec.dtype or len(part.shape) != 1 or entry.big_endian:
            raise ValueError("its slices are not of one kind")
        pieces += [(entry.offset, entry.spec.nbytes)] if entry.tensor is None else entry.tensor.pieces
    if sum(len(piece) if isinstance(piece, bytes) else piece[1] for piece in pieces) != spec.nbytes:
        raise ValueError(f"its slices do not add up to {spec}")
    return Entry(spec, tensor=LateTensor(spec, tuple(pieces)))


def _spec(shape: tuple[Any, ...], dtype: str) -> TensorSpec:
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("its shape is none")
    absurd = shape_problem(shape, DTYPES[dtype].bits)
    if absurd:
        raise ValueError(f"it {absurd}")
    return TensorSpec(shape, dtype)


def place_array(array: Array, file: str) -> Entry:
    """The entry of a numpy array; a `ValueError` says why there is none."""
    kind, name = array.type, array.dtype
    if kind is None or name is None or array.data is None or isinstance(array.data, list):
        raise ValueError(f"an array of {kind.code if kind else 'unknown'} elements is no tensor")
    spec = _spec(array.shape, name)
    held = array.data.nbytes if isinstance(array.data, Blob) else len(array.data)
    if held != spec.nbytes:
        raise ValueError(f"{spec} needs {spec.nbytes} bytes, the file holds {held}")
    swap = kind.big_endian and DTYPES[name].itemsize > 1
    if isinstance(array.data, (Blob, FileBytes)):
        offset = array.data.offset if isinstance(array.data, Blob) else array.data.at
        strides = contiguous_strides(array.shape[::-1])[::-1] if array.fortran and spec.numel else None
        strides = None if strides == contiguous_strides(array.shape) else strides
        return Entry(spec, file, offset, strides, swap)
    data = array.data
    if swap:
        width = DTYPES[name].itemsize // (2 if DTYPES[name].kind == "complex" else 1)
        swapped = bytearray(len(data))
        for i in range(width):
            swapped[i::width] = data[width - 1 - i :: width]
        data = bytes(swapped)
    return Entry(spec, tensor=LateTensor(spec, (data,), array.fortran and math.prod(array.shape) > 0))


def place_all(
    leaves: Mapping[str, Any],
    regions: Callable[[Storage], StorageRun],
    source: str,
) -> dict[str, Entry]:
    """The entries of all tensors and arrays, or one error with every key that has none."""
    entries: dict[str, Entry] = {}
    problems: list[Diagnostic] = []
    for key, leaf in leaves.items():
        try:
            if isinstance(leaf, Tensor):
                entries[key] = place_tensor(leaf, regions(leaf.storage))
            elif isinstance(leaf, Array):
                entries[key] = place_array(leaf, source)
            else:
                entries[key] = place_joined(leaf, source)
        except ValueError as error:
            problems.append(_damaged(f"{key!r} cannot be read: {error}", source))
        except CheckpointError as error:
            problems += error.diagnostics
        if len(problems) >= _TOLD:
            break
    if problems:
        raise CheckpointError(dict.fromkeys(problems))
    return entries


_TOLD = 200  # problems that an error lists; a file of rubbish has as many as it has tensors


def _damaged(headline: str, source: str) -> Diagnostic:
    return Diagnostic("damaged-tensor", headline, place=source, help="the file is damaged: copy or download it again")
