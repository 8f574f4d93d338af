"""Tensors cut into blocks before anything else is done, or joined of blocks last, where each block goes its own way.

A fused query, key and value of which two are reordered for rotary embeddings is one case; a gate and an up projection
in the other order is another. The blocks are keys that exist between two stages of the recipe only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..specs import TensorSpec
from .moves import TensorMove

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["MOST_CHUNKS", "ChunkedMatch"]

_LETTERS = "abcdefgh"
MOST_CHUNKS = len(_LETTERS)  # blocks of one tensor


@dataclass(frozen=True)
class ChunkedMatch:
    """A tensor in blocks along one axis; in several groups, each group has a part of each block.

    Args:
        key: the tensor.
        spec: its header.
        rows: the size of each block along the axis, all groups together.
        axis: where it is cut.
        groups: how many groups there are.
    """

    key: str
    spec: TensorSpec
    rows: tuple[int, ...]
    axis: int = 0
    groups: int = 1

    @property
    def pieces(self) -> tuple[str, ...]:
        """The keys of the blocks."""
        return tuple(f"{self.key}.{letter}" for letter in _LETTERS[: len(self.rows)])

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The headers of the blocks."""
        before, behind = self.spec.shape[: self.axis], self.spec.shape[self.axis + 1 :]
        return {k: TensorSpec((*before, n, *behind), self.spec.dtype) for k, n in zip(self.pieces, self.rows)}

    @property
    def places(self) -> list[Array]:
        """For each block, its places along the axis."""
        import numpy as np

        widths = [n // self.groups for n in self.rows]
        whole = np.arange(sum(self.rows)).reshape(self.groups, -1)
        ends = np.cumsum(widths)
        return [part.reshape(-1) for part in np.split(whole, ends[:-1], axis=1)]

    def move(self, forward: bool) -> TensorMove:
        """The move that cuts the tensor, or that joins the blocks."""
        equal, groups = len(set(self.rows)) == 1, "g " if self.groups > 1 else ""
        own = "x" if equal else "rows:p"
        names = list(_LETTERS.replace("g", "")[: len(self.spec.shape)])
        one, two = (
            "[" + " ".join([*names[: self.axis], text, *names[self.axis + 1 :]]) + "]"
            for text in (f"({groups}p {own})", f"({groups}{own})" if groups else own)
        )
        sizes = () if equal else tuple(n // self.groups for n in self.rows)
        dims = (("g", self.groups),) if groups else ()
        if forward:
            return TensorMove((self.key,), self.pieces, one, two, "concat", sizes, dims=dims)
        return TensorMove(self.pieces, (self.key,), two, one, "concat", sizes, dims=dims)

    @classmethod
    def labelled(cls, key: str, spec: TensorSpec, axis: int, labels: Sequence[int]) -> ChunkedMatch | None:
        """The blocks of slices that are labelled alike; None where they do not repeat in groups of one run each.

        >>> found = ChunkedMatch.labelled("w", TensorSpec((6,), "F32"), 0, [0, 0, 1, 0, 0, 1])
        >>> found.rows, found.groups
        ((4, 2), 2)
        """
        import numpy as np

        listed = np.asarray(labels)
        cuts = np.flatnonzero(np.diff(listed)) + 1
        bounds = [0, *cuts.tolist(), len(listed)]
        order = [int(listed[b]) for b in bounds[:-1]]
        kinds = list(dict.fromkeys(order))
        groups, rest = divmod(len(order), len(kinds))
        widths = [b - a for a, b in pairwise(bounds)]
        same = order == kinds * groups and widths == widths[: len(kinds)] * groups
        if rest or not same or not 1 < len(kinds) <= MOST_CHUNKS:
            return None
        return cls(key, spec, tuple(w * groups for w in widths[: len(kinds)]), axis, groups)
