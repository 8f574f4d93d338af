"""ONNX models: their initialisers, read where they are stored, in the file itself or in files beside it.

Writers may also keep weights as constants of nodes, and in graphs within nodes: these are tensors of the model too.
Constants that are integers or one number (shapes, axes, fill values) are left with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES, TensorSpec, shape_problem
from ...wording import is_text
from ..contents import Contents, Entry
from ..sources.byte_source import ByteSource, read_run
from ..unpickling.nodes import is_lost, lost
from .built import built
from .cursor import Damaged, reading
from .format import Format, OpenedSource
from .onnx_graphs import DOUBLES, FLOATS, RAW, TensorProto, tensors_of
from .protobuf import LENGTH, VARINT
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
_FIXED = {FLOATS: ("F32", "C64"), DOUBLES: ("F64", "C128")}


class OnnxFormat(Format):
    """A model in the exchange format of ONNX."""

    name = "onnx"
    text = "an ONNX model"
    suffixes = (".onnx",)

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether a message begins as those of ONNX do."""
        return is_onnx(head)

    def read(self, opened: OpenedSource) -> Contents:
        """Return the initialisers, and the constants that are weights, by name.

        `extras["onnx"]` names the types of those that are packed, and `extras["constants"]` has the other constants.

        Raises:
            CheckpointError: damaged, no initialisers, or external data that are not in the folder.
        """
        contents = Contents({})
        constants: dict[str, Entry] = {}
        with reading(opened.name):
            packed, found = dict[str, str](), dict[str, ByteSource]()
            for tensor in tensors_of(opened):
                name = tensor.name
                if not name or name in contents.entries or name in contents.extras or not is_text(name):
                    raise Damaged(f"the name {name[:200]!r} is given twice, or is none")
                if tensor.lost:
                    contents.extras[name] = lost(tensor.lost)
                    continue
                _place(tensor, opened, contents, packed, found)
                if tensor.in_node and name in contents.entries and not _is_weight(contents.entries[name].spec):
                    constants[name] = contents.entries.pop(name)
        if packed:
            contents.extras["onnx"] = {"tensor_types": packed}
        if constants:
            contents.extras["constants"] = constants
        if not contents.entries and not any(is_lost(value) for value in contents.extras.values()):
            text = f"{opened.name!r} is an ONNX model without weights"
            help = "name another file, or open the checkpoint that it was exported from"
            raise CheckpointError(Diagnostic("no-tensors", text, opened.name, help=help))
        return contents


def _is_weight(spec: TensorSpec) -> bool:
    """Whether a constant is a weight: several floats."""
    return spec.numel > 1 and (spec.dtype == "BF16" or spec.dtype[0] in "FC")


def _place(
    tensor: TensorProto, opened: OpenedSource, contents: Contents, packed: dict[str, str], found: dict[str, ByteSource]
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


def _inside(tensor: TensorProto, spec: TensorSpec, opened: OpenedSource) -> Entry:
    """The entry of a tensor whose data are in the message."""
    parts = [part for part in tensor.data if part.nbytes or part.wire == VARINT]
    kinds = {part.number for part in parts}
    if not parts and not spec.numel:
        return Entry(spec, opened.name, 0)
    if len(kinds) != 1:
        raise Damaged(f"{tensor.name!r} has its data in {len(kinds)} fields")
    (number,) = kinds
    if number == RAW or spec.dtype in _FIXED.get(number, ()):
        held = sum(part.nbytes for part in parts)
        if held != spec.nbytes or any(part.wire == VARINT for part in parts):
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
    runs = [(part.value, part.nbytes if part.wire == LENGTH else -1) for part in parts]
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
    tensor: TensorProto, spec: TensorSpec, opened: OpenedSource, contents: Contents, found: dict[str, ByteSource]
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
