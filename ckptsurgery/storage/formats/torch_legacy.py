"""Torch's files from before 1.6, which `_use_new_zipfile_serialization=False` still writes.

Five pickles follow each other: a magic number, a protocol version, facts of the writing machine, the object with its
storages as persistent ids, and the list of the storages' keys; then for each key the number of elements (8 bytes) and
the elements. Both are little-endian whatever the writing machine was: torch swaps on writing.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO, NamedTuple

from ...errors import CheckpointError, Diagnostic
from ..contents import Contents
from ..sources.byte_source import read_at
from ..unpickling.foreign_trees import refuse_part
from ..unpickling.inert import Blob, FileBytes, Opaque, Storage
from ..unpickling.nesting import find_model, settle
from ..unpickling.nodes import name_of
from ..unpickling.pickle_calls import storage_dtype, storage_width
from ..unpickling.pickle_machine import Unpickler, damaged, trailing
from .format import OpenedSource, opening
from .storages import StorageRun, place_all

__all__ = ["nested_reader", "read_torch_legacy"]

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001


class _Parsed(NamedTuple):
    tree: Any
    places: dict[str, tuple[int, int]]  # storage key -> offset in the file, bytes


def read_torch_legacy(path: str | os.PathLike[str] | OpenedSource, subtree: str | None = None) -> Contents:
    """The tensors of a legacy torch file, without torch and without reading their data.

    Args:
        path: the file, or its source where it is open already.
        subtree: dotted path of the mapping to take; None finds the model's (see `nesting`).

    Raises:
        CheckpointError: not a legacy torch file, damaged or truncated, or no single state_dict in it.
    """
    with opening(path) as opened:
        source = opened.name
        parsed = _parse(opened.file, 0, opened.size, source)
    refuse_part(parsed.tree, source)
    found = find_model(parsed.tree, subtree, source)

    def region(storage: Storage) -> StorageRun:
        place = storage.place or parsed.places.get(storage.key)
        if place is None:
            raise ValueError(f"its storage {storage.key!r} is missing")
        return StorageRun(source, *place)

    entries = place_all(found.leaves, region, source)
    extras = settle(found.extras, lambda leaf: place_all({"": leaf}, region, source)[""])
    return Contents(entries, extras=extras, frame=found.frame)


def _parse(file: BinaryIO, start: int, end: int, source: str) -> _Parsed:
    file.seek(start)
    magic = Unpickler(file, end, source).load()
    if type(magic) is not int or magic != _MAGIC:
        raise _refused(source, "not-a-checkpoint", "does not begin with torch's magic number")
    version = Unpickler(file, end, source).load()
    if type(version) is not int or version != _VERSION:
        raise _refused(source, "unknown-version", f"is a torch file of an unknown version ({name_of(version)[:40]})")
    Unpickler(file, end, source).load()  # byte order and sizes of the writing machine; the data do not depend on them
    storages: dict[str, tuple[Storage, int]] = {}

    def persistent(identity: Any) -> Any:
        return _storage(identity, storages, source)

    tree = Unpickler(file, end, source, persistent).load()
    keys = Unpickler(file, end, source).load()
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise damaged(source, "the list of its storages is none")
    return _Parsed(tree, _places(file, end, keys, storages, source))


def _storage(identity: Any, storages: dict[str, tuple[Storage, int]], source: str) -> Any:
    kind = identity[0] if type(identity) is tuple and identity else None
    if kind == "module" and len(identity) > 1:
        return identity[1]  # a module's class, with its source code beside it
    if kind != "storage" or len(identity) < 5:
        raise damaged(source, "a persistent id is no storage")
    _, kind, key, location, numel, *view = identity
    location = location if type(location) is str else ""
    if type(key) is not str or type(numel) is not int or numel < 0:
        raise damaged(source, "a storage has no key or no size")
    root = storages.get(key)
    if root is None:
        root = storages[key] = Storage(key, storage_dtype(kind), numel, location), storage_width(kind)
    if storage_dtype(kind) != root[0].dtype:
        # torch writes no such file, and reads by the first type what it finds in one
        raise damaged(source, f"storage {key!r} is of two types")
    if view and type(view[0]) is tuple:
        _, shift, numel = view[0]
        if type(shift) is not int or type(numel) is not int or min(shift, numel) < 0:
            raise damaged(source, "a view of a storage makes no sense")
        return Storage(key, root[0].dtype, numel, location, shift)
    return root[0]


def _places(
    file: BinaryIO, end: int, keys: list[str], storages: dict[str, tuple[Storage, int]], source: str
) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    at = file.tell()
    for key in keys:
        if key not in storages or key in places:
            raise damaged(source, f"storage {key!r} is listed and not used, or listed twice")
        storage, width = storages[key]
        head = read_at(file, at, 8)
        numel = int.from_bytes(head, "little", signed=True)
        if len(head) < 8 or at + 8 + storage.numel * width > end:
            raise damaged(source, f"it is truncated in storage {key!r}")
        if numel != storage.numel:
            raise damaged(source, f"storage {key!r} holds {numel} elements where {storage.numel} are announced")
        places[key] = at + 8, numel * width
        at += 8 + numel * width
    if at != end:
        # Two calls of torch.save into one open file: the second would be left out without a word.
        raise trailing(source, end - at, "torch.save")
    return places


def nested_reader(opened: OpenedSource) -> Any:
    """A function from a byte string of a file that is itself a legacy torch file to the storage in it.

    `pickle.dump` of tensors writes such strings, one a storage.
    """

    def read(data: FileBytes | Blob) -> Any:
        start, nbytes = (data.offset, data.nbytes) if isinstance(data, Blob) else (data.at, len(data))
        back = opened.file.tell()
        try:
            tree, places = _parse(opened.file, start, start + nbytes, opened.name)
        finally:
            opened.file.seek(back)
        if type(tree) is not Storage:
            return Opaque("torch.storage", "_load_from_bytes", (), "it holds no storage")
        tree.place = places[tree.key]
        return tree

    return read


def _refused(source: str, code: str, why: str) -> CheckpointError:
    help = "copy or download it again, or have it written again by torch.save"
    return CheckpointError(Diagnostic(code, f"{source!r} {why}", place=source, help=help))
