"""Several checkpoints as one: each under a prefix of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import CheckpointError, Diagnostic
from ..checkpoint import Checkpoint
from ..contents import Contents
from ..metadata_records import METADATA, VERSIONS, told_versions

__all__ = ["is_mounts", "join_mounts", "read_mounts"]


def is_mounts(source: Mapping[Any, Any]) -> bool:
    """Whether a mapping says `{prefix: source}`, and is no state_dict.

    >>> is_mounts({"vision.": "a.safetensors", "llm.": "b/"}), is_mounts({"model": {}, "arch": "small"}), is_mounts({})
    (True, False, False)
    """
    from ..memory import is_module

    values = list(source.values())
    if not values or not all(isinstance(prefix, str) for prefix in source):
        return False
    plain = [isinstance(v, (str, os.PathLike, Checkpoint)) or is_module(v) for v in values]
    if all(plain):
        return True
    separated = all(prefix == "" or prefix.endswith((".", "/")) for prefix in source)
    return separated and all(ok or isinstance(v, Mapping) for ok, v in zip(plain, values))


def read_mounts(source: Mapping[str, Any], open_one: Callable[[Any], Checkpoint]) -> Contents:
    """Opens each source and joins them; several sources may fail at once."""
    parts: dict[str, Contents] = {}
    problems: list[Diagnostic] = []
    for prefix, one in source.items():
        try:
            opened = open_one(one)
        except CheckpointError as error:
            problems += error.diagnostics
            continue
        parts[prefix] = opened.contents
        if opened is not one:
            opened.close()
    if problems:
        raise CheckpointError(problems)
    return join_mounts(parts, "mounts")


def join_mounts(parts: Mapping[str, Contents], place: str) -> Contents:
    """One checkpoint of several, with prefixes before keys, aliases, metadata and extras.

    Configurations that are equal, or the only one, stay as they are; different ones are nested by prefix, so that
    `config.vision.hidden_size` reaches the one under `"vision."`.

    Raises:
        CheckpointError: two prefixes lead to the same key; a tensor has no name.
    """
    joined = Contents({}, frame=None)
    clashes: list[str] = []
    versions: dict[str, Any] = {}
    for prefix, part in parts.items():
        part.require_names(prefix)
        for key, entry in part.entries.items():
            if prefix + key in joined.entries:
                clashes.append(prefix + key)
            joined.entries[prefix + key] = entry
        joined.aliases |= {prefix + alias: prefix + kept for alias, kept in part.aliases.items()}
        joined.sources |= part.sources
        joined.disputed += tuple(prefix + name for name in part.disputed)
        joined.metadata |= {prefix + name: value for name, value in part.metadata.items() if name != VERSIONS}
        joined.extras |= {prefix + path: value for path, value in part.extras.items() if path != METADATA}
        versions |= {
            (prefix + path).rstrip("./"): told
            for path, told in told_versions(part.extras, part.metadata, part.entries).items()
        }
    if clashes:
        text = f"two mounts hold {clashes[0]!r}" + (f" and {len(clashes) - 1} more keys" if len(clashes) > 1 else "")
        raise CheckpointError(Diagnostic("duplicate-key", text, place, help="give each source a prefix of its own"))
    if versions:
        joined.extras[METADATA] = versions
    joined.config = _joined_config(parts)
    return joined


def _joined_config(parts: Mapping[str, Contents]) -> Mapping[str, Any] | None:
    known = {prefix: part.config for prefix, part in parts.items() if part.config is not None}
    configs = list(known.values())
    if not configs or all(config == configs[0] for config in configs):
        return configs[0] if configs else None
    nested: dict[str, Any] = {}
    for prefix, config in known.items():
        inner = nested
        for segment in filter(None, prefix.replace("/", ".").split(".")):
            inner = inner.setdefault(segment, {})
        inner |= dict(config)
    return nested
