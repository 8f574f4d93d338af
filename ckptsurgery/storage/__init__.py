"""Checkpoints as they lie on disk, on the hub or in memory: names, shapes and places first, bytes when asked for.

A format is a function from a path to `Contents` (`safetensors_format`, `torch_zip`, `torch_legacy`, `memory`); `opening`
looks at a source's first bytes and picks one, `mounts` and `sharded` join several into one. `Checkpoint` is the one class
over the result and does all reading; `writing` is its mirror image: a writer that says where each tensor's bytes go and
makes the output appear whole or not at all. Nothing here knows of rules, and nothing imports torch until a tensor is made.
"""

from __future__ import annotations

from .checkpoint import Checkpoint, LazyTensor, MissingKeyError, Tie
from .opening import open_checkpoint

__all__ = ["Checkpoint", "LazyTensor", "MissingKeyError", "Tie", "open_checkpoint"]
