"""Tensors that are held in chunks: boxes that cover the tensor once, each at a place of its own.

A chunk is a run of bytes in a file, a tensor in memory, or an archive within a file. All that reads a part of such a
tensor reads the chunks that meet it, and of those the rows that do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..boxes import Box, Shape
from ..errors import CheckpointError, Diagnostic
from ..specs import DTYPES, TensorSpec
from .contents import Entry

if TYPE_CHECKING:
    import torch

    from .formats.archived import Archived

__all__ = ["Chunk", "Chunked", "Read", "chunks_of", "files_of", "read_box", "read_range", "unaligned"]

Read = Callable[[str, int, memoryview], None]
"""Fills a buffer with bytes of a file from an offset on."""

_ELEMENTS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


class Chunk(NamedTuple):
    """A part of a tensor.

    Args:
        low: the index of its first element in the whole.
        place: the entry of its elements, or the archive that holds them.
    """

    low: Shape
    place: Entry | Archived

    @property
    def box(self) -> Box:
        """The part of the whole that it is."""
        return Box(self.low, self.place.spec.shape)

    def entry(self, read: Read) -> Entry:
        """Return where its elements are; an archive's headers are read for that."""
        if isinstance(self.place, Entry):
            return self.place
        from .formats.archived import locate  # reads torch's zip files, which most chunks are not in

        return locate(self.place, read)


@dataclass(frozen=True, slots=True, eq=False)
class Chunked:
    """A tensor in chunks, as the `tensor` of an `Entry`; calling it reads and joins them.

    Args:
        spec: of the whole.
        chunks: parts with elements, which cover the whole once.
    """

    spec: TensorSpec
    chunks: tuple[Chunk, ...]

    @property
    def box(self) -> Box:
        """The whole, as a box."""
        return Box.whole(self.spec.shape)

    def __call__(self) -> torch.Tensor:
        from .sources.files import OpenFiles
        from .tensors import tensor_from

        files = OpenFiles(file for chunk in self.chunks if (file := chunk.place.file) is not None)
        try:
            data = read_box(self, self.box, files.read_into)
        finally:
            files.close()
        return tensor_from(data, 0, self.spec, "a tensor in chunks")


def chunks_of(entry: Entry) -> tuple[Chunk, ...]:
    """Return the chunks of a tensor; none where it is in one piece."""
    return entry.tensor.chunks if type(entry.tensor) is Chunked else ()


def files_of(entry: Entry) -> Iterator[str]:
    """Yield the files that hold a tensor's elements."""
    if entry.file is not None:
        yield entry.file
    for chunk in chunks_of(entry):
        if chunk.place.file is not None:
            yield chunk.place.file


def read_box(chunked: Chunked, box: Box, read: Read) -> bytearray:
    """Read a part of a tensor: its elements in C order.

    Args:
        box: the part.
        read: reads bytes of files.
    """
    import numpy as np

    size = DTYPES[chunked.spec.dtype].itemsize
    made = bytearray(box.numel * size)
    whole = np.frombuffer(made, _ELEMENTS[size]).reshape(box.extent)
    for chunk in chunked.chunks:
        common = box.meets(chunk.box)
        if common is not None:
            whole[_within(common, box.low)] = _elements(chunk, common, size, read)
    return made


def read_range(chunked: Chunked, start: int, stop: int, read: Read) -> memoryview:
    """Read bytes `[start, stop)` of the dense tensor, and for them the rows that they are in."""
    box = chunked.box
    if not box.extent or start == stop:
        return memoryview(read_box(chunked, box, read))[start:stop]
    row = chunked.spec.nbytes // box.extent[0]
    first, last = start // row, -(-stop // row)
    rows = Box((first, *box.low[1:]), (last - first, *box.extent[1:]))
    return memoryview(read_box(chunked, rows, read))[start - first * row : stop - first * row]


def _within(box: Box, low: Sequence[int]) -> tuple[slice, ...]:
    """The index of a box in an array whose first element has the index `low`."""
    return tuple(slice(start - first, start - first + n) for start, first, n in zip(box.low, low, box.extent))


def _elements(chunk: Chunk, box: Box, size: int, read: Read) -> Any:
    """The elements of a chunk that are in a box; of a plain chunk only the rows that are in it are read."""
    import numpy as np

    entry = chunk.entry(read)
    if not entry.is_contiguous:
        return _dense(entry, size, read)[_within(box, chunk.low)]
    shape, offset, low = entry.spec.shape, entry.offset, list(chunk.low)
    if shape:
        row = entry.spec.nbytes // shape[0]
        offset += (box.low[0] - low[0]) * row
        shape, low[0] = (box.extent[0], *shape[1:]), box.low[0]
    buffer = np.empty(shape, _ELEMENTS[size])
    read(entry.file or "", offset, buffer.reshape(-1).view("u1").data)
    return buffer[_within(box, low)]


def _dense(entry: Entry, size: int, read: Read) -> Any:
    """All elements of a tensor that is not one run of bytes, as an array."""
    import numpy as np

    if entry.file is None:
        from .tensors import dense_bytes

        tensor = entry.tensor() if callable(entry.tensor) else entry.tensor
        return np.frombuffer(dense_bytes(tensor, "a chunk"), _ELEMENTS[size]).reshape(entry.spec.shape)
    shape = entry.spec.shape
    strides = entry.strides or _c_strides(shape)
    flat = np.empty(1 + sum((n - 1) * step for n, step in zip(shape, strides)), _ELEMENTS[size])
    read(entry.file, entry.offset, flat.view("u1").data)
    if entry.big_endian:
        if DTYPES[entry.spec.dtype].kind == "complex":
            flat = flat.view(f"u{size // 2}").byteswap().view(flat.dtype)
        else:
            flat = flat.byteswap()
    return np.lib.stride_tricks.as_strided(flat, shape, tuple(step * size for step in strides), writeable=False)


def _c_strides(shape: Shape) -> Shape:
    from .formats.storages import contiguous_strides

    return contiguous_strides(shape)


def unaligned(spec: TensorSpec, place: str) -> CheckpointError:
    """The error for a chunked tensor of a dtype whose elements are not whole bytes."""
    text = f"a tensor of {spec.dtype} is stored in chunks, and its elements are not whole bytes"
    return CheckpointError(Diagnostic("packed-chunks", text, place, help="save it as one piece"))
