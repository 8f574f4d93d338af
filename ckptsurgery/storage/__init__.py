"""Checkpoints as they lie on disk, on the hub or in memory: names, shapes and places first, bytes when asked for.

A format is a function from a path to `Contents` (`safetensors_format`, `torch_zip`, `torch_legacy`, `memory`);
`opening` picks one by a source's first bytes, `mounts` and `sharded` join several into one. `Checkpoint` is the one
class over the result and does all reading. `writing` mirrors it: a writer says where each tensor's bytes go, and its
output appears whole or not at all; who only reads does not import it. Nothing here knows of rules, and nothing imports
torch until a tensor is made.
"""

from __future__ import annotations

from .checkpoint import Checkpoint, LazyTensor, MissingKeyError
from .places.opening import open_checkpoint

__all__ = ["Checkpoint", "LazyTensor", "MissingKeyError", "open_checkpoint"]
