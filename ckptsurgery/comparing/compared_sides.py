"""What is compared: specs, ties, and bytes by range; of a checkpoint here, of what a plan makes of one in `made`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint

__all__ = ["ComparedSide", "Stored"]

Groups = tuple[tuple[str, ...], ...]


class ComparedSide(Protocol):
    """One of two things that are compared."""

    name: str
    specs: Mapping[str, TensorSpec]
    ties: Groups

    def read(self, key: str, start: int, stop: int) -> bytes | bytearray | memoryview:
        """Bytes `[start, stop)` of a tensor, dense and in C order."""


class Stored:
    """A checkpoint as it is.

    Raises:
        CheckpointError: some of its tensors cannot be read, and so not be compared.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        checkpoint.refuse_unreadable()
        self.name = checkpoint.source
        self.specs: Mapping[str, TensorSpec] = checkpoint.specs
        self.ties: Groups = tuple(tie.names for tie in checkpoint.ties)
        self._checkpoint = checkpoint

    def read(self, key: str, start: int, stop: int) -> bytes | bytearray | memoryview:
        """Straight from the file."""
        return self._checkpoint.read(key, start, stop)
