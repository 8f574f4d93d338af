"""One tensor that is another one's blocks in another order, or in other groups: cut, moved, and joined again.

Swapped halves are the plainest case. A fused query, key and value that lie block after block on one side and group by
group on the other are another, where each block may be rearranged besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod
from typing import TYPE_CHECKING, Any

from ..specs import TensorSpec
from .chunks import MOST_CHUNKS, ChunkedMatch
from .findings import Finding
from .moves import TensorMove
from .wholes import axes_between

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["regrouped"]

_GROUPS = 128  # more groups are not tried, unless every slice is one
_RATIO = 16  # times that the large block is as large as a small one, at most
_FEW = 64  # slices that are looked at before all are


def regrouped(source: tuple[str, TensorSpec], target: tuple[str, TensorSpec], places: Array) -> Finding | None:
    """The blocks of two tensors that hold the same values; None where no blocks move as wholes.

    Args:
        places: for each place of the target, flat, its place in the source.
    """
    for one, two in (*_swapped(source, target, places), *_cuts(source, target, places)):
        found = _moved(one, two, places)
        if found is not None:
            return found
    return None


def _moved(one: ChunkedMatch, two: ChunkedMatch, places: Array) -> Finding | None:
    """The moves between the blocks, if each block of the target is one of the source with its axes rearranged."""
    import numpy as np

    shapes = [tuple(c.spec.shape) for c in (one, two)]
    numbers = np.arange(len(places)).reshape(shapes[0])
    moves = []
    blocks = [np.take(numbers, at, axis=one.axis) for at in one.places]
    owners = np.empty(len(places), dtype=np.int64)
    own = np.empty(len(places), dtype=np.int64)
    for n, block in enumerate(blocks):
        owners[block.reshape(-1)], own[block.reshape(-1)] = n, np.arange(block.size)
    for piece, at in zip(two.pieces, two.places):
        block = np.take(places.reshape(shapes[1]), at, axis=two.axis)
        whose = np.unique(owners[block.reshape(-1)])
        if len(whose) != 1:
            return None
        axes = axes_between(own[block.reshape(-1)], blocks[whose[0]].shape, block.shape)
        if axes is None:
            return None
        moves.append(TensorMove((one.pieces[whose[0]],), (piece,), axes[0], axes[1], dims=tuple(axes[2].items())))
    return Finding(tuple(moves), (one,), (two,)) if len({m.sources for m in moves}) == len(one.pieces) else None


def _slices(source: TensorSpec, target: TensorSpec, places: Array) -> Iterator[tuple[int, int, Array]]:
    """An axis of each side and, for each slice of the target, the slice of the source that it is made of."""
    listed = places.reshape(tuple(target.shape))
    for axis, to in product(range(len(source.shape)), range(len(target.shape))):
        size, stride = source.shape[axis], prod(source.shape[axis + 1 :])
        if size == target.shape[to] > 1:
            at = ((listed // stride) % size).swapaxes(0, to).reshape(size, -1)
            if (at == at[:, :1]).all():
                yield axis, to, at[:, 0]


def _cuts(
    source: tuple[str, TensorSpec], target: tuple[str, TensorSpec], places: Array
) -> Iterator[tuple[ChunkedMatch, ChunkedMatch]]:
    """Blocks in groups on either side: of equal sizes, or a large one and two small ones, as queries beside keys."""
    import numpy as np

    for axis, to, rows in _slices(source[1], target[1], places):
        size = len(rows)
        few = np.arange(0, size, max(1, size // _FEW))
        for sizes in _shares(size):
            least = min(sizes)
            groups = [
                g for g in (*range(1, min(_GROUPS, least) + 1), *((least,) * (least > _GROUPS))) if least % g == 0
            ]
            labels = {g: _labels(sizes, g) for g in groups}
            for here, there in sorted(product(groups, groups), key=sum):
                if len({*zip(labels[there][few].tolist(), labels[here][rows[few]].tolist())}) > len(sizes):
                    continue
                pairs = {*zip(labels[there].tolist(), labels[here][rows].tolist())}
                if len(pairs) == len(sizes) == len({b for _, b in pairs}):
                    order = dict(pairs)
                    ends = tuple(sizes), tuple(sizes[order[n]] for n in range(len(sizes)))
                    if sorted(ends[0]) == sorted(ends[1]):
                        yield ChunkedMatch(*source, ends[0], axis, here), ChunkedMatch(*target, ends[1], to, there)


def _shares(size: int) -> Iterator[tuple[int, ...]]:
    """The sizes of blocks that together are a size."""
    yield from ((size // n,) * n for n in (2, 3) if size % n == 0)
    for ratio in range(2, _RATIO + 1):
        small, rest = divmod(size, ratio + 2)
        if not rest:
            yield ratio * small, small, small


def _labels(sizes: Sequence[int], groups: int) -> Array:
    """For each slice, the number of its block."""
    import numpy as np

    return np.tile(np.repeat(np.arange(len(sizes)), [n // groups for n in sizes]), groups)


def _swapped(
    source: tuple[str, TensorSpec], target: tuple[str, TensorSpec], places: Array
) -> Iterator[tuple[ChunkedMatch, ChunkedMatch]]:
    """Runs of slices in another order, of any sizes."""
    import numpy as np

    for axis, to, rows in _slices(source[1], target[1], places):
        bounds = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
        runs = [(int(rows[a]), b - a) for a, b in pairwise(bounds)]
        if 1 < len(runs) <= MOST_CHUNKS:
            sizes = tuple(n for _, n in sorted(runs)), tuple(n for _, n in runs)
            yield ChunkedMatch(*source, sizes[0], axis), ChunkedMatch(*target, sizes[1], to)
