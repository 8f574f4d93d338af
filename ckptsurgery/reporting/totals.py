"""How many tensors, elements and bytes there are together."""

from __future__ import annotations

from collections.abc import Iterable

from ..specs import TensorSpec

__all__ = ["Total"]


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
