"""The common face of summaries of a model and of a checkpoint, and sums over tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from ..specs import TensorSpec

__all__ = ["Summary", "Total"]


class Summary(Protocol):
    """A model or a checkpoint at a glance: `str` is a table, `to_json()` plain data."""

    @property
    def params(self) -> int:
        """How many parameters a model has, or elements a checkpoint; what is tied counts once."""

    @property
    def nbytes(self) -> int:
        """How many bytes it takes; what is tied counts once."""

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain data."""


class Total:
    """A sum over tensors, or of such sums.

    >>> total = Total()
    >>> total.add(TensorSpec([4], "F32"), 3)
    >>> total.count, total.numel, total.nbytes
    (3, 12, 48)
    """

    def __init__(self, parts: Iterable[Total] = ()) -> None:
        self.count = self.numel = self.nbytes = 0
        for part in parts:
            self.count += part.count
            self.numel += part.numel
            self.nbytes += part.nbytes

    def add(self, spec: TensorSpec, count: int) -> None:
        """Count so many tensors of one shape and dtype; a negative number takes them off again."""
        self.count += count
        self.numel += spec.numel * count
        self.nbytes += spec.nbytes * count
