"""Which files of a folder are the checkpoint; where that is not plain, an error lists what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..errors import CheckpointError, Diagnostic, Remedy
from .contents import Contents
from .files import os_error
from .mounts import join_mounts
from .numbering import is_numbered, shard_names
from .sharded import read_together
from .sniffing import read_file
from .subtree import enter
from .text import shown_keys
from .transactions import RECORD, Replacement

__all__ = ["read_folder"]

Reader = Callable[..., Contents]
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pdparams")


def read_folder(path: str, subtree: str | None = None, by_file: bool = False) -> Contents:
    """The checkpoint in a folder: safetensors before pickles, an index before loose files.

    Raises:
        CheckpointError: there is nothing to read, or several checkpoints lie side by side.
    """
    try:
        everything = [file.name for file in Path(path).iterdir()]
    except OSError as error:
        raise os_error(error, path) from error
    names = sorted(name for name in everything if not name.startswith("."))
    if by_file:
        return _by_file(path, subtree, names)
    decided = Replacement.read(Path(path)) if RECORD in everything else None
    places: dict[str, str] = {}
    if decided is not None:
        names, places = sorted(decided.names(names)), decided.places()
    read = partial(read_file, places=places)
    for suffixes, common in (((".safetensors",), "model.safetensors"), (_PICKLES, "pytorch_model.bin")):
        weights = [name for name in names if name.endswith(suffixes)]
        indices = [name for name in names if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        if indices:
            return _indexed(path, subtree, indices, weights, common, read)
        if weights:
            return _loose(path, subtree, weights, common, read)
    raise CheckpointError(
        Diagnostic(
            "nothing-to-read",
            f"the folder {path!r} holds no checkpoint",
            path,
            notes=_listing(names),
            help="name the file, or another folder",
        )
    )


def _indexed(
    path: str, subtree: str | None, indices: Sequence[str], weights: Sequence[str], common: str, read: Reader
) -> Contents:
    index = f"{common}.index.json"
    if index not in indices and len(indices) == 1:
        index = indices[0]
    whole = index.removesuffix(".index.json")
    if index not in indices or whole in weights:
        found = [*indices, *([whole] if whole in weights else [])]
        raise _ambiguous(path, found)
    return read(str(Path(path, index)), subtree)


def _loose(path: str, subtree: str | None, weights: Sequence[str], common: str, read: Reader) -> Contents:
    if len(weights) == 1 and len(shard_names(weights[0])) < 2:
        return read(str(Path(path, weights[0])), subtree)
    numbered = all(map(is_numbered, weights))
    if common.endswith(".safetensors") or numbered:
        contents = read_together(path, weights, read)
        return enter(contents, subtree, path) if subtree else contents
    if common in weights:
        return read(str(Path(path, common)), subtree)
    raise _ambiguous(path, weights)


def _by_file(path: str, subtree: str | None, names: Sequence[str]) -> Contents:
    weights = [name for name in names if name.endswith((".safetensors", *_PICKLES))]
    if not weights:
        raise CheckpointError(
            Diagnostic(
                "nothing-to-read",
                f"the folder {path!r} holds no checkpoint files",
                path,
                notes=_listing(names),
                help="name the file, or another folder",
            )
        )
    stems: dict[str, str] = {}
    for name in weights:
        stem = name.rpartition(".")[0]
        if stem in stems:
            text = f"{stems[stem]!r} and {name!r} would both be mounted as {stem + '/'!r}"
            raise CheckpointError(
                Diagnostic(
                    "duplicate-mount",
                    text,
                    path,
                    help="move one of them, or mount the files yourself: open({prefix: file})",
                )
            )
        stems[stem] = name
    return join_mounts({f"{stem}/": read_file(str(Path(path, name)), subtree) for stem, name in stems.items()}, path)


def _ambiguous(path: str, found: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        Diagnostic(
            "ambiguous-folder",
            f"the folder {path!r} holds several checkpoints",
            path,
            notes=tuple(found),
            remedies=(
                Remedy("source", str(Path(path, found[0])), "names one"),
                Remedy("by_file", True, 'opens all, with "file stem/" before keys'),
            ),
        )
    )


def _listing(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"there is {name}" for name in shown_keys(names, 10)) or ("it is empty",)
