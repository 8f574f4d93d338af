"""What the files of a checkpoint say before anything is opened: an index against its shards, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError, Diagnostic
from ..language.folding import fold
from ..storage.formats.format import opening
from ..storage.formats.index_json import weight_map_of
from ..storage.formats.sniffing import FileReader
from ..storage.formats.table import recognised
from ..storage.json_text import parse_json
from ..storage.output.transactions import MARK, RECORD
from ..wording import counted
from .conversions import conversion

__all__ = ["file_findings", "shown"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pdparams", ".pkl")


def shown(keys: list[str], limit: int = 8) -> tuple[str, ...]:
    """Keys for a diagnostic's notes, runs of numbers folded."""
    lines = [text for text, _ in fold(keys)]
    return tuple(lines[:limit]) if len(lines) <= limit else (*lines[:limit], f"and {len(lines) - limit} more patterns")


def file_findings(path: Path) -> list[Diagnostic]:
    """What is wrong with a file or a folder of files, apart from what opening it says."""
    try:
        if path.is_dir():
            return list(_of_folder(path))
        return [*_of_pickles([path]), *_without_config(path.parent, [path])] if path.is_file() else []
    except (OSError, ValueError):
        return []  # opening it says why


def _of_folder(folder: Path) -> Iterator[Diagnostic]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    safe = [path for path in files if path.suffix == ".safetensors" and not path.name.startswith(".")]
    pickles = [path for path in files if path.suffix in _PICKLES and not path.name.startswith(".")]
    for suffixes, weights in (((".safetensors",), safe), (_PICKLES, pickles)):
        indices = [path for path in files if path.name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))]
        for index in indices:
            yield from _of_index(index, weights)
    yield from _of_pickles(pickles)
    if safe and pickles:
        yield Diagnostic(
            "two-formats",
            f"{counted(len(safe), 'safetensors file')} and {counted(len(pickles), 'pickle')} lie side by side; "
            "pickles are not read then",
            str(folder),
            shown([path.name for path in pickles]),
            help="remove the pickles if they hold the same",
            severity="note",
        )
    yield from _without_config(folder, [*safe, *pickles])
    yield from _unfinished(folder, [path.name for path in folder.iterdir()])


def _of_index(index: Path, weights: list[Path]) -> Iterator[Diagnostic]:
    """What the shards hold and the index does not name; the other way round is an error on opening."""
    try:
        weight_map, about = weight_map_of(str(index))
    except CheckpointError:
        return
    named = set(weight_map.values())
    stray = [path.name for path in weights if path.name not in named]
    if stray:
        yield Diagnostic(
            "stray-file",
            f"{counted(len(stray), 'file')} of weights in no index, and so not read",
            str(index),
            shown(stray),
            help="remove them, or name them in the index; left behind by another save?",
            severity="warning",
        )
    yield from _of_shards(index, weight_map, about.get("total_size"))


def _of_shards(index: Path, weight_map: Mapping[str, str], told: object) -> Iterator[Diagnostic]:
    """What the shards hold, against what the index says of keys and of the size of all."""
    holder: dict[str, str] = {}
    holders: dict[str, list[str]] = {}  # of keys that lie in several shards
    total = 0
    for name in sorted({*weight_map.values()}):
        try:
            contents = FileReader().read(str(index.parent / name))
        except CheckpointError:
            continue
        keys = contents.entries.keys() - contents.aliases.keys()
        for key in keys & holder.keys():
            holders.setdefault(key, [holder[key]]).append(name)
        holder |= dict.fromkeys(keys, name)
        total += sum(contents.entries[key].spec.nbytes for key in keys if weight_map.get(key) == name)
    unnamed = sorted(holder.keys() - weight_map.keys())
    if unnamed:
        yield Diagnostic(
            "unlisted-keys",
            f"{counted(len(unnamed), 'tensor', 'lies')} in the shards, but not in the index, and so not read",
            str(index),
            shown(unnamed),
            help="add them to the index, or open the folder file by file",
            severity="warning",
        )
    if holders:
        yield _in_several(index, holders, weight_map)
    # Shared storages are counted once by some writers, and as often as they are named by others.
    if type(told) is int and told > total and weight_map.keys() <= holder.keys():
        yield Diagnostic(
            "total-size",
            f"the index says that there are {told:,} bytes of tensors, and its tensors have {total:,}",
            str(index),
            remedies=(conversion("writes a right one", str(index.parent)),),
            advice="was it made for these files?",
            severity="warning",
        )


def _in_several(index: Path, holders: Mapping[str, list[str]], weight_map: Mapping[str, str]) -> Diagnostic:
    twice = sorted(holders)
    example = twice[0]
    decided = weight_map.get(example, "none")
    return Diagnostic(
        "duplicate-key",
        f"{counted(len(twice), 'key', 'lies')} in more than one shard, "
        f"as {example!r} in {' and '.join(holders[example])}",
        str(index),
        shown(twice),
        remedies=(conversion(f"takes what the index decides for, {decided!r}", str(index.parent)),),
        severity="warning",
    )


def _of_pickles(paths: list[Path]) -> Iterator[Diagnostic]:
    kinds: dict[str, list[str]] = {}
    for path in paths:
        try:
            with opening(path) as opened:
                format = recognised(opened.head, opened.names)
        except CheckpointError:
            continue  # opening it says why
        if format is not None and format.executes:
            kinds.setdefault(format.text, []).append(str(path))
    for kind, names in kinds.items():
        source, target = names[0], str(Path(names[0]).with_suffix(".safetensors"))
        if len(names) > 1:
            source, target = str(Path(names[0]).parent), f"{Path(names[0]).parent}-safetensors"
        yield Diagnostic(
            "pickle",
            f"{names[0]!r} is {kind}: nothing of it is run here, but other programs may run what is in it",
            names[0],
            shown(names[1:]),
            remedies=(conversion("writes what other programs can trust", source, target),),
            severity="warning",
        )


def _without_config(folder: Path, weights: list[Path]) -> Iterator[Diagnostic]:
    if not weights:
        return
    try:
        if not isinstance(parse_json((folder / "config.json").read_bytes()), dict):
            raise ValueError("it is no object")
    except FileNotFoundError:
        yield Diagnostic(
            "missing-config",
            "no config.json lies beside the weights, so nothing says what model they belong to",
            str(folder),
            help="copy the model's config.json there; a conversion takes it along among the companions",
            severity="note",
        )
    except (OSError, ValueError, RecursionError) as error:
        yield Diagnostic(
            "bad-config",
            f"config.json cannot be read, so nothing says what model the weights belong to: {error}",
            str(folder / "config.json"),
            help="download or copy it again",
            severity="warning",
        )


def _unfinished(folder: Path, names: list[str]) -> Iterator[Diagnostic]:
    if RECORD in names:
        yield Diagnostic(
            "interrupted-save",
            "a save was interrupted while its files took their names; it is read here, other programs may find nothing",
            str(folder),
            remedies=(conversion("finishes it", str(folder), str(folder), overwrite=True),),
            severity="warning",
        )
    left = sorted(name for name in names if MARK in name and name != RECORD)
    if left:
        yield Diagnostic(
            "unfinished-output",
            f"{counted(len(left), 'temporary file', 'lies')} here: a run is writing, or one was killed",
            str(folder),
            shown(left),
            help="run the same command again, which clears them away, or remove them",
            severity="note",
        )
