"""Facts about a checkpoint's tensors beside their specs, for ops whose results depend on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from ..ops.base import SourceNote
from ..planning.rule_ops import Notes
from ..storage.checkpoint import Checkpoint

__all__ = ["notes_of", "packings"]

_SMALL = 1 << 16
"""Bytes of a tensor that planning may read: what describes a weight is some 100 of them."""


def notes_of(checkpoint: Checkpoint) -> Notes:
    """Return the notes on a checkpoint's tensors, each read when it is asked for."""
    packed = packings(checkpoint.extras)
    specs = checkpoint.specs

    def note(key: str) -> SourceNote:
        if key not in specs or specs[key].nbytes > _SMALL:
            return SourceNote(packing=packed.get(key))
        try:
            content = bytes(checkpoint.read(key))
        except CheckpointError:  # headers alone, or a tensor without data
            content = None
        return SourceNote(content, packed.get(key))

    return note


def packings(extras: Mapping[str, Any]) -> Mapping[str, str]:
    """Return key -> the type of the blocks that a tensor's bytes form, where the format has such types (GGUF)."""
    about = extras.get("gguf")
    return about.get("tensor_types", {}) if isinstance(about, Mapping) else {}
