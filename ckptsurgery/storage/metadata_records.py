"""What a file's metadata records beside its owner's texts: ties, and the versions of modules.

Ties are names of tensors that are stored once, under another name. They share the metadata with whatever its owner
keeps there. A tie is written as the pair `{alias: kept}` that safetensors' `save_model` writes; where pairs alone
would be read otherwise, `TIES` lists the aliases among them; and where an alias is called like a key of the owner's,
the ties are in `TIES` alone, and every other key is the owner's.

Versions are those of a state_dict's `_metadata`. A module of version 2 turns tensors of version 1 into its own form
when loaded. A file that does not say its version is taken for an old one, and what is in the new form already would
be turned once more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..wording import is_text

__all__ = [
    "METADATA",
    "TIES",
    "VERSIONS",
    "aliases_in",
    "declared",
    "own_metadata",
    "recorded",
    "told_versions",
    "versions_in",
]

TIES = "ckptsurgery.ties"
VERSIONS = "ckptsurgery.versions"
METADATA = "_metadata"  # what torch calls it, and the extras with it


def aliases_in(metadata: Mapping[str, Any], entries: Container[str]) -> dict[str, str]:
    """The metadata's pairs that say "this name is another name of that tensor".

    safetensors' `save_model` writes them among all else, and marks them by nothing. So a pair is taken for one where
    the value is a tensor and the name could be a parameter beside it; a plain word beside a path of modules is none.
    Where that would be wrong, `TIES` has the names that are meant, as a JSON list, or the pairs, as a JSON object.

    >>> aliases_in({"format": "pt", "head.weight": "embed.weight", "model": "embed.weight"}, {"embed.weight": ...})
    {'head.weight': 'embed.weight'}
    >>> aliases_in({"model": "embed.weight", TIES: '["model"]'}, {"embed.weight": ...})
    {'model': 'embed.weight'}
    >>> aliases_in({"head.weight": "a note", TIES: '{"head.weight": "embed.weight"}'}, {"embed.weight": ...})
    {'head.weight': 'embed.weight'}
    """
    meant = _meant(metadata)
    pairs = meant if isinstance(meant, dict) else metadata
    return {
        alias: kept
        for alias, kept in pairs.items()
        if (alias in meant if meant is not None else _could_be_tied(alias, kept))
        and isinstance(kept, str)
        and kept in entries
        and alias not in entries
        and alias != ""
        and is_text(alias)
    }


def declared(metadata: Mapping[str, str], aliases: Mapping[str, str], entries: Container[str]) -> dict[str, str]:
    """Metadata with aliases among it, from which `aliases_in` gets exactly these, and `own_metadata` the metadata.

    >>> declared({"by": "me"}, {"head.weight": "embed.weight"}, {"embed.weight"})
    {'by': 'me', 'head.weight': 'embed.weight'}
    >>> declared({"head.weight": "a note"}, {"head.weight": "embed.weight"}, {"embed.weight"})[TIES]
    '{"head.weight": "embed.weight"}'

    Raises:
        CheckpointError: the metadata has a key `TIES` of its own, and a record is needed.
    """
    told = {**metadata, **aliases}
    if metadata.keys().isdisjoint(aliases) and aliases_in(told, entries) == dict(aliases):
        return told
    if TIES in metadata or TIES in aliases:
        text = f"the metadata has a key {TIES!r}, which is needed to record {len(aliases)} tied names"
        raise CheckpointError(
            Diagnostic(
                "reserved-metadata",
                text,
                notes=tuple(f"{alias} -> {kept}" for alias, kept in aliases.items())[:8],
                help="give that key another name: names that begin with 'ckptsurgery.' are this library's",
            )
        )
    if metadata.keys().isdisjoint(aliases):
        return {**told, TIES: json.dumps([*aliases])}
    return {**metadata, TIES: json.dumps(dict(aliases), ensure_ascii=False)}


def own_metadata(metadata: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata without the ties.

    >>> own_metadata({"head.weight": "embed.weight", "by": "me"}, {"head.weight": "embed.weight"})
    {'by': 'me'}

    Args:
        aliases: what `aliases_in` found in it.
    """
    spent = {TIES} if isinstance(_meant(metadata), dict) else {TIES, *aliases}
    return {name: value for name, value in metadata.items() if name not in spent}


def _meant(metadata: Mapping[str, Any]) -> list[str] | dict[str, str] | None:
    try:
        told = json.loads(metadata[TIES])
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    texts = [*told, *told.values()] if isinstance(told, dict) else told
    return told if isinstance(texts, list) and all(isinstance(name, str) for name in texts) else None


def _could_be_tied(alias: str, kept: object) -> bool:
    # "format" has a meaning of its own, even where a tensor is called "pt"
    is_path = re.compile("[./]").search
    return alias != "format" and (bool(is_path(alias)) or (isinstance(kept, str) and not is_path(kept)))


def recorded(metadata: object) -> dict[str, str]:
    """The metadata that tells the versions of a state_dict; nothing where all are 1, as most are, or none is told.

    >>> recorded({"": {"version": 1}, "norm": {"version": 2}})
    {'ckptsurgery.versions': '{"norm":2}'}
    """
    if not isinstance(metadata, Mapping):
        return {}
    told = {path: one.get("version") for path, one in metadata.items() if isinstance(one, Mapping)}
    found = {path: v for path, v in told.items() if type(path) is str and type(v) is int and v != 1}
    return {VERSIONS: json.dumps(found, separators=(",", ":"), ensure_ascii=False)} if found else {}


def versions_in(metadata: Mapping[str, str], keys: Iterable[str]) -> dict[str, dict[str, int]] | None:
    """A state_dict's `_metadata`, from what `recorded` wrote: every module above a key is of version 1 unless told.

    >>> versions_in({VERSIONS: '{"norm":2}'}, ["norm.weight", "fc.weight"])
    {'': {'version': 1}, 'norm': {'version': 2}, 'fc': {'version': 1}}
    """
    try:
        told = json.loads(metadata[VERSIONS])
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    if not isinstance(told, dict) or not all(type(v) is int for v in told.values()):
        return None
    found: dict[str, dict[str, int]] = {"": {"version": 1}}
    for key in keys:
        path = key.rpartition(".")[0]
        while path and path not in found:
            found[path] = {"version": 1}
            path = path.rpartition(".")[0]
    return found | {path: {"version": version} for path, version in told.items()}


def told_versions(extras: Mapping[str, Any], metadata: Mapping[str, str], keys: Iterable[str]) -> Mapping[Any, Any]:
    """The `_metadata` of a checkpoint, by the paths of its modules; empty where nothing is told."""
    found = extras.get(METADATA)
    if isinstance(found, Mapping):
        return found
    return versions_in(metadata, keys) or {} if VERSIONS in metadata else {}
