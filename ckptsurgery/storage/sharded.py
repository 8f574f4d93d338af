"""Several files that are one checkpoint: an index that names them, or a folder of files without one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..wording import counted
from .contents import Contents, Entry
from .files import os_error, read_regular
from .json_text import refuse_brackets
from .text import is_text, shown_keys
from .tie_records import TIES, aliases_in

__all__ = ["is_numbered", "read_index", "read_together", "shard_names", "weight_map_of"]

Reader = Callable[[str], Contents]

_TOLD = 200  # problems that an error lists


def read_index(path: str, read: Reader, places: Mapping[str, str] = {}) -> Contents:
    """The checkpoint that an index file describes; its `weight_map` is an allow-list, in its order.

    Aliases come from the index's metadata, where the hub and transformers put them, and from a shard's own metadata.

    Raises:
        CheckpointError: a shard or a key is missing, or the index points out of its folder; all problems at once.
    """
    weight_map, about = weight_map_of(path)
    folder = Path(path).parent
    problems: list[Diagnostic] = []
    shards: dict[str, Contents] = {}
    for name in dict.fromkeys(weight_map.values()):
        if len(problems) >= _TOLD:
            break
        shard = folder / name
        if not shard.exists() and str(shard) not in places:
            keys = [key for key, its in weight_map.items() if its == name]
            text = f"the index names the shard {name!r}, which is not there ({counted(len(keys), 'key')})"
            problems.append(
                Diagnostic(
                    "missing-shard", text, path, notes=shown_keys(keys), help="download or copy the missing file too"
                )
            )
            continue
        try:
            shards[name] = read(str(shard))
        except CheckpointError as error:
            problems += error.diagnostics
    if problems:
        raise CheckpointError(problems)
    aliases: dict[str, str] = {}
    held = {name: contents.entries for name, contents in shards.items()}
    try:
        entries = _listed(weight_map, held)
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
    for shard_contents in shards.values():
        aliases |= {a: kept for a, kept in shard_contents.aliases.items() if a in entries and kept in entries}
    aliases |= aliases_in(about, entries)
    for alias, kept in aliases.items():
        entries.setdefault(alias, entries[kept])
    metadata: dict[str, str] = {}
    for shard_contents in shards.values():
        metadata |= shard_contents.metadata
    # Sizes are facts of these files, not of the tensors: a copy that is sharded otherwise must not repeat them.
    spent = {*aliases, TIES}
    own = {name: value for name, value in about.items() if name not in spent and not name.startswith("total_")}
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in own.items()}
    metadata |= {name: value for name, value in told.items() if is_text(name) and is_text(value)}
    extras = {path: value for contents in shards.values() for path, value in contents.extras.items()}
    stamps = {path: stamp for contents in shards.values() for path, stamp in contents.stamps.items()}
    return Contents(entries, aliases, metadata, extras, stamps=stamps)


def _listed(weight_map: Mapping[str, str], held: Mapping[str, dict[str, Entry]]) -> dict[str, Entry]:
    """The entries that an index lists, in its order; a `KeyError` where a shard does not hold one."""
    joined: dict[str, Entry] = {}
    for entries in held.values():
        joined |= entries
    owners = chain.from_iterable(repeat(name, len(entries)) for name, entries in held.items())
    if list(joined) == list(weight_map) and list(owners) == list(weight_map.values()):
        return joined  # the shards one after the other, as writers have it, and no key needs to be looked up
    return {key: held[name][key] for key, name in weight_map.items()}


def weight_map_of(path: str) -> tuple[dict[str, str], dict[str, Any]]:
    """An index's `weight_map`, checked to stay in its folder, and its metadata.

    Raises:
        CheckpointError: no such file, no JSON, a key given twice, or a file name that leaves the folder.
    """
    repeated: list[str] = []
    try:
        index = _parsed(read_regular(path), repeated)
    except OSError as error:
        raise os_error(error, path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            Diagnostic("bad-index", f"the index is no JSON: {error}", path, help="download or write it again")
        ) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not set(map(type, weight_map.values())) <= {str}:
        raise CheckpointError(
            Diagnostic(
                "bad-index", "the index has no weight_map of keys to file names", path, help="is it an index at all?"
            )
        )
    if repeated:
        raise CheckpointError(
            Diagnostic(
                "duplicate-key",
                "the index names a key twice",
                path,
                notes=shown_keys(repeated),
                help="name each key once",
            )
        )
    outside = [name for name in dict.fromkeys(weight_map.values()) if _leaves_folder(name)]
    if outside:
        raise CheckpointError(
            Diagnostic(
                "unsafe-index",
                f"the index names a file outside its own folder: {outside[0]!r}",
                path,
                notes=shown_keys(outside[1:]),
                help="shards lie beside their index; do not trust this one",
            )
        )
    names = {name: name for name in weight_map.values()}
    one_each = dict(zip(weight_map, map(names.get, weight_map.values())))  # the parser makes a name for every key
    metadata = index.get("metadata")
    return one_each, metadata if isinstance(metadata, dict) else {}


def _leaves_folder(name: str) -> bool:
    # Judged by the name alone: the hub's cache is made of links that point elsewhere, and they are fine.
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return True
    parts = re.split(r"[/\\]", name)
    return (
        not name
        or "\0" in name
        or ".." in parts
        or parts[0] == ""
        or parts[-1] in ("", ".")
        or bool(re.match(r"[A-Za-z]:", name))
    )


_MOST = 100_000
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.[^.]+)")


def shard_names(name: str) -> list[str]:
    """The names of all shards that a numbered file belongs to, itself included; empty for any other name.

    >>> shard_names("model-00001-of-00002.safetensors")
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    match = _NUMBERED.fullmatch(name)
    if match is None or not 1 <= int(match["count"]) <= _MOST:
        return []
    width, count = len(match["number"]), int(match["count"])
    first = 0 if int(match["number"]) == 0 else 1
    return [f"{match['stem']}-{i:0{width}d}-of-{match['count']}{match['suffix']}" for i in range(first, count + first)]


def is_numbered(name: str) -> bool:
    """Whether `shard_names` of the name holds it; not made to find out, since each of 10,000 shards is asked."""
    match = _NUMBERED.fullmatch(name)
    return match is not None and int(match["number"]) <= int(match["count"]) and 1 <= int(match["count"]) <= _MOST


def _series(name: str) -> tuple[str, ...]:
    """Equal for names of which `shard_names` says the same."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return (name,)
    first = "0" if int(match["number"]) == 0 else "1"
    return match["stem"], match["suffix"], match["count"], str(len(match["number"])), first


def read_together(folder: str, names: Sequence[str], read: Reader) -> Contents:
    """The union of several files of one folder that no index joins.

    Raises:
        CheckpointError: two files hold the same key, or a numbered shard is missing.
    """
    # one of each series: every shard of a series names all of it
    there, series = set(names), {_series(name): name for name in names}
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
    for name in names:
        contents = read(str(Path(folder, name)))
        for key in contents.entries:
            if key in owner:
                twice.setdefault((owner[key], name), []).append(key)
            owner[key] = name
        joined.entries |= contents.entries
        joined.aliases |= contents.aliases
        joined.stamps |= contents.stamps
        joined.metadata |= contents.metadata
        joined.extras |= contents.extras
    if twice:
        raise CheckpointError(
            Diagnostic(
                "duplicate-key",
                f"{first!r} and {second!r} both hold {keys[0]!r}"
                + (f" and {len(keys) - 1} more keys" if len(keys) > 1 else ""),
                folder,
                notes=shown_keys(keys[1:]),
                help='name one of the files, or all: by_file=True (--by-file) puts "file stem/" before keys',
            )
            for (first, second), keys in twice.items()
        )
    return joined


_SPACED = re.compile(r'"\s+:')


def _parsed(raw: bytes, repeated: list[str]) -> Any:
    """JSON, and the keys that one object in it gives twice."""
    text = raw.decode(json.detect_encoding(raw))
    refuse_brackets(text)
    if "\\" not in text:
        # Where nothing is escaped, there are no fewer objects' keys than places that look like one: if all of them are
        # in the result, none was given twice, and the pairs need not lie in memory beside it.
        found = json.loads(text)
        if not _SPACED.search(text) and _members(found) == text.count('":'):
            return found

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return found

    return json.loads(text, object_pairs_hook=collect)


def _members(value: Any) -> int:
    """Keys of all objects in a JSON value."""
    if isinstance(value, dict):
        inner = value.values() if set(map(type, value.values())) - {str} else ()
        return len(value) + sum(map(_members, inner))
    return sum(map(_members, value)) if isinstance(value, list) else 0
