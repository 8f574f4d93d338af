"""The versions of modules, as a state_dict's `_metadata` has them, in the metadata of a format that holds strings.

A module of version 2 turns tensors of version 1 into its own form when it is loaded. A file that does not say its
version is taken for an old one, and what is in the new form already would be turned once more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["METADATA", "VERSIONS", "recorded", "told_versions", "versions_in"]

VERSIONS = "ckptsurgery.versions"
METADATA = "_metadata"  # what torch calls it, and the extras with it


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
