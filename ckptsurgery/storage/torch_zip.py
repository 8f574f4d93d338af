"""Torch's zip files: where each tensor lies, read from the directory, the local headers and `data.pkl` alone.

The archive holds `<name>/data.pkl`, a pickle whose tensors refer to storages by key, and one stored record
`<name>/data/<key>` for each storage. Records are aligned through padding in the *local* header's extra field, which the
directory does not show, so the local headers are read, and must agree with the directory.
"""

from __future__ import annotations

import io
import itertools
import os
import struct
import zipfile
from typing import Any, BinaryIO, NamedTuple

from ..errors import CheckpointError, Diagnostic
from ..specs import DTYPES
from .contents import Contents
from .files import os_error
from .inert import Storage
from .json_text import parse_json
from .nesting import locate, settle
from .pickle_calls import storage_dtype
from .pickle_machine import Unpickler, damaged
from .placing import Region, place_all
from .text import is_text

__all__ = ["METADATA_RECORD", "Record", "TorchArchive", "read_torch_zip"]

METADATA_RECORD = ".metadata.json"  # string metadata that torch has no place for and passes over

_LOCAL = struct.Struct("<4s5H3I2H")
_IN_MEMORY = 1 << 26  # bytes; a longer data.pkl is read through the file
_ENCRYPTED, _DESCRIPTOR = 1, 8
_SCRIPTED = "torch.save(torch.jit.load(path).state_dict(), new_path)"
_REMEDY = "torch.save(torch.load(path, weights_only=True), new_path) writes the records uncompressed"


class Record(NamedTuple):
    """One file of the archive: where its bytes lie, and whether they are stored as they are."""

    name: str
    offset: int
    nbytes: int
    stored: bool


def _refused(source: str, code: str, why: str, help: str | None = None) -> CheckpointError:
    help = help or "copy or download it again, or have it written again by torch.save"
    return CheckpointError(Diagnostic(code, f"{source!r} {why}", place=source, help=help))


class TorchArchive:
    """The directory of one zip file, checked against the local headers.

    Args:
        file: the open file.
        source: its path.

    Raises:
        CheckpointError: no zip file, or one whose parts contradict each other.
    """

    def __init__(self, file: BinaryIO, source: str) -> None:
        self.source = source
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, LookupError, OverflowError) as error:
            why = f"is no readable zip file: {error}"
            raise _refused(source, "damaged-zip", why, "copy or download it again: it may be truncated") from None
        self.records: dict[str, Record] = {}
        runs: list[tuple[int, int, str]] = []
        for info in infos:
            if info.filename in self.records:
                raise _refused(source, "damaged-zip", f"holds {info.filename!r} twice")
            record = self._record(info)
            self.records[info.filename] = record
            runs.append((info.header_offset, record.offset + info.compress_size, info.filename))
        runs.sort()
        for (_, end, name), (start, _, following) in itertools.pairwise(runs):
            if end > start:
                raise _refused(source, "damaged-zip", f"has records that overlap: {name!r} and {following!r}")

    def _record(self, info: zipfile.ZipInfo) -> Record:
        name = info.orig_filename
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or "\0" in name:
            raise _refused(self.source, "damaged-zip", f"holds a record outside of its folder: {name!r}")
        if info.flag_bits & _ENCRYPTED:
            raise _refused(self.source, "damaged-zip", f"is encrypted ({name!r})")
        if not 0 <= info.header_offset < self.size or info.compress_size > self.size:
            raise _refused(self.source, "damaged-zip", f"is truncated: {name!r} reaches past its end")
        head = os.pread(self.file.fileno(), _LOCAL.size + len(name.encode()) + 64, info.header_offset)
        if len(head) < _LOCAL.size:
            raise _refused(self.source, "damaged-zip", f"is truncated before {name!r}")
        sign, _, flags, method, _, _, crc, packed, size, name_size, extra_size = _LOCAL.unpack_from(head)
        written = head[_LOCAL.size : _LOCAL.size + name_size]
        encoding = "utf-8" if flags & 0x800 else "cp437"
        same = sign == b"PK\x03\x04" and method == info.compress_type and written.decode(encoding, "replace") == name
        if same and not flags & _DESCRIPTOR:
            sizes = size in (info.file_size, 0xFFFFFFFF) and packed in (info.compress_size, 0xFFFFFFFF)
            same = crc == info.CRC and sizes
        if not same:
            raise _refused(self.source, "damaged-zip", f"contradicts itself: header and directory differ for {name!r}")
        offset = info.header_offset + _LOCAL.size + name_size + extra_size
        if offset + info.compress_size > self.size:
            raise _refused(self.source, "damaged-zip", f"is truncated: {name!r} reaches past its end")
        stored = info.compress_type == zipfile.ZIP_STORED
        if stored and info.compress_size != info.file_size:
            raise _refused(self.source, "damaged-zip", f"contradicts itself: two sizes for {name!r}")
        return Record(name, offset, info.file_size, stored)

    def stored(self, name: str) -> Record:
        """The record `name`, which has to exist and to be uncompressed."""
        record = self.records.get(name)
        if record is None:
            raise _refused(self.source, "damaged-zip", f"holds no record {name!r}")
        if not record.stored:
            raise _refused(self.source, "compressed-records", f"has compressed records ({name!r})", _REMEDY)
        return record

    def bytes_of(self, name: str, at_most: int = 1 << 20) -> bytes:
        """The bytes of a small record."""
        record = self.stored(name)
        if record.nbytes > at_most:
            raise _refused(self.source, "damaged-zip", f"has an absurdly large record {name!r}")
        return os.pread(self.file.fileno(), record.nbytes, record.offset)


def read_torch_zip(path: str | os.PathLike[str], subtree: str | None = None) -> Contents:
    """The tensors of a file written by `torch.save`, without torch and without reading their data.

    Args:
        path: the file.
        subtree: dotted path of the mapping to take; None finds the model's (see `nesting`).

    Raises:
        CheckpointError: not a torch zip file, damaged, compressed, or no single state_dict in it.
    """
    source = os.fspath(path)
    try:
        with open(source, "rb") as file:  # noqa: PTH123 - the path is kept as the caller spells it
            archive = TorchArchive(file, source)
            root = _root(archive)
            tree = _unpickled(archive, root)
            big, metadata = _big_endian(archive, root), _metadata(archive, root)
    except OSError as error:
        raise os_error(error, source) from error
    try:
        leaves, extras = locate(tree, subtree, source)
    except CheckpointError as error:
        if f"{root}constants.pkl" in archive.records and error.diagnostics[0].code == "no-tensors":
            raise _refused(source, "torchscript", "is a TorchScript archive without plain tensors", _SCRIPTED) from None
        raise

    def region(storage: Storage) -> Region:
        if storage.place is not None:
            return Region(source, *storage.place)
        record = archive.stored(f"{root}data/{storage.key}")
        if storage.dtype and storage.numel * DTYPES[storage.dtype].itemsize > record.nbytes:
            raise ValueError(f"its storage {storage.key!r} is cut short ({record.nbytes} bytes)")
        return Region(source, record.offset, record.nbytes, big)

    entries = place_all(leaves, region, source)
    return Contents(
        entries,
        metadata=metadata,
        extras=settle(extras, lambda leaf: place_all({"": leaf}, region, source)[""]),
    )


def _root(archive: TorchArchive) -> str:
    roots = [n.removesuffix("data.pkl") for n in archive.records if n.endswith("data.pkl") and n.count("/") <= 1]
    roots = [r for r in roots if r == "" or r.endswith("/")]
    if len(roots) == 1:
        return roots[0]
    names = list(archive.records)
    if roots:
        raise _refused(archive.source, "damaged-zip", "holds more than one data.pkl")
    if any(n.endswith("model.json") for n in names):
        why = "is a TorchScript archive of an old version (model.json)"
        raise _refused(archive.source, "torchscript", why, _SCRIPTED)
    if names and all(n.endswith(".npy") for n in names):
        help = "torch.save({k: torch.from_numpy(v) for k, v in numpy.load(path).items()}, new_path)"
        raise _refused(archive.source, "not-a-checkpoint", "is a numpy archive (.npz), not a torch file", help)
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    why = f"is a zip file but no torch file: it holds {shown or 'nothing'}"
    raise _refused(archive.source, "not-a-checkpoint", why)


def _unpickled(archive: TorchArchive, root: str) -> Any:
    record = archive.stored(f"{root}data.pkl")
    storages: dict[str, Storage] = {}
    source = archive.source

    def persistent(identity: Any) -> Any:
        if type(identity) is not tuple or len(identity) < 5 or identity[0] not in ("storage", b"storage"):
            raise damaged(source, "a persistent id is no storage")
        _, kind, key, location, numel = identity[:5]
        if type(key) is not str or type(numel) is not int or numel < 0:
            raise damaged(source, "a storage has no key or no size")
        known = storages.get(key)
        if known is None:
            where = location if type(location) is str else ""
            known = storages[key] = Storage(key, storage_dtype(kind), numel, where)
        elif known.dtype != storage_dtype(kind):
            # torch writes no such file, and reads by the first type what it finds in one
            raise damaged(source, f"storage {key!r} is of two types")
        return known

    if record.nbytes <= _IN_MEMORY:
        data = os.pread(archive.file.fileno(), record.nbytes, record.offset)
        return Unpickler(io.BytesIO(data), len(data), source, persistent, record.offset, size=archive.size).load()
    archive.file.seek(record.offset)
    return Unpickler(archive.file, record.offset + record.nbytes, source, persistent, size=archive.size).load()


def _metadata(archive: TorchArchive, root: str) -> dict[str, str]:
    """What `TorchZipWriter` keeps of another format's metadata."""
    name = root + METADATA_RECORD
    if name not in archive.records:
        return {}
    try:
        noted = parse_json(archive.bytes_of(name, at_most=1 << 26))
    except (ValueError, RecursionError):
        return {}
    pairs = noted.items() if isinstance(noted, dict) else ()
    return {k: v for k, v in pairs if isinstance(v, str) and is_text(k) and is_text(v)}


def _big_endian(archive: TorchArchive, root: str) -> bool:
    name = f"{root}byteorder"
    order = archive.bytes_of(name).strip() if name in archive.records else b"little"
    if order not in (b"little", b"big"):
        raise _refused(archive.source, "damaged-zip", f"has an unknown byte order {order[:16]!r}")
    return order == b"big"
