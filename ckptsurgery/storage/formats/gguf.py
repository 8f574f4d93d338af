"""GGUF, the format of ggml: a header of typed key-value pairs and tensor descriptions, then the tensors' bytes.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors of plain numbers are tensors of that dtype.
Tensors of quantised blocks are packed: `U8`, with the last axis in bytes; `extras["gguf"]["tensor_types"]` names their
types. Dimensions are written innermost first, and are reversed here.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ...errors import CheckpointError, Diagnostic, Remedy
from ...specs import TensorSpec, shape_problem
from ...wording import is_text, shown_keys
from ..contents import Contents, Entry
from .format import Announced, Format, OpenedSource
from .gguf_splits import whole_model
from .gguf_types import BLOCKS, FILE_TYPES, NUMBERS, PLAIN, TYPE_OF

if TYPE_CHECKING:
    from ..output.staging import Writer

__all__ = ["GgufFormat"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_AGAIN = "download or copy the file again"
_ALIGNMENT = "general.alignment"
_FILE_TYPE = "general.file_type"
_STRING, _ARRAY = 8, 9
_DEPTH = 4  # of arrays in arrays
_DIMENSIONS = 4  # of ggml's tensors


class GgufFormat(Format):
    """A file of ggml and the programs built on it."""

    name = "gguf"
    text = "a GGUF file"
    suffixes = (".gguf",)
    writes = (".gguf",)
    holds_extras = True

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether the magic bytes are at the start."""
        return head.startswith(_MAGIC)

    def read(self, opened: OpenedSource) -> Contents:
        """Return the tensors; the key-value pairs are the config, and `extras["gguf"]` keeps them as they are.

        The first of several files that hold one model leads to the others, which are beside it.

        Raises:
            CheckpointError: a header is damaged, or of a version that is not read; one of several files is missing.
        """
        return whole_model(self._of_one_file(opened), opened, self._of_one_file)

    def _of_one_file(self, opened: OpenedSource) -> Contents:
        cursor = _Cursor.at_start(opened)
        tensors, pairs = cursor.number("Q"), cursor.number("Q")
        metadata: dict[str, Any] = {}
        kinds: dict[str, list[int]] = {}
        for _ in range(cursor.count(pairs, 12)):
            key = cursor.text()
            if key in metadata:
                raise cursor.damaged(f"the key {key!r} is given twice")
            metadata[key], kinds[key] = cursor.value(cursor.number("I"))
        rows = [cursor.row() for _ in range(cursor.count(tensors, 24))]
        alignment = metadata.get(_ALIGNMENT, 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise cursor.damaged(f"its alignment is {str(alignment)[:40]}")
        start = -(-opened.file.tell() // alignment) * alignment
        entries = _placed(rows, start, cursor)
        last = max((entry.offset + entry.spec.nbytes for entry in entries.values()), default=start)
        opened.refuse_behind(-(-last // alignment) * alignment)
        packed = {row.name: BLOCKS[row.type].name for row in rows if row.type not in PLAIN}
        about = {"metadata": metadata, "kinds": kinds, "tensor_types": packed}
        return Contents(entries, extras={"gguf": about}, config=_nested(metadata))

    def writer(self, announced: Announced) -> Writer:
        """Return a writer; metadata and packed types are those of the GGUF file that the tensors come from.

        Raises:
            CheckpointError: a dtype that GGUF does not have, more than four dimensions, or an alias.
        """
        about = announced.extras.get("gguf")
        about = about if isinstance(about, Mapping) else {}
        types = _types(announced, about.get("tensor_types", {}))
        metadata, kinds = dict(about.get("metadata", {})), dict(about.get("kinds", {}))
        metadata.pop(_ALIGNMENT, None)
        if _FILE_TYPE in metadata:
            metadata[_FILE_TYPE] = _file_type(announced.specs, types, metadata[_FILE_TYPE])
        head = bytearray(_MAGIC + struct.pack("<IQQ", 3, len(announced.specs), len(metadata)))
        for key, value in metadata.items():
            head += _string(key) + _encoded(value, list(kinds[key]))
        offsets: dict[str, int] = {}
        end = 0
        for key, spec in announced.specs.items():
            shape = _logical(spec, types[key])
            head += _string(key) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            head += struct.pack("<IQ", types[key], end)
            offsets[key] = end
            end = -(-(end + spec.nbytes) // 32) * 32
        head += bytes(-len(head) % 32)
        start = len(head)
        made = announced.in_one_file(bytes(head), {key: start + at for key, at in offsets.items()}, start + end)
        made.left_out = [path for path in announced.extras if path != "gguf"]
        return made


class _Row(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(slots=True)
class _Cursor:
    """Reads values one after another, each of which must end within the file."""

    file: BinaryIO
    size: int
    path: str
    order: str

    @classmethod
    def at_start(cls, opened: OpenedSource) -> _Cursor:
        opened.file.seek(len(_MAGIC))
        raw = opened.file.read(4)
        for order in ("<", ">"):
            if len(raw) == 4 and struct.unpack(order + "I", raw)[0] in _VERSIONS:
                return cls(opened.file, opened.size, opened.name, order)
        text = f"{opened.name!r} is a GGUF file of version {int.from_bytes(raw, 'little')}; 2 and 3 are read"
        help = "write it again with the gguf package: gguf-new-metadata OLD NEW"
        raise CheckpointError(Diagnostic("unsupported-format", text, opened.name, help=help))

    def damaged(self, why: str) -> CheckpointError:
        return CheckpointError(Diagnostic("bad-header", f"{self.path!r} is damaged: {why}", self.path, help=_AGAIN))

    def count(self, number: int, least: int) -> int:
        """A number of things that take some bytes each, which must be left in the file."""
        if number > (self.size - self.file.tell()) // least:
            raise self.damaged(f"it announces {number:,} entries, more than its bytes can hold")
        return number

    def take(self, nbytes: int) -> bytes:
        data = self.file.read(self.count(nbytes, 1))
        if len(data) < nbytes:
            raise self.damaged("it ends in the header")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(self.order + code, self.take(struct.calcsize("=" + code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text is not UTF-8: {error.reason}") from None

    def value(self, kind: int, depth: int = 0) -> tuple[Any, list[int]]:
        """A value, and its type; of an array, the types from the outermost to the innermost."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind]), [kind]
        if kind == _STRING:
            return self.text(), [kind]
        if kind != _ARRAY or depth >= _DEPTH:
            raise self.damaged(f"a value is of the unknown type {kind}, or nested too deep")
        inner, number = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            code = NUMBERS[inner]
            width = struct.calcsize("=" + code)
            data = self.take(self.count(number, width) * width)
            return list(struct.unpack(f"{self.order}{number}{code}", data)), [kind, inner]
        found, kinds = [], [inner]
        for _ in range(self.count(number, 8)):
            item, kinds = self.value(inner, depth + 1)
            found.append(item)
        return found, [kind, *kinds]

    def row(self) -> _Row:
        name, dimensions = self.text(), self.number("I")
        if dimensions > _DIMENSIONS:
            raise self.damaged(f"the tensor {name!r} has {dimensions} dimensions; {_DIMENSIONS} is the limit")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return _Row(name, shape, self.number("I"), self.number("Q"))


def _placed(rows: Sequence[_Row], start: int, cursor: _Cursor) -> dict[str, Entry]:
    """The entries of the tensors that a header describes, in its order."""
    entries: dict[str, Entry] = {}
    for row in rows:
        if row.name in entries or not row.name or not is_text(row.name):
            raise cursor.damaged(f"the tensor name {row.name!r} is given twice, or is none")
        block = BLOCKS.get(row.type)
        if block is None:
            text = f"the tensor {row.name!r} is of ggml's type {row.type}, which is not known here"
            raise CheckpointError(Diagnostic("unknown-dtype", text, cursor.path, help="update ckptsurgery"))
        absurd = shape_problem(row.shape, 64)
        if absurd or (row.shape[-1] if row.shape else 1) % block.elements:
            raise cursor.damaged(f"the tensor {row.name!r} {absurd or f'does not fill blocks of {block.elements}'}")
        dtype, shape = PLAIN.get(row.type, "U8"), row.shape
        if row.type not in PLAIN:
            shape = (*row.shape[:-1], row.shape[-1] // block.elements * block.nbytes) if row.shape else (block.nbytes,)
        swapped = cursor.order == ">" and block.nbytes > 1
        if swapped and row.type not in PLAIN:
            text = f"the tensor {row.name!r} is of big-endian {block.name} blocks, which are not read here"
            help = "convert the file to little-endian: gguf-convert-endian FILE little"
            raise CheckpointError(Diagnostic("unsupported-format", text, cursor.path, help=help))
        entries[row.name] = Entry(TensorSpec(shape, dtype), cursor.path, start + row.offset, None, swapped)
    last = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < last:
            raise cursor.damaged(f"the tensor {name!r} overlaps with another one")
        last = entry.offset + entry.spec.nbytes
    if last > cursor.size and entries:
        raise cursor.damaged(f"its tensors end at byte {last:,}, and the file at {cursor.size:,}")
    return entries


def _nested(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The key-value pairs by the parts of their names, without the tokenizer's."""
    tree: dict[str, Any] = {}
    for key, value in metadata.items():
        *path, last = key.split(".")
        if path[:1] == ["tokenizer"] or (isinstance(value, list) and len(value) > 1000):
            continue
        node: Any = tree
        for part in path:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.setdefault(last, value)
    return tree


def _types(announced: Announced, packed: Mapping[str, str]) -> dict[str, int]:
    """ggml's type of each tensor."""
    plain = {dtype: number for number, dtype in PLAIN.items()}
    found, wrong = {}, []
    for key, spec in announced.specs.items():
        kind = TYPE_OF.get(packed.get(key, ""), -1) if spec.dtype == "U8" else plain.get(spec.dtype, -1)
        if kind < 0 or len(spec.shape) > _DIMENSIONS or (spec.dtype == "U8" and not _fills(spec, kind)):
            wrong.append(f"{key} {spec}")
        else:
            found[key] = kind
    path = str(announced.path)
    if wrong:
        text = f"GGUF has no type for {wrong[0]}" + (f" and {len(wrong) - 1:,} more tensors" if wrong[1:] else "")
        meant = Remedy("path", str(announced.path.with_suffix(".safetensors")), "can hold them")
        advice = f"or cast to one of {', '.join(plain)}; packed blocks keep their type under the key that they had"
        raise CheckpointError(
            Diagnostic("dtype-not-in-format", text, path, shown_keys(wrong[1:]), remedies=(meant,), advice=advice)
        )
    if announced.aliases:
        text = f"GGUF stores each tensor once, and has no place for {next(iter(announced.aliases))!r}, a tied name"
        help = f'drop the tied names: drop = ["{next(iter(announced.aliases))}"]'
        raise CheckpointError(Diagnostic("tie-not-in-format", text, path, shown_keys(announced.aliases), help=help))
    return found


def _file_type(specs: Mapping[str, TensorSpec], types: Mapping[str, int], before: Any) -> Any:
    """The number of the type that the most bytes of matrices have; what was there where that type has none."""
    held: Counter[str] = Counter()
    for key, spec in specs.items():
        if len(spec.shape) > 1:
            held[BLOCKS[types[key]].name] += spec.nbytes
    return FILE_TYPES.get(held.most_common(1)[0][0], before) if held else before


def _fills(spec: TensorSpec, kind: int) -> bool:
    return bool(spec.shape) and spec.shape[-1] % BLOCKS[kind].nbytes == 0


def _logical(spec: TensorSpec, kind: int) -> tuple[int, ...]:
    """The shape in elements."""
    block = BLOCKS[kind]
    if kind in PLAIN:
        return spec.shape
    return (*spec.shape[:-1], spec.shape[-1] // block.nbytes * block.elements)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encoded(value: Any, kinds: list[int]) -> bytes:
    """A value with its type in front."""
    return struct.pack("<I", kinds[0]) + _bare(value, kinds)


def _bare(value: Any, kinds: list[int]) -> bytes:
    kind = kinds[0]
    if kind == _STRING:
        return _string(value)
    if kind != _ARRAY:
        return struct.pack("<" + NUMBERS[kind], value)
    inner = kinds[1:]
    head = struct.pack("<IQ", inner[0], len(value))
    if inner[0] in NUMBERS:
        return head + struct.pack(f"<{len(value)}{NUMBERS[inner[0]]}", *value)
    return head + b"".join(_bare(item, inner) for item in value)
