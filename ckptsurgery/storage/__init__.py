"""Checkpoints as they lie on disk, on the hub or in memory: names, shapes and places first, bytes when asked for.

A format is one object of a table (`formats`), open to packages: it recognises its files and returns `Contents`, which
says where each tensor is stored in which byte source (`sources`). `places` decides what a path, an address or a folder
means. `Checkpoint` is the one class over the result and does all reading. `output` mirrors it: a writer says where each
tensor's bytes go, and its output appears whole or not at all. Nothing here knows of rules, and nothing imports torch
until a tensor is made.
"""

from __future__ import annotations

from ..errors import CheckpointError, Diagnostic
from .checkpoint import Checkpoint, LazyTensor, MissingKeyError
from .contents import Contents, Entry
from .formats.format import Announced, Format
from .places.opening import open as open_checkpoint

__all__ = [
    "Announced",
    "Checkpoint",
    "CheckpointError",
    "Contents",
    "Diagnostic",
    "Entry",
    "Format",
    "LazyTensor",
    "MissingKeyError",
    "open_checkpoint",
]
