"""`TorchZipWriter`: the zip file that `torch.save` would write, laid out beforehand and filled in any order.

Records are stored, their data begin at multiples of 64 bytes, and each is followed by a data descriptor with its
checksum, exactly as torch lays them out: torch computes the offsets of mapped records from that, without reading the
headers.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..specs import DTYPES, TensorSpec
from .contents import Entry, Extent
from .durability import SYNCED, Durability
from .inert import Ordered
from .staging import Output, Writer, beside
from .torch_pickle import OMITTED, Pickle, StoredTensor, writable
from .torch_zip import METADATA_RECORD

__all__ = ["TorchZipWriter"]

_ROOT = "archive/"
_ALIGNMENT = 64
_CHUNK = 1 << 20
_MAX32 = 0xFFFFFFFF
_UTF8, _DESCRIPTOR = 0x800, 0x8


@dataclass(slots=True)
class _Record:
    """One file of the archive: where its header and its data lie."""

    name: str
    header: int
    data: int
    nbytes: int
    crc: int | None = None

    @property
    def flags(self) -> int:
        return _UTF8 | (_DESCRIPTOR if self.nbytes else 0)

    @property
    def wide(self) -> bool:
        return self.nbytes >= _MAX32 or self.header >= _MAX32

    @property
    def end(self) -> int:
        """Where the next header begins: behind the data and their descriptor."""
        return self.data + self.nbytes + ((24 if self.wide else 16) if self.nbytes else 0)

    def local_header(self) -> bytes:
        extra = b""
        if self.wide:
            sizes = struct.pack("<QQ", self.nbytes, self.nbytes) if self.nbytes >= _MAX32 else b""
            place = struct.pack("<Q", self.header) if self.header >= _MAX32 else b""
            extra = struct.pack("<HH", 1, len(sizes + place)) + sizes + place
        name = self.name.encode()
        padding = self.data - self.header - 30 - len(name) - len(extra) - 4
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        fields = (0, self.flags, 0, 0, 0, 0, 0, 0, len(name), len(extra))
        return struct.pack("<4s5H3I2H", b"PK\3\4", *fields) + name + extra

    def descriptor(self) -> bytes:
        if not self.nbytes:
            return b""
        layout = "<4sIQQ" if self.wide else "<4sIII"
        return struct.pack(layout, b"PK\x07\x08", self.crc, self.nbytes, self.nbytes)

    def directory_entry(self) -> bytes:
        size, place, extra = min(self.nbytes, _MAX32), min(self.header, _MAX32), b""
        if self.wide:
            sizes = struct.pack("<QQ", self.nbytes, self.nbytes) if self.nbytes >= _MAX32 else b""
            offset = struct.pack("<Q", self.header) if self.header >= _MAX32 else b""
            extra = struct.pack("<HH", 1, len(sizes + offset)) + sizes + offset
        name = self.name.encode()
        fields = (0, 0, self.flags, 0, 0, 0, self.crc, size, size, len(name), len(extra), 0, 0, 0, 0, place)
        return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + name + extra


def _after(header: int, name: str, nbytes: int) -> _Record:
    """The record that begins at `header`, its data aligned."""
    start = header + 30 + len(_ROOT + name) + 4
    if nbytes >= _MAX32 or header >= _MAX32:
        start += 4 + (16 if nbytes >= _MAX32 else 0) + (8 if header >= _MAX32 else 0)
    return _Record(_ROOT + name, header, -(-start // _ALIGNMENT) * _ALIGNMENT, nbytes)


class TorchZipWriter(Writer):
    """Writes a torch zip file; the tensors' bytes may come in any order and from any thread.

    The file holds the state_dict itself, or `{"state_dict": …, **extras}` where there are extras beside `_metadata`,
    which is set on the state_dict as `Module.state_dict` does. Tensors among the extras are copied along; what cannot
    go along (objects of classes, a second model's `state_dict`) is listed in `left_out`.

    Args:
        path: the file to come.
        specs: key -> spec, in the order that a reader should see.
        aliases: other name -> key, for tied tensors; both names share one storage in the file.
        metadata: string metadata, kept in a record of its own that torch passes over.
        extras: dotted path -> value for what is no tensor of the model.
        durability: whether to wait until all of it is on the disk.

    Raises:
        CheckpointError: a dtype that torch has not; an alias of nothing; and what `Writer` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        aliases: Mapping[str, str] = {},
        metadata: Mapping[str, str] = {},
        extras: Mapping[str, Any] = {},
        durability: Durability = SYNCED,
    ) -> None:
        final = Path(path)
        _check(specs, aliases, str(final))
        self.left_out: list[str] = []
        self._numbers: dict[object, StoredTensor] = {}
        self._kept: list[tuple[int, Any]] = []  # storage number, and the tensor among the extras that fills it
        self._sizes_of = [spec.nbytes for spec in specs.values()]
        pickled = Pickle().dumps(self._tree(specs, aliases, extras))
        plain = self._lay_out(pickled, metadata)
        temporary = beside(final)
        head = bytearray()
        for name, data in plain.items():
            record = self._records[name]
            head.extend(bytes(record.header - len(head)))
            head += record.local_header() + data + record.descriptor()
        places = {
            key: Extent(str(temporary), self._storages[i].data, self._sizes_of[i]) for i, key in enumerate(specs)
        }
        size = self._end + self._directory_size()
        super().__init__([Output(final, temporary, size, bytes(head))], places, durability=durability)
        self.left_out.sort()
        self._temporary = str(temporary)
        self._starts = [record.data for record in self._storages]
        self._running: dict[int, tuple[int, int]] = {}  # storage -> bytes seen in order, their checksum
        self._guard = threading.Lock()

    def _tree(self, specs: Mapping[str, TensorSpec], aliases: Mapping[str, str], extras: Mapping[str, Any]) -> Any:
        model = Ordered()
        for i, (key, spec) in enumerate(specs.items()):
            model[key] = StoredTensor(str(i), spec, None, spec.nbytes)
        for alias, kept in aliases.items():
            model[alias] = model[kept]
        beside: dict[str, Any] = {}
        for path, value in extras.items():
            kept_value = writable(value, path, self._store, self.left_out)
            if kept_value is OMITTED:
                continue
            if path == "_metadata":
                model.attributes["_metadata"] = kept_value
            elif (path == "_extra_state" or path.endswith("._extra_state")) and path not in model:
                model[path] = kept_value
            elif path == "state_dict" or path.startswith("state_dict."):
                self.left_out.append(path)
            else:
                _nest(beside, path, kept_value)
        return {"state_dict": model, **beside} if beside else model

    def _store(self, value: Any) -> StoredTensor | None:
        """The record that a tensor among the extras gets; None for what is no tensor."""
        if isinstance(value, Entry) and value.tensor is not None:
            value = value.tensor() if callable(value.tensor) else value.tensor
        if isinstance(value, Entry):
            spec, strides = value.spec, value.strides
            if DTYPES[spec.dtype].torch is None:
                return None
            nbytes = spec.nbytes if strides is None else _span(spec, strides)
        elif type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "untyped_storage"):
            from .tensors import dense_bytes, spec_of

            try:
                spec, strides = spec_of(value), None
                dense_bytes(value, "")
            except (CheckpointError, RuntimeError, NotImplementedError):
                return None
            nbytes = spec.nbytes
        else:
            return None
        # one tensor twice, such as an optimizer's view of tied weights, is stored once
        place = (value.file, value.offset, spec, strides, value.big_endian) if isinstance(value, Entry) else id(value)
        known = self._numbers.get(place)
        if known is None:
            number = len(self._sizes_of)
            self._sizes_of.append(nbytes)
            self._kept.append((number, value))
            known = self._numbers[place] = StoredTensor(str(number), spec, strides, nbytes)
        return known

    def _lay_out(self, pickled: bytes, metadata: Mapping[str, str]) -> dict[str, bytes]:
        """Places every record; gives back those whose bytes are known already and that come first."""
        plain = {"data.pkl": pickled, ".format_version": b"1", ".storage_alignment": str(_ALIGNMENT).encode()}
        plain["byteorder"] = b"little"
        noted = {key: value for key, value in metadata.items() if (key, value) != ("format", "pt")}
        self._records: dict[str, _Record] = {}
        at = 0
        for name, data in plain.items():
            at = self._add(name, len(data), at, zlib.crc32(data))
        self._storages: list[_Record] = []
        for number, nbytes in enumerate(self._sizes_of):
            at = self._add(f"data/{number}", nbytes, at, None if nbytes else 0)
            self._storages.append(self._records[f"data/{number}"])
        self._tail = {"version": b"3\n"}
        if noted:
            import json

            self._tail[METADATA_RECORD] = json.dumps(noted, ensure_ascii=False).encode()
        for name, data in self._tail.items():
            at = self._add(name, len(data), at, zlib.crc32(data))
        self._end = self._add(".data/serialization_id", 40, at, None)
        return plain

    def _add(self, name: str, nbytes: int, at: int, crc: int | None) -> int:
        record = self._records[name] = _after(at, name, nbytes)
        record.crc = crc
        return record.end

    def write(self, file: str, offset: int, data: Any) -> None:
        """Writes a buffer at an offset of the file that `places` names; checksums are kept of what comes in order."""
        super().write(file, offset, data)
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        number = bisect.bisect_right(self._starts, offset) - 1
        with self._guard:
            # The checksum is made outside of the lock; who comes meanwhile finds itself out of order.
            seen, crc = self._running.get(number, (0, 0))
            self._running[number] = (-1, 0)
        in_order = offset - self._starts[number] == seen
        state = (seen + len(view), zlib.crc32(view, crc)) if in_order else (-1, 0)
        with self._guard:
            self._running[number] = state

    def _complete(self) -> None:
        """Copies the extras' tensors, then writes headers, checksums and the directory."""
        for number, value in self._kept:
            at = self._starts[number]
            for chunk in _chunks(value):
                # not `self.write`: these bytes are not among those that the caller owes
                self._pwrite(self._temporary, at, memoryview(chunk))
                at += len(chunk)
        for number, record in enumerate(self._storages):
            record.crc = self._checksum(number, record)
        before = b""
        for record in self._storages:
            self._seam(before, record)
            before = record.descriptor()
        for name, data in self._tail.items():
            self._seam(before, self._records[name], data)
            before = self._records[name].descriptor()
        identity = self._records[".data/serialization_id"]
        data = self._identity()
        identity.crc = zlib.crc32(data)
        self._seam(before, identity, data)
        self._pwrite(self._temporary, identity.data + len(data), memoryview(identity.descriptor() + self._directory()))

    def _seam(self, before: bytes, record: _Record, data: bytes = b"") -> None:
        """Writes what lies between two records' data: a descriptor and a header."""
        self._pwrite(self._temporary, record.header - len(before), memoryview(before + record.local_header() + data))

    def _checksum(self, number: int, record: _Record) -> int:
        seen, crc = self._running.get(number, (-1, 0)) if record.nbytes else (0, 0)
        if seen == record.nbytes:
            return crc
        crc = 0
        with self._descriptors.using(self._temporary) as descriptor:
            for start in range(0, record.nbytes, _CHUNK):
                count = min(_CHUNK, record.nbytes - start)
                crc = zlib.crc32(os.pread(descriptor, count, record.data + start), crc)
        return crc

    def _identity(self) -> bytes:
        told = "".join(f"{record.name} {record.crc} {record.nbytes}\n" for record in self._records.values())
        return str(int(hashlib.sha256(told.encode()).hexdigest(), 16) % 10**40).zfill(40).encode()

    def _directory(self) -> bytes:
        entries = b"".join(record.directory_entry() for record in self._records.values())
        count, place = len(self._records), self._end
        wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, len(entries), place)
        wide += struct.pack("<4sIQI", b"PK\6\7", 0, place + len(entries), 1)
        few, size, start = min(count, 0xFFFF), min(len(entries), _MAX32), min(place, _MAX32)
        return entries + wide + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, size, start, 0)

    def _directory_size(self) -> int:
        narrow = sum(46 + len(record.name.encode()) for record in self._records.values())
        wide = sum(
            4 + (16 if record.nbytes >= _MAX32 else 0) + (8 if record.header >= _MAX32 else 0)
            for record in self._records.values()
            if record.wide
        )
        return narrow + wide + 56 + 20 + 22


def _check(specs: Mapping[str, TensorSpec], aliases: Mapping[str, str], place: str) -> None:
    problems = []
    for key, spec in specs.items():
        if DTYPES[spec.dtype].torch is None:
            text = f"torch has no dtype for {key!r} ({spec})"
            problems.append(Diagnostic("dtype-not-in-torch", text, place, help="write a .safetensors file"))
        elif DTYPES[spec.dtype].bits < 8 and (not spec.shape or spec.shape[-1] % 2):
            text = f"torch packs {spec.dtype} in pairs, and the last axis of {key!r} is odd: {spec}"
            problems.append(Diagnostic("odd-packed-shape", text, place, help="write a .safetensors file"))
    for alias, kept in aliases.items():
        if kept not in specs or alias in specs:
            why = "a tensor that is written under its own name" if alias in specs else "tied to nothing that is written"
            problems.append(Diagnostic("alias-of-nothing", f"{alias!r} -> {kept!r} is {why}", place))
    if problems:
        raise CheckpointError(problems)


def _nest(tree: dict[str, Any], path: str, value: Any) -> None:
    *above, name = path.split(".")
    node = tree
    for part in above:
        inner = node.setdefault(part, {})
        if not isinstance(inner, dict):
            tree[path] = value
            return
        node = inner
    if name in node:
        tree[path] = value
    else:
        node[name] = value


def _span(spec: TensorSpec, strides: tuple[int, ...]) -> int:
    from .tensors import span

    return span(spec.shape, strides) * DTYPES[spec.dtype].itemsize


def _chunks(value: Any) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor among the extras, a piece at a time."""
    if not isinstance(value, Entry):
        from .tensors import dense_bytes

        yield dense_bytes(value, "")
        return
    assert value.file is not None
    left = value.spec.nbytes if value.strides is None else _span(value.spec, value.strides)
    with open(value.file, "rb") as file:  # noqa: PTH123 - a path from Entry.file, opened as it is
        file.seek(value.offset)
        while left:
            data = file.read(min(left, _CHUNK))
            if not data:
                why = f"{value.file!r} became shorter while it was read"
                raise CheckpointError(Diagnostic("truncated-file", why, value.file))
            left -= len(data)
            if value.big_endian:
                from .tensors import swap_bytes

                data = bytes(swap_bytes(bytearray(data), value.spec.dtype))
            yield data
