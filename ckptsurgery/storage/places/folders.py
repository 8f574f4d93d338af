"""Reading a folder: its names are listed here, which of them are the checkpoint is decided in `choosing`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from ...errors import CheckpointError, Diagnostic
from ...wording import shown_keys
from ..contents import Contents
from ..formats.dcp import METADATA_FILE, read_dcp
from ..formats.dcp_safetensors import rank_files_in, read_rank_files
from ..formats.index_json import weight_map_of
from ..formats.sharded import read_together
from ..formats.sniffing import FileReader
from ..formats.torch_ranks import read_torch_ranks, series_by_rank
from ..formats.zero import read_zero, zero_files
from ..output.transactions import RECORD, Replacement
from ..sources.files import read_regular
from ..sources.system_errors import os_error
from ..subtree import enter
from .by_rank import mounts_by_rank
from .choosing import Choice, Folder, weights_in
from .component_folders import Component, parts_of, snapshot_in
from .config_files import config_beside
from .mounts import join_mounts

__all__ = ["all_of", "read_choice", "read_folder", "read_parts"]

_FOLDERS, _FILES = 200, 1000  # folders below, and files in each, whose names are looked at


def read_folder(path: str, subtree: str | None = None, by_file: bool = False, component: str | None = None) -> Contents:
    """The checkpoint in a folder and its configuration, chosen by the rules in `choosing` and `component_folders`.

    Raises:
        CheckpointError: there is nothing to read, or several checkpoints lie side by side.
    """
    try:
        names = sorted(file.name for file in Path(path).iterdir())
    except OSError as error:
        raise os_error(error, path) from error
    snapshot = snapshot_in(path, names)
    if snapshot is not None:
        return read_folder(snapshot, subtree, by_file, component)
    contents = _read_names(path, names, subtree, by_file, component)
    if contents.config is None:
        contents.config = config_beside(Path(path))
    return contents


def _read_names(path: str, names: list[str], subtree: str | None, by_file: bool, component: str | None) -> Contents:
    if by_file:
        return read_choice(path, all_of(names, path), subtree)
    if METADATA_FILE in names and any(name.endswith(".distcp") for name in names):
        return read_dcp(path, subtree)
    if ranks := rank_files_in(names):
        return read_rank_files(path, ranks, subtree)
    if zero_files(names):
        contents = read_zero(path, names)
        return enter(contents, subtree, path) if subtree else contents
    if series := series_by_rank(names):
        together = read_torch_ranks(path, series, subtree)
        if together is not None:
            return together
    if mounts := mounts_by_rank(names, lambda: _below(path, names), path):
        read = FileReader().read
        return join_mounts({prefix: read(str(Path(path, name)), subtree) for prefix, name in mounts.items()}, path)
    decided = Replacement.read(Path(path)) if RECORD in names else None
    files = FileReader()
    if decided is not None:
        names, files = sorted(decided.names(names)), FileReader(decided.places())

    def shards_of(index: str) -> set[str]:
        file = str(Path(path, index))
        return set(weight_map_of(files.places.get(file, file))[0].values())

    def path_of(name: str) -> str:
        return str(Path(path, name))

    folder = Folder(f"the folder {path!r}", path, names, lambda: _below(path, names), path_of, shards_of)
    found = parts_of(folder, lambda name: read_regular(path_of(name)), component)
    return read_parts(path, found, subtree, files)


def read_parts(
    path: str, parts: list[Component], subtree: str | None = None, files: FileReader | None = None
) -> Contents:
    """What the parts of a checkpoint hold, each under its prefix, with the configurations beside them.

    Raises:
        CheckpointError: as `read_choice` does.
    """
    found: dict[str, Contents] = {}
    alone = len(parts) == 1 and not parts[0].prefix
    for part in parts:
        folder = str(Path(path, part.folder)) if part.folder else path
        contents = read_choice(folder, part.choice, subtree if alone else None, files)
        contents.config = contents.config or config_beside(Path(folder), part.names)
        found[part.prefix] = contents
    if alone:
        return found[""]
    joined = join_mounts(found, path)
    return enter(joined, subtree, path) if subtree else joined


def _below(path: str, names: list[str]) -> list[str]:
    found: list[str] = []
    for name in islice((name for name in names if not name.startswith(".")), _FOLDERS):
        with suppress(OSError):
            inside = Path(path, name)
            if inside.is_dir():
                found += sorted(f"{name}/{file.name}" for file in islice(inside.iterdir(), _FILES))
    return found


def all_of(names: list[str], place: str) -> Choice:
    """All weights of a folder, each file on its own.

    Raises:
        CheckpointError: there are none.
    """
    weights = weights_in(names)
    if not weights:
        text = f"the folder {place!r} holds no checkpoint files"
        notes = tuple(f"there is {name}" for name in shown_keys(names, 10)) or ("it is empty",)
        help = "name the file, or another folder"
        raise CheckpointError(Diagnostic("nothing-to-read", text, place, notes=notes, help=help))
    return Choice(files=tuple(weights), apart=True)


def read_choice(folder: str, choice: Choice, subtree: str | None = None, files: FileReader | None = None) -> Contents:
    """What the chosen files of a folder hold.

    Args:
        folder: the folder.
        choice: which of its files.
        subtree: a dotted path to what should be read.
        files: reads them; where a save was interrupted, by their temporary names.

    Raises:
        CheckpointError: a file is missing, damaged, or of a format that is not read here.
    """
    read = (files or FileReader()).read
    if choice.apart:
        return _side_by_side(folder, choice, subtree, read)
    if choice.alone is not None:
        return read(str(Path(folder, choice.alone)), subtree)
    contents = read_together(folder, choice.files, read)
    return enter(contents, subtree, folder) if subtree else contents


def _side_by_side(folder: str, choice: Choice, subtree: str | None, read: Callable[..., Contents]) -> Contents:
    stems: dict[str, str] = {}
    for name in choice.files:
        stem = name.rpartition(".")[0]
        if stem in stems:
            text = f"{stems[stem]!r} and {name!r} would both be mounted as {stem + '/'!r}"
            help = "move one of them, or mount the files yourself: open({prefix: file})"
            raise CheckpointError(Diagnostic("duplicate-mount", text, folder, help=help))
        stems[stem] = name
    return join_mounts({f"{stem}/": read(str(Path(folder, name)), subtree) for stem, name in stems.items()}, folder)
