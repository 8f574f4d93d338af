"""Plain pickles: dictionaries of numpy arrays or torch tensors, as `pickle.dump` and Paddle's `save` write them.

Paddle's conventions are undone on the way: a parameter as a pair `(name, array)` is the array, slices of a large
parameter (`key@@.0`, …, described by `UnpackBigParamInfor@@`) are joined, and 16-bit unsigned integers are bfloat16,
which numpy does not have. Arrays lie in the file as they are, save in pickles of protocol 2, which spell bytes as text.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from ..contents import Contents
from ..unpickling.foreign_trees import refuse_part
from ..unpickling.inert import Array, Joined, NumpyType, Storage
from ..unpickling.nesting import find_model, settle
from ..unpickling.pickle_machine import Unpickler, trailing
from .format import OpenedSource, opening
from .storages import LateTensor, StorageRun, place_all
from .torch_legacy import nested_reader

__all__ = ["read_pickle"]

_NAMES, _SLICES = "StructuredToParameterName@@", "UnpackBigParamInfor@@"
_DEPTH = 16


def read_pickle(path: str | os.PathLike[str] | OpenedSource, subtree: str | None = None) -> Contents:
    """The arrays and tensors of a plain pickle, without running anything of it.

    Args:
        path: the file, or its source where it is open already.
        subtree: dotted path of the mapping to take; None finds the model's (see `nesting`).

    Raises:
        CheckpointError: damaged or truncated, no tensors, or tensors that only the file's own code would make.
    """
    with opening(path) as opened:
        source, size, file = opened.name, opened.size, opened.file
        file.seek(0)
        tree = Unpickler(file, size, source, nested=nested_reader(opened)).load()
        if file.tell() != size:
            raise trailing(source, size - file.tell(), "pickle.dump")
    refuse_part(tree, source)
    if _marks(tree, _DEPTH):
        tree = _plain(tree, _DEPTH)
    found = find_model(tree, subtree, source)

    def region(storage: Storage) -> StorageRun:
        if storage.place is None:
            raise ValueError("its storage lies outside of the pickle")
        return StorageRun(source, *storage.place)

    entries = place_all(found.leaves, region, source)
    for key, entry in entries.items():
        if type(entry.tensor) is LateTensor:
            entries[key] = entry._replace(tensor=replace(entry.tensor, source=opened.source))
    extras = settle(found.extras, lambda leaf: place_all({"": leaf}, region, source)[""])
    return Contents(entries, extras=extras, frame=found.frame)


def _is_pair(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2 and type(value[0]) is str and type(value[1]) is Array


def _marks(tree: Any, depth: int) -> bool:
    """Whether a tree follows Paddle's conventions."""
    if not isinstance(tree, dict) or depth <= 0:
        return False
    return _NAMES in tree or _SLICES in tree or any(_is_pair(v) or _marks(v, depth - 1) for v in tree.values())


def _plain(tree: Any, depth: int) -> Any:
    """The tree without Paddle's conventions."""
    if _is_pair(tree):
        tree = tree[1]
    if type(tree) is Array:
        if tree.type is not None and tree.type.code == "u2":
            tree.type = NumpyType("bfloat16", tree.type.big_endian)
        return tree
    if not isinstance(tree, dict) or depth <= 0:
        return tree
    made = {key: _plain(value, depth - 1) for key, value in tree.items() if key != _SLICES}
    slices = tree.get(_SLICES)
    for key, told in slices.items() if isinstance(slices, dict) else ():
        if not isinstance(told, dict):
            continue
        names, shape = told.get("slices"), told.get("OriginShape")
        if not isinstance(names, (list, tuple)) or not isinstance(shape, (list, tuple)):
            continue
        if not all(type(name) is str for name in names) or len(set(names)) < len(names):
            continue  # no slices at all, or one that is used many times over
        arrays = [part for part in map(made.get, names) if type(part) is Array]
        dtype = arrays[0].dtype if arrays else None
        if dtype is not None and len(arrays) == len(names):
            made[key] = Joined(arrays, tuple(shape), dtype)
            for name in names:
                made.pop(name, None)
    return made
