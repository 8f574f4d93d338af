"""Torch's zip files: where each tensor lies, read from the directory, the local headers and `data.pkl` alone.

The archive holds `<name>/data.pkl`, a pickle whose tensors refer to storages by key, and one stored record
`<name>/data/<key>` for each storage. A frozen TorchScript has its weights as constants of its code instead, in
`constants.pkl` and `constants/<key>`. Records are aligned through padding in the *local* header's extra field, which
the directory does not show, so the local headers are read (see `zip_archive`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import CheckpointError
from ...specs import DTYPES
from ...wording import is_text
from ..contents import Contents
from ..json_text import parse_json
from ..sources.byte_source import ByteSource, read_at
from ..unpickling.foreign_trees import refuse_part
from ..unpickling.inert import Storage, Tensor
from ..unpickling.nesting import Located, find_model, settle
from ..unpickling.pickle_calls import storage_dtype
from ..unpickling.pickle_machine import Unpickler, damaged
from .format import OpenedSource, opening
from .recognising import zip_problem
from .storages import StorageRun, place_all
from .zip_archive import ZipArchive, refused

__all__ = ["METADATA_RECORD", "TorchTree", "persistent_storages", "read_torch_tree", "read_torch_zip"]

METADATA_RECORD = ".metadata.json"  # string metadata that torch has no place for and passes over

_IN_MEMORY = 1 << 26  # bytes; a longer data.pkl is read through the file
_CONSTANTS = "constants.pkl"
_REMEDY = "torch.save(torch.load(path, weights_only=True), new_path) writes the records uncompressed"


def read_torch_zip(path: str | os.PathLike[str] | OpenedSource, subtree: str | None = None) -> Contents:
    """The tensors of a file written by `torch.save`, without torch and without reading their data.

    Args:
        path: the file, or its source where it is open already.
        subtree: dotted path of the mapping to take; None finds the model's (see `nesting`).

    Raises:
        CheckpointError: not a torch zip file, damaged, compressed, or no single state_dict in it.
    """
    with opening(path) as opened:
        source, archive = opened.name, opened.archive
        root = _root(archive)
        tree, records = _unpickled(archive, f"{root}data.pkl"), f"{root}data/"
        big, metadata = _big_endian(archive, root), _metadata(archive, root)
    try:
        refuse_part(tree, source)
        found = find_model(tree, subtree, source)
    except CheckpointError as error:
        if f"{root}{_CONSTANTS}" not in archive.records or error.diagnostics[0].code != "no-tensors":
            raise
        found, records = _frozen(archive, root, error), f"{root}constants/"

    region = _regions(archive, records, big)
    entries = place_all(found.leaves, region, source)
    return Contents(
        entries,
        metadata=metadata,
        extras=settle(found.extras, lambda leaf: place_all({"": leaf}, region, source)[""]),
        frame=found.frame,
    )


class TorchTree(NamedTuple):
    """The whole value of a file written by `torch.save`, inert.

    Args:
        value: what was saved, with records for tensors.
        region: gives the bytes of a storage.
        source: the file, as it was when it was read.
    """

    value: Any
    region: Callable[[Storage], StorageRun]
    source: ByteSource


def read_torch_tree(path: str) -> TorchTree:
    """Return the whole value of a file written by `torch.save`.

    Raises:
        CheckpointError: not a torch zip file, damaged, or compressed.
    """
    with opening(path) as opened:
        archive = opened.archive
        root = _root(archive)
        region = _regions(archive, f"{root}data/", _big_endian(archive, root))
        return TorchTree(_unpickled(archive, f"{root}data.pkl"), region, opened.source)


def _regions(archive: ZipArchive, records: str, big_endian: bool) -> Callable[[Storage], StorageRun]:
    """What finds the bytes of the storages of an archive."""

    def region(storage: Storage) -> StorageRun:
        if storage.place is not None:
            return StorageRun(archive.source, *storage.place)
        record = archive.stored(f"{records}{storage.key}", _REMEDY)
        if storage.dtype and storage.numel * DTYPES[storage.dtype].itemsize > record.nbytes:
            raise ValueError(f"its storage {storage.key!r} is cut short ({record.nbytes} bytes)")
        return StorageRun(archive.source, record.offset, record.nbytes, big_endian)

    return region


def _root(archive: ZipArchive) -> str:
    roots = [n.removesuffix("data.pkl") for n in archive.records if n.endswith("data.pkl") and n.count("/") <= 1]
    roots = [r for r in roots if r == "" or r.endswith("/")]
    if len(roots) == 1:
        return roots[0]
    names = list(archive.records)
    if roots:
        raise refused(archive.source, "damaged-zip", "holds more than one data.pkl")
    raise zip_problem(names, archive.source)


def _frozen(archive: ZipArchive, root: str, error: CheckpointError) -> Located:
    """The constants of a frozen TorchScript, by the names that its code has for them; else the error is raised."""
    found = _unpickled(archive, f"{root}{_CONSTANTS}")
    constants = enumerate(found if type(found) is tuple else ())
    leaves = {f"CONSTANTS.c{number}": value for number, value in constants if type(value) is Tensor}
    if not leaves:
        raise error
    return Located(leaves, {})


def _unpickled(archive: ZipArchive, name: str) -> Any:
    record = archive.stored(name, _REMEDY)
    source, persistent = archive.source, persistent_storages(archive.source)
    if record.nbytes <= _IN_MEMORY:
        data = read_at(archive.file, record.offset, record.nbytes)
        return Unpickler(io.BytesIO(data), len(data), source, persistent, record.offset, size=archive.size).load()
    archive.file.seek(record.offset)
    return Unpickler(archive.file, record.offset + record.nbytes, source, persistent, size=archive.size).load()


def persistent_storages(source: str) -> Callable[[Any], Storage]:
    """Return what the persistent ids of one pickle stand for: storages, each known by its key.

    Args:
        source: the file's name in errors.
    """
    storages: dict[str, Storage] = {}

    def persistent(identity: Any) -> Storage:
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

    return persistent


def _metadata(archive: ZipArchive, root: str) -> dict[str, str]:
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


def _big_endian(archive: ZipArchive, root: str) -> bool:
    name = f"{root}byteorder"
    order = archive.bytes_of(name).strip() if name in archive.records else b"little"
    if order not in (b"little", b"big"):
        raise refused(archive.source, "damaged-zip", f"has an unknown byte order {order[:16]!r}")
    return order == b"big"
