"""ONNX models: their initialisers, read where they are stored, in the file itself or in files beside it.

A model is a protobuf message. Of its fields those are read that lead to the initialisers, and no others: no graph is
built, and nothing of a node is interpreted. Source: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
(`ModelProto`, `GraphProto`, `TensorProto`) and https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES, TensorSpec, shape_problem
from ...wording import is_text
from ..contents import Contents, Entry
from ..sources.byte_source import ByteSource, read_run
from ..unpickling.nodes import lost
from .built import built
from .cursor import Damaged, HeaderCursor, reading
from .format import Format, OpenedSource
from .recognising import is_onnx

__all__ = ["OnnxFormat"]

# `TensorProto.DataType`
_DTYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
    13: "U64", 14: "C64", 15: "C128", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ",
    23: "F4", 24: "F8_E8M0",
}  # fmt: skip
_PACKED = {21: ("UINT4", 2), 22: ("INT4", 2), 25: ("UINT2", 4), 26: ("INT2", 4)}  # values in a byte
_TEXT = 8
_GRAPH, _INITIALISER, _SPARSE = 7, 5, 15
_DIMS, _TYPE, _FLOATS, _INTS, _LONGS, _NAME, _RAW, _DOUBLES, _UNSIGNED = 1, 2, 4, 5, 7, 8, 9, 10, 11
_EXTERNAL, _LOCATION = 13, 14
_FIXED = {_FLOATS: ("F32", "C64"), _DOUBLES: ("F64", "C128")}
_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5
_LONGEST = 1 << 16  # bytes of a name


class _Field(NamedTuple):
    """A field of a message: its number, how it is encoded, and its value, or where its bytes are."""

    number: int
    wire: int
    value: int
    nbytes: int


class OnnxFormat(Format):
    """A model in the exchange format of ONNX."""

    name = "onnx"
    text = "an ONNX model"
    suffixes = (".onnx",)

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether a message begins as those of ONNX do."""
        return is_onnx(head)

    def read(self, opened: OpenedSource) -> Contents:
        """Return the initialisers by name; `extras["onnx"]` names the types of those that are packed.

        Raises:
            CheckpointError: damaged, no initialisers, or external data that are not in the folder.
        """
        contents = Contents({})
        with reading(opened.name):
            packed, found = dict[str, str](), dict[str, ByteSource]()
            for tensor in _tensors(opened, contents.extras):
                if not tensor.name or tensor.name in contents.entries or not is_text(tensor.name):
                    raise Damaged(f"the name {tensor.name[:200]!r} is given twice, or is none")
                _place(tensor, opened, contents, packed, found)
        if packed:
            contents.extras["onnx"] = {"tensor_types": packed}
        if not contents.entries and not contents.extras:
            text = f"{opened.name!r} is an ONNX model without initialisers"
            help = "its weights may be constants of its nodes: simplify the model, for instance with onnxsim"
            raise CheckpointError(Diagnostic("no-tensors", text, opened.name, help=help))
        return contents


@dataclass(slots=True)
class _TensorProto:
    """A `TensorProto`, without its data: each part of these is a field's number, where it begins, its length."""

    dims: list[int] = field(default_factory=list)
    type: int = 0
    name: str = ""
    data: list[_Field] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)
    is_external: bool = False


def _fields(cursor: HeaderCursor, stop: int) -> Iterator[_Field]:
    """The fields of the message that ends at `stop`; whoever reads one may move the cursor meanwhile."""
    while cursor.at < stop:
        tag = _varint(cursor)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            start, nbytes = _varint(cursor), 0
        elif wire in (_EIGHT, _FOUR):
            nbytes = 8 if wire == _EIGHT else 4
            start = cursor.skip(nbytes)
        elif wire == _LENGTH:
            nbytes = _varint(cursor)
            start = cursor.skip(nbytes)
        else:
            raise Damaged(f"a field is of the unknown kind {wire}")
        after = cursor.at
        if after > stop or number == 0:
            raise Damaged("a field reaches past the end of its message")
        yield _Field(number, wire, start, nbytes)
        cursor.at = after


def _varint(cursor: HeaderCursor) -> int:
    value = shift = 0
    while True:
        byte = cursor.take(1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
        shift += 7
        if shift > 63:
            raise Damaged("a number has more than 64 bits")


def _tensors(opened: OpenedSource, extras: dict[str, Any]) -> Iterator[_TensorProto]:
    cursor = HeaderCursor(opened)
    for part in _fields(cursor, opened.size):
        if part.number != _GRAPH or part.wire != _LENGTH:
            continue
        cursor.at = part.value
        for inner in _fields(cursor, part.value + part.nbytes):
            if inner.wire == _LENGTH and inner.number == _INITIALISER:
                cursor.at = inner.value
                yield _tensor(cursor, inner.value + inner.nbytes)
            elif inner.wire == _LENGTH and inner.number == _SPARSE:
                extras[f"sparse_initializer.{len(extras)}"] = lost("a sparse tensor")


def _tensor(cursor: HeaderCursor, stop: int) -> _TensorProto:
    found = _TensorProto()
    for part in _fields(cursor, stop):
        if part.number == _DIMS:
            found.dims += _numbers(cursor, part)
            if len(found.dims) > 1024:
                raise Damaged("a tensor has more than 1,024 dimensions")
        elif part.number == _TYPE:
            found.type = part.value
        elif part.number == _NAME and part.wire == _LENGTH:
            if part.nbytes > _LONGEST:
                raise Damaged(f"a name has {part.nbytes:,} bytes")
            cursor.at = part.value
            found.name = cursor.text(part.nbytes)
        elif part.number == _LOCATION:
            found.is_external = part.value == 1
        elif part.number == _EXTERNAL and part.wire == _LENGTH:
            found.external |= _pair(cursor, part)
        elif part.number in (_FLOATS, _INTS, _LONGS, _RAW, _DOUBLES, _UNSIGNED):
            if part.wire == _VARINT:  # numbers one by one: where each begins is not known, so the message is kept
                part = _Field(part.number, _VARINT, part.value, 0)
            found.data.append(part)
    return found


def _numbers(cursor: HeaderCursor, part: _Field) -> list[int]:
    """A repeated number, packed or not, as signed integers."""
    if part.wire == _VARINT:
        return [_signed(part.value)]
    if part.wire != _LENGTH or part.nbytes > 1 << 14:
        raise Damaged("the dimensions of a tensor make no sense")
    cursor.at = part.value
    found = []
    while cursor.at < part.value + part.nbytes:
        found.append(_signed(_varint(cursor)))
    return found


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _pair(cursor: HeaderCursor, part: _Field) -> dict[str, str]:
    """A `StringStringEntryProto`."""
    if part.nbytes > _LONGEST:
        raise Damaged(f"an entry of external data has {part.nbytes:,} bytes")
    cursor.at = part.value
    texts = {1: "", 2: ""}
    for inner in _fields(cursor, part.value + part.nbytes):
        if inner.number in texts and inner.wire == _LENGTH:
            cursor.at = inner.value
            texts[inner.number] = cursor.text(inner.nbytes)
    return {texts[1]: texts[2]}


def _place(
    tensor: _TensorProto, opened: OpenedSource, contents: Contents, packed: dict[str, str], found: dict[str, ByteSource]
) -> None:
    """Put a tensor among the entries, or among the extras if it does not hold numbers."""
    key, dims = tensor.name, tensor.dims
    dtype, bits = _DTYPES.get(tensor.type), 0
    if tensor.type in _PACKED:
        kind, each = _PACKED[tensor.type]
        bits = 8 // each
        if dims and not dims[-1] % each:
            dtype, dims, packed[key] = "U8", [*dims[:-1], dims[-1] // each], kind
    elif dtype == "F4" and not (dims and dims[-1] % 2 == 0):
        dtype, bits = None, 4
    if dtype is None:
        texts, odd = tensor.type == _TEXT, f"{bits}-bit values whose last axis is odd"
        note = odd if bits else f"a tensor of the unknown type {tensor.type}"
        contents.extras[key] = "texts, which are not read" if texts else lost(note)
        return
    absurd = shape_problem([max(n, 0) for n in dims], DTYPES[dtype].bits)
    if absurd or min(dims, default=0) < 0:
        raise Damaged(f"{key!r} {absurd or 'has a negative dimension'}")
    spec = TensorSpec(tuple(dims), dtype)
    if tensor.is_external:
        contents.entries[key] = _beside(tensor, spec, opened, contents, found)
    else:
        contents.entries[key] = _inside(tensor, spec, opened)


def _inside(tensor: _TensorProto, spec: TensorSpec, opened: OpenedSource) -> Entry:
    """The entry of a tensor whose data are in the message."""
    parts = [part for part in tensor.data if part.nbytes or part.wire == _VARINT]
    kinds = {part.number for part in parts}
    if not parts and not spec.numel:
        return Entry(spec, opened.name, 0)
    if len(kinds) != 1:
        raise Damaged(f"{tensor.name!r} has its data in {len(kinds)} fields")
    (number,) = kinds
    if number == _RAW or spec.dtype in _FIXED.get(number, ()):
        held = sum(part.nbytes for part in parts)
        if held != spec.nbytes or any(part.wire == _VARINT for part in parts):
            raise Damaged(f"{tensor.name!r} is {spec} of {spec.nbytes:,} bytes, and {held:,} are there")
        if len(parts) == 1:
            return Entry(spec, opened.name, parts[0].value)
        pieces = [(part.value, part.nbytes) for part in parts]
        return built(spec, tensor.name, opened.source, partial(_joined, pieces=pieces))
    if number in _FIXED:
        raise Damaged(f"{tensor.name!r} is {spec}, and its data are of another type")
    held = sum(part.nbytes or 1 for part in parts)
    if spec.numel > held:
        raise Damaged(f"{tensor.name!r} is {spec}, and {held:,} bytes are there")
    runs = [(part.value, part.nbytes if part.wire == _LENGTH else -1) for part in parts]
    return built(spec, tensor.name, opened.source, partial(_decoded, runs=runs, spec=spec))


def _joined(source: ByteSource, pieces: Sequence[tuple[int, int]]) -> bytearray:
    return bytearray().join(read_run(source, *piece) for piece in pieces)


def _decoded(source: ByteSource, runs: Sequence[tuple[int, int]], spec: TensorSpec) -> bytes:
    """Numbers of variable length as those of a dtype; 16-bit floats are stored by their bits."""
    import numpy

    found = []
    for value, nbytes in runs:
        if nbytes < 0:
            found.append(numpy.array([value], "u8"))
            continue
        raw = numpy.frombuffer(read_run(source, value, nbytes), "u1")
        (ends,) = numpy.nonzero(raw < 0x80)
        starts = numpy.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
        lengths = ends - starts + 1
        if not len(ends) or int(ends[-1]) != len(raw) - 1 or int(lengths.max()) > 10:
            raise ValueError("its numbers are cut off")
        numbers = numpy.zeros(len(ends), "u8")
        for place in range(int(lengths.max())):
            longer = lengths > place
            numbers[longer] |= (raw[starts[longer] + place] & 0x7F).astype("u8") << numpy.uint64(7 * place)
        found.append(numbers)
    width = DTYPES[spec.dtype].itemsize
    return numpy.concatenate(found).astype(f"<u{min(width, 8)}").tobytes()


def _beside(
    tensor: _TensorProto, spec: TensorSpec, opened: OpenedSource, contents: Contents, found: dict[str, ByteSource]
) -> Entry:
    """The entry of a tensor whose data are in a file beside the model; `found` has those that were opened already."""
    name, told = tensor.external.get("location", ""), tensor.external
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name or ".." in parts or not name.isprintable():
        text = f"{opened.name!r} places data of {tensor.name[:200]!r} outside of its folder: {name[:200]!r}"
        help = "a model may only name files beside it: copy the data there and write the model again with onnx.save"
        raise CheckpointError(Diagnostic("unsafe-index", text, opened.name, help=help))
    try:
        offset = int(told.get("offset") or 0)
        length = int(told.get("length") or spec.nbytes)
    except ValueError:
        raise Damaged(f"the place of the data of {tensor.name!r} makes no sense") from None
    source = found.get(name) or found.setdefault(name, opened.beside(name))
    contents.sources[source.name] = source
    if offset < 0 or length != spec.nbytes or offset + length > source.size:
        raise Damaged(f"{tensor.name!r} is {spec}; its data are said to be {length:,} bytes at {offset:,} of {name!r}")
    return Entry(spec, source.name, offset)
