"""Several files that are one checkpoint: an index that names them, or a folder of files without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ...errors import CheckpointError, Diagnostic, Remedy
from ...wording import counted, is_text, shown_keys
from ..contents import Contents, Entry
from ..metadata_records import aliases_in, own_metadata
from ..unpickling.frames import Frame
from .index_json import likely_shards, read_index_text, read_plain_index, weight_map_in
from .numbering import series_of, shard_names

__all__ = ["read_index", "read_index_at", "read_together"]


class ShardFiles(Protocol):
    """The files of a folder, where an index or a folder names them."""

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        ...

    def read_shard(self, path: str) -> Contents:
        """Read one of them."""
        ...


_TOLD = 200  # problems that an error lists


def read_index(path: str, files: ShardFiles) -> Contents:
    """The checkpoint that an index file describes; its `weight_map` is an allow-list, in its order.

    Aliases come from the index's metadata, where the hub and transformers put them, and from a shard's own metadata.

    Raises:
        CheckpointError: a shard or a key is missing, or the index points out of its folder; all problems at once.
    """
    text, folder = read_index_text(path), Path(path).parent
    shards = _likely_shards(text, folder, files)
    plain = read_plain_index(text, {name: contents.entries for name, contents in shards.items()})
    if plain is None:
        weight_map, about = weight_map_in(text, path)
        shards = _named_shards(weight_map, path, files, shards)
        entries = _listed(weight_map, shards, path)
    else:
        about, entries = plain.about, {}
        for contents in shards.values():
            entries |= contents.entries
        entries = {key: entries[key] for key in sorted(entries)} if plain.by_name else entries
    return _joined(entries, about, shards.values())


def read_index_at(text: str, place: str, read: Callable[[Sequence[str]], dict[str, Contents]]) -> Contents:
    """The checkpoint that an index at an address describes.

    Args:
        text: of the index.
        place: its address.
        read: reads the shards of some names.

    Raises:
        CheckpointError: a shard or a key is missing, or the index points out of its folder.
    """
    weight_map, about = weight_map_in(text, place)
    shards = read(list(dict.fromkeys(weight_map.values())))
    return _joined(_listed(weight_map, shards, place), about, shards.values())


def _likely_shards(text: str, folder: Path, files: ShardFiles) -> dict[str, Contents]:
    """The shards that an index seems to name, as far as they can be read."""
    shards: dict[str, Contents] = {}
    names = likely_shards(text)
    if all(files.exists(str(folder / name)) for name in names):
        with suppress(CheckpointError):  # what is wrong is told of those that the index does name
            for name in names:
                shards[name] = files.read_shard(str(folder / name))
    return shards


def _named_shards(
    weight_map: Mapping[str, str], path: str, files: ShardFiles, known: Mapping[str, Contents]
) -> dict[str, Contents]:
    """The shards that an index names; those that are known are not read again."""
    folder = Path(path).parent
    problems: list[Diagnostic] = []
    shards: dict[str, Contents] = {}
    for name in dict.fromkeys(weight_map.values()):
        if len(problems) >= _TOLD:
            break
        shard = str(folder / name)
        if not files.exists(shard):
            keys = [key for key, its in weight_map.items() if its == name]
            text = f"the index names the shard {name!r}, which is not there ({counted(len(keys), 'key')})"
            problems.append(
                Diagnostic(
                    "missing-shard", text, path, notes=shown_keys(keys), help="download or copy the missing file too"
                )
            )
            continue
        try:
            shards[name] = known[name] if name in known else files.read_shard(shard)
        except CheckpointError as error:
            problems += error.diagnostics
    if problems:
        raise CheckpointError(problems)
    return shards


def _listed(weight_map: Mapping[str, str], shards: Mapping[str, Contents], path: str) -> dict[str, Entry]:
    """The entries that an index lists, in its order."""
    held = {name: contents.entries for name, contents in shards.items()}
    try:
        return {key: held[name][key] for key, name in weight_map.items()}
    except KeyError:
        absent: dict[str, list[str]] = {}
        for key, name in weight_map.items():
            if key not in held[name]:
                absent.setdefault(name, []).append(key)
        raise CheckpointError(
            Diagnostic(
                "missing-key-in-shard",
                f"the index says that {keys[0]!r} is in {name!r}, which does not hold it",
                path,
                notes=tuple(f"nor {key}" for key in shown_keys(keys[1:])),
                help="index and shards belong to different checkpoints; get them again together",
            )
            for name, keys in absent.items()
        ) from None


def _joined(entries: dict[str, Entry], about: Mapping[str, Any], shards: Collection[Contents]) -> Contents:
    """The entries that count, with what index and shards say of themselves."""
    joined, aliases = Contents(entries, frame=_common_frame(shards)), dict[str, str]()
    joined.join_facts(shards)
    for shard in shards:
        aliases |= {a: kept for a, kept in shard.aliases.items() if a in entries and kept in entries}
        joined.sources |= shard.sources
    listed = aliases_in(about, entries)
    aliases |= listed
    for alias, kept in aliases.items():
        entries.setdefault(alias, entries[kept])
    # Sizes are facts of these files, not of the tensors: a copy that is sharded otherwise must not repeat them.
    own = {k: v for k, v in own_metadata(about, listed).items() if not k.startswith("total_")}
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in own.items()}
    joined.metadata |= {name: value for name, value in told.items() if is_text(name) and is_text(value)}
    joined.aliases = aliases
    return joined


def _common_frame(shards: Collection[Contents]) -> Frame | None:
    frames = {shard.frame for shard in shards}
    return frames.pop() if len(frames) == 1 else None


def read_together(folder: str, names: Sequence[str], read: Callable[[str], Contents]) -> Contents:
    """The union of several files of one folder that no index joins.

    Raises:
        CheckpointError: two files hold the same key, or a numbered shard is missing.
    """
    # one of each series: every shard of a series names all of it
    there, series = set(names), {series_of(name): name for name in names}
    missing = {name for known in series.values() for name in shard_names(known)} - there
    missing -= {name for name in missing if name.replace("-00000-of-", "-") in there}
    if missing:
        raise CheckpointError(
            Diagnostic(
                "missing-shard",
                f"{len(missing)} of the numbered shards are not there",
                folder,
                notes=shown_keys(sorted(missing)),
                help="download or copy the missing files too",
            )
        )
    joined, owner = Contents({}), dict[str, str]()
    twice: dict[tuple[str, str], list[str]] = {}
    parts = [read(str(Path(folder, name))) for name in names]
    joined.frame = _common_frame(parts)
    for name, contents in zip(names, parts):
        for key in contents.entries:
            if key in owner:
                twice.setdefault((owner[key], name), []).append(key)
            owner[key] = name
        joined.entries |= contents.entries
        joined.aliases |= contents.aliases
        joined.sources |= contents.sources
    joined.join_facts(parts)
    if twice:
        raise CheckpointError(
            Diagnostic(
                "duplicate-key",
                f"{first!r} and {second!r} both hold {keys[0]!r}"
                + (f" and {len(keys) - 1} more keys" if len(keys) > 1 else ""),
                folder,
                notes=shown_keys(keys[1:]),
                remedies=(Remedy("by_file", True, 'puts "file stem/" before keys'),),
                advice="or name one of the files",
            )
            for (first, second), keys in twice.items()
        )
    return joined
