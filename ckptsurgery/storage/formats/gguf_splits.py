"""A GGUF model in several files, as `gguf-split` and `gguf`'s writer cut it.

Each file holds some of the tensors, its number (`split.no`, from 0) and how many files there are (`split.count`). The
first one has the model's key-value pairs; the names of the others follow from its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import CheckpointError, Diagnostic, Remedy
from ..contents import Contents
from .format import OpenedSource
from .numbering import shard_names

__all__ = ["whole_model"]

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def whole_model(first: Contents, opened: OpenedSource, read: Callable[[OpenedSource], Contents]) -> Contents:
    """Return the tensors of all files that a model was split into; of a whole model's file, its own.

    Args:
        first: the contents of the opened file.
        opened: the file.
        read: reads one of the others.

    Raises:
        CheckpointError: it is not the first file, one of the others is missing, or they do not belong together.
    """
    pairs = first.extras["gguf"]["metadata"]
    count, number = pairs.get(_COUNT, 1), pairs.get(_NUMBER, 0)
    if type(count) is not int or count < 2:
        return first
    own = opened.name.replace("\\", "/").rpartition("/")[2]
    names = shard_names(own)
    if number != 0:
        raise _not_the_first(opened.name, number, count, opened.name[: len(opened.name) - len(own)], names)
    if len(names) != count or own != names[0]:
        text = f"{opened.name!r} is the first of {count:,} files, and its name does not show those of the others"
        help = f"name it and the others as gguf-split does, such as model-00001-of-{count:05d}.gguf"
        raise CheckpointError(Diagnostic("missing-shard", text, opened.name, help=help))
    for place, name in enumerate(names[1:], 1):
        source = opened.beside(name)
        with OpenedSource(source) as other:
            part = read(other)
        first.sources[source.name] = source
        its = part.extras["gguf"]
        if (its["metadata"].get(_NUMBER), its["metadata"].get(_COUNT)) != (place, count):
            raise _mixed(opened.name, f"{name!r} does not say that it is file {place + 1:,} of {count:,}")
        for key, entry in part.entries.items():
            if key in first.entries:
                raise _mixed(opened.name, f"{key!r} is in {name!r} and in a file before it")
            first.entries[key] = entry
        first.extras["gguf"]["tensor_types"] |= its["tensor_types"]
    told = pairs.get(_TENSORS, len(first.entries))
    if told != len(first.entries):
        raise _mixed(opened.name, f"they hold {len(first.entries):,} tensors of {told:,}")
    _forget_the_split(first.extras["gguf"], first)
    return first


def _forget_the_split(about: dict[str, Any], contents: Contents) -> None:
    """Remove the facts of the split, so that a file that is written from all of them does not call itself a part."""
    for key in (_NUMBER, _COUNT, _TENSORS):
        about["metadata"].pop(key, None)
        about["kinds"].pop(key, None)
    contents.config = {key: value for key, value in (contents.config or {}).items() if key != "split"}


def _mixed(path: str, why: str) -> CheckpointError:
    help = "download the files of the model again, all from one place"
    text = f"the files that {path!r} is the first of do not belong together: {why}"
    return CheckpointError(Diagnostic("bad-header", text, path, help=help))


def _not_the_first(path: str, number: Any, count: int, folder: str, names: list[str]) -> CheckpointError:
    text = f"{path!r} is file {number + 1 if type(number) is int else '?'} of the {count:,} that hold one model"
    if not names:
        return CheckpointError(Diagnostic("part-of-a-folder", text, path, help="open the first of them"))
    remedy = Remedy("source", {path: folder + names[0]}, kind="instead")
    help = f"open the first of them, which leads to the others: {folder + names[0]!r}"
    return CheckpointError(Diagnostic("part-of-a-folder", text, path, help=help, remedies=(remedy,)))
