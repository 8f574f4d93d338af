"""Shards by their names: `model-00001-of-00003.safetensors` says that it has two sisters, and what they are called."""

from __future__ import annotations

import re

__all__ = ["series_of", "shard_names"]

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


def series_of(name: str) -> tuple[str, ...]:
    """Equal for names of which `shard_names` says the same."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return (name,)
    first = "0" if int(match["number"]) == 0 else "1"
    return match["stem"], match["suffix"], match["count"], str(len(match["number"])), first
