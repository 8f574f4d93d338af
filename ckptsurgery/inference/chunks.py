"""Tensors cut into blocks of rows before anything else is done, where each block goes its own way.

A fused query, key and value of which two are reordered for rotary embeddings is one case; a gate and an up projection
in the other order is another. The blocks are keys that exist between two stages of the recipe only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..specs import TensorSpec
from .moves import TensorMove

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["ChunkedMatch", "chunks_of", "runs_of"]

_MOST = 8  # blocks of one tensor


@dataclass(frozen=True)
class ChunkedMatch:
    """A tensor in blocks of rows.

    Args:
        key: the tensor.
        spec: its header.
        rows: the rows of each block.
    """

    key: str
    spec: TensorSpec
    rows: tuple[int, ...]

    @property
    def pieces(self) -> tuple[str, ...]:
        """The keys of the blocks."""
        return tuple(f"{self.key}.{letter}" for letter in "abcdefgh"[: len(self.rows)])

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The headers of the blocks."""
        tail = self.spec.shape[1:]
        return {k: TensorSpec((n, *tail), self.spec.dtype) for k, n in zip(self.pieces, self.rows)}

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """The first row of each block and the row behind it."""
        ends = [sum(self.rows[: n + 1]) for n in range(len(self.rows))]
        return list(zip([0, *ends], ends))

    def move(self, forward: bool) -> TensorMove:
        """The move that cuts the tensor, or that joins the blocks."""
        tail = "".join(f" {c}" for c in "abcdefgh"[: len(self.spec.shape) - 1])
        equal = len(set(self.rows)) == 1
        one, two = (f"[(p {'x' if equal else 'rows:p'}){tail}]", f"[{'x' if equal else 'rows:p'}{tail}]")
        sizes = () if equal else self.rows
        if forward:
            return TensorMove((self.key,), self.pieces, one, two, "concat", sizes)
        return TensorMove(self.pieces, (self.key,), two, one, "concat", sizes)


def chunks_of(
    key: str, spec: TensorSpec, whole: Array, members: Mapping[str, Array]
) -> tuple[ChunkedMatch, list[str]] | None:
    """The blocks of a tensor, and the member that has the values of each; None where they are not blocks of rows."""
    import numpy as np

    if len(spec.shape) < 1 or not 1 < len(members) <= _MOST:
        return None
    width = max(1, len(whole) // max(1, spec.shape[0]))
    order = np.argsort(whole, kind="stable")
    found: list[tuple[int, int, str]] = []
    for name, values in members.items():
        at = np.searchsorted(whole[order], values)
        if (at >= len(whole)).any() or not np.array_equal(whole[order][at], values):
            return None
        places = order[at]
        low, high = int(places.min()), int(places.max()) + 1
        if high - low != len(values) or low % width or high % width or len(np.unique(places)) != len(values):
            return None
        found.append((low, high, name))
    found.sort()
    if [low for low, _, _ in found] != [0, *(high for _, high, _ in found[:-1])] or found[-1][1] != len(whole):
        return None
    return ChunkedMatch(key, spec, tuple((high - low) // width for low, high, _ in found)), [name for *_, name in found]


def runs_of(spec: TensorSpec, places: Array) -> list[tuple[int, int]] | None:
    """The blocks of rows, first and behind the last, that lie in another order in a target of the same values."""
    import numpy as np

    if len(spec.shape) < 1 or len(places) == 0:
        return None
    width = max(1, len(places) // max(1, spec.shape[0]))
    cuts = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
    if not 2 < len(cuts) <= _MOST + 1 or any(c % width for c in cuts):
        return None
    starts = [int(places[c]) for c in cuts[:-1]]
    if any(s % width for s in starts):
        return None
    return [(s // width, (s + b - a) // width) for s, a, b in zip(starts, cuts, cuts[1:])]
