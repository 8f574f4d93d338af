"""HDF5's datasets: their shape, the type of their elements, and where or how these are stored.

The messages are described in section IV.A.2 of the specification: dataspace (b), datatype (d), external files (h),
layout (i), filters (l), attributes (m).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .cursor import Damaged, HeaderCursor
from .hdf5_objects import Hdf5File, Message

__all__ = ["Chunks", "Dataset", "ElementType", "attribute_of", "dataset_of"]

_DATASPACE, _DATATYPE, _EXTERNAL, _LAYOUT, _FILTERS, _ATTRIBUTE = 0x01, 0x03, 0x07, 0x08, 0x0B, 0x0C
_FLOATS = {(16, 5, 10): "F16", (32, 8, 23): "F32", (64, 11, 52): "F64", (16, 8, 7): "BF16", (8, 5, 2): "F8_E5M2",
           (8, 4, 3): "F8_E4M3"}  # fmt: skip
_CLASSES = ("integers", "floats", "times", "texts", "bit fields", "opaque values", "records", "references",
            "enumerations", "texts or lists", "arrays")  # fmt: skip
_TEXT_BYTES = 16 << 20
_DIMENSIONS = 32


@dataclass(frozen=True, slots=True)
class ElementType:
    """The type of a dataset's elements.

    Args:
        dtype: its name here; None where the elements are none of our dtypes.
        big_endian: the order of their bytes.
        nbytes: of an element in the file.
        text: what the elements are, for messages.
        is_number: whether they are numbers, or were.
    """

    dtype: str | None
    big_endian: bool
    nbytes: int
    text: str
    is_number: bool


@dataclass(frozen=True, slots=True)
class Chunks:
    """A dataset in chunks of one shape.

    Args:
        shape: of a chunk.
        tree: address of the B-tree that lists them; None for one chunk.
        single: address and stored bytes, where there is one chunk.
        filters: of each chunk, in the order in which they were applied: 1 deflate, 2 shuffle, 3 checksum.
        mask: of the one chunk: the filters that were left out.
    """

    shape: tuple[int, ...]
    tree: int | None
    single: tuple[int, int] = (0, 0)
    filters: tuple[int, ...] = ()
    mask: int = 0


@dataclass(slots=True)
class Dataset:
    """A dataset.

    Args:
        shape: of it; None for one that is null.
        type: of its elements.
        run: where its elements begin in the file, and their bytes, if they are one run.
        chunks: if it is in chunks.
        why_not: why it cannot be read.
    """

    shape: tuple[int, ...] | None
    type: ElementType
    run: tuple[int, int] | None = None
    chunks: Chunks | None = None
    why_not: str = ""
    attributes: dict[str, bytes | str] = field(default_factory=dict)


def dataset_of(file: Hdf5File, messages: list[Message]) -> Dataset | None:
    """Return the dataset that an object's header describes; None for another object.

    Raises:
        Damaged: a message makes no sense.
    """
    by_type = {message.type: message for message in reversed(messages)}
    if not {_DATASPACE, _DATATYPE, _LAYOUT} <= by_type.keys():
        return None
    shared = by_type[_DATATYPE].is_shared or by_type[_DATASPACE].is_shared
    if shared:
        odd = ElementType(None, False, 0, "values of a type that has a name", True)
        return Dataset((), odd, why_not="its type is stored elsewhere in the file")
    found = Dataset(_shape(file, _over(file, by_type[_DATASPACE])), _type(_over(file, by_type[_DATATYPE])))
    if _EXTERNAL in by_type:
        found.why_not = "its data are in another file"
    elif by_type[_LAYOUT].is_shared or (_FILTERS in by_type and by_type[_FILTERS].is_shared):
        found.why_not = "its layout is stored elsewhere in the file"
    else:
        filters = _filters(_over(file, by_type[_FILTERS])) if _FILTERS in by_type else ()
        _lay_out(file, _over(file, by_type[_LAYOUT]), found, filters)
    mark = attribute_of(file, messages, "dtype")
    if mark == "bfloat16" and found.type.nbytes == 2:
        found.type = ElementType("BF16", False, 2, "floats", True)
    return found


def _over(file: Hdf5File, message: Message) -> HeaderCursor:
    return HeaderCursor(file.opened, message.at, message.at + message.nbytes)


def _shape(file: Hdf5File, cursor: HeaderCursor) -> tuple[int, ...] | None:
    version, rank, _, kind = cursor.take(4)
    if version == 1:
        cursor.skip(4)
    elif version != 2:
        raise Damaged("a shape is of an unknown version")
    if rank > _DIMENSIONS:
        raise Damaged(f"a dataset has {rank} dimensions")
    if version == 2 and kind == 2:
        return None
    return tuple(file.length(cursor) for _ in range(rank))


def _type(cursor: HeaderCursor, depth: int = 0) -> ElementType:
    kind, low, high, _ = cursor.take(4)
    nbytes, kind = cursor.number("<I"), kind & 0x0F
    text = _CLASSES[kind] if kind < len(_CLASSES) else "values of an unknown type"
    if kind == 0:
        offset, bits = cursor.number("<H"), cursor.number("<H")
        plain = offset == 0 and bits == 8 * nbytes and nbytes in (1, 2, 4, 8)
        name = f"{'I' if low & 8 else 'U'}{bits}" if plain else None
        return ElementType(name, bool(low & 1), nbytes, text, True)
    if kind == 1:
        offset, bits = cursor.number("<H"), cursor.number("<H")
        _, exponent, _, mantissa = cursor.take(4)
        plain = offset == 0 and bits == 8 * nbytes and not low & 0x40 and high == bits - 1
        return ElementType(
            _FLOATS.get((bits, exponent, mantissa)) if plain else None, bool(low & 1), nbytes, text, True
        )
    if kind == 8 and depth == 0:
        base = _type(cursor, 1)
        names = cursor.take(min(cursor.left, 32)) if cursor.left else b""
        flag = base.nbytes == 1 and (low | high << 8) == 2 and names.startswith(b"FALSE\0") and b"TRUE\0" in names
        return ElementType("BOOL" if flag else base.dtype, base.big_endian, nbytes, text, True)
    if kind == 5 and nbytes == 2:  # what h5py makes of a bfloat16 of ml_dtypes
        return ElementType(None, False, nbytes, "values of an unknown type, perhaps bfloat16,", True)
    return ElementType(None, False, nbytes, text, False)


def _filters(cursor: HeaderCursor) -> tuple[int, ...]:
    version, count = cursor.take(2)
    if version not in (1, 2):
        raise Damaged("the filters of a dataset are of an unknown version")
    if version == 1:
        cursor.skip(6)
    found = []
    for _ in range(count):
        identity = cursor.number("<H")
        name = cursor.number("<H") if version == 1 or identity >= 256 else 0
        cursor.skip(2)
        values = cursor.number("<H")
        cursor.skip((-(-name // 8) * 8 if version == 1 else name) + 4 * values)
        if version == 1 and values % 2:
            cursor.skip(4)
        found.append(identity)
    return tuple(found)


def _lay_out(file: Hdf5File, cursor: HeaderCursor, found: Dataset, filters: tuple[int, ...]) -> None:
    """Put into a dataset where its elements are."""
    version, kind = cursor.take(2)
    if version not in (3, 4):
        found.why_not = f"its layout is of version {version}"
    elif kind == 0:
        nbytes = cursor.number("<H")
        found.run = cursor.skip(nbytes), nbytes
    elif kind == 1:
        address, nbytes = file.address(cursor), file.length(cursor)
        if address != file.nowhere:
            found.run = file.base + address, nbytes
        elif found.shape and 0 in found.shape:
            found.run = 0, 0
        else:
            found.why_not = "its elements were never written"
    elif kind == 2:
        found.chunks = _chunks(file, cursor, version, filters, found)
        odd = sorted(set(filters) - {1, 2, 3})
        if odd:
            found.why_not = f"it is compressed by a filter that is not read here ({odd[0]})"
    else:
        found.why_not = "it is put together from other datasets"


def _chunks(
    file: Hdf5File, cursor: HeaderCursor, version: int, filters: tuple[int, ...], found: Dataset
) -> Chunks | None:
    if version == 3:
        rank = cursor.number("B")
        tree = file.address(cursor)
        sizes = [cursor.number("<I") for _ in range(rank)]
        index = 0
    else:
        flags, rank, width = cursor.take(3)
        sizes = [file.number(cursor, width) for _ in range(rank)]
        index, tree = cursor.number("B"), 0
    shape = tuple(sizes[:-1])
    if not sizes or 0 in shape or found.shape is None or len(shape) != len(found.shape):
        raise Damaged("the chunks of a dataset make no sense")
    if index == 0:
        if tree == file.nowhere and 0 not in found.shape:
            found.why_not = "its elements were never written"
        return Chunks(shape, tree, filters=filters)
    if index != 1:
        found.why_not = f"its chunks are listed in a way that is not read here ({index})"
        return None
    nbytes, mask = found.type.nbytes, 0
    for size in shape:
        nbytes *= size
    if flags & 2:
        nbytes, mask = file.length(cursor), cursor.number("<I")
    address = file.address(cursor)
    if address == file.nowhere and 0 not in found.shape:
        found.why_not = "its elements were never written"
    return Chunks(shape, None, (address, nbytes), filters, mask)


def attribute_of(file: Hdf5File, messages: list[Message], name: str) -> str | None:
    """Return the text of an attribute; None where there is none, or where it is something else.

    Raises:
        Damaged: an attribute makes no sense.
    """
    for message in messages:
        if message.type != _ATTRIBUTE or message.is_shared:
            continue
        cursor = _over(file, message)
        version, flags = cursor.take(2)
        if version not in (1, 2, 3):
            continue
        sizes = [cursor.number("<H") for _ in range(3)]
        if version == 3:
            cursor.skip(1)
        if cursor.take(_padded(sizes[0], version))[: sizes[0]].rstrip(b"\0") != name.encode() or flags & 3:
            continue
        kind, low = cursor.take(2)
        cursor.skip(2)
        nbytes = cursor.number("<I")
        cursor.skip(_padded(sizes[1], version) - 8 + _padded(sizes[2], version))
        if kind & 0x0F == 3 and nbytes <= _TEXT_BYTES:
            return cursor.take(nbytes).rstrip(b"\0").decode("utf-8", "replace")
        if kind & 0x0F == 9 and low & 0x0F == 1:
            return _long_text(file, cursor)
    return None


def _padded(nbytes: int, version: int) -> int:
    return -(-nbytes // 8) * 8 if version == 1 else nbytes


def _long_text(file: Hdf5File, cursor: HeaderCursor) -> str | None:
    """A text of any length, which is stored in a global heap (section III.E)."""
    nbytes = cursor.number("<I")
    address, number = file.address(cursor), cursor.number("<I")
    if nbytes > _TEXT_BYTES:
        return None
    heap = file.at(address)
    start = heap.at
    if heap.take(4) != b"GCOL":
        raise Damaged("a heap of texts is none")
    heap.skip(4)
    stop = start + file.length(heap)
    while heap.at + 8 + file.lengths <= stop:
        index = heap.number("<H")
        heap.skip(6)
        size = file.length(heap)
        if index == number:
            return heap.take(min(size, nbytes)).decode("utf-8", "replace")
        if index == 0:
            break
        heap.skip(-(-size // 8) * 8)
    return None
