"""Ties that a file declares in its metadata: names of tensors that are stored once, under another name."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Mapping
from typing import Any

from .text import is_text

__all__ = ["TIES", "aliases_in", "declared"]

TIES = "ckptsurgery.ties"


def aliases_in(metadata: Mapping[str, Any], entries: Container[str]) -> dict[str, str]:
    """The metadata's pairs that say "this name is another name of that tensor".

    safetensors' `save_model` writes them among all else, and marks them by nothing. So a pair is taken for one where
    the value is a tensor and the name could be a parameter beside it; a plain word beside a path of modules is none.
    Where that would be wrong, whoever writes says so: under `TIES` stand the names that are meant, as a JSON list.

    >>> aliases_in({"format": "pt", "head.weight": "embed.weight", "model": "embed.weight"}, {"embed.weight": ...})
    {'head.weight': 'embed.weight'}
    >>> aliases_in({"model": "embed.weight", TIES: '["model"]'}, {"embed.weight": ...})
    {'model': 'embed.weight'}
    """
    meant = _meant(metadata)
    return {
        alias: kept
        for alias, kept in metadata.items()
        if (alias in meant if meant is not None else _could_be_tied(alias, kept))
        and isinstance(kept, str)
        and kept in entries
        and alias not in entries
        and alias != ""
        and is_text(alias)
    }


def declared(metadata: Mapping[str, str], aliases: Mapping[str, str], entries: Container[str]) -> dict[str, str]:
    """Metadata with aliases among it, from which `aliases_in` gets exactly these."""
    told = {**metadata, **aliases}
    return told if aliases_in(told, entries) == dict(aliases) else {**told, TIES: json.dumps([*aliases])}


def _meant(metadata: Mapping[str, Any]) -> list[str] | None:
    try:
        told = json.loads(metadata[TIES])
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return told if isinstance(told, list) and all(isinstance(name, str) for name in told) else None


def _could_be_tied(alias: str, kept: object) -> bool:
    # "format" has a meaning of its own, even where a tensor is called "pt"
    is_path = re.compile("[./]").search
    return alias != "format" and (bool(is_path(alias)) or (isinstance(kept, str) and not is_path(kept)))
