"""Which element of one tensor is which of another, where both hold the same values in another order.

Values that occur once show it directly. Where values repeat, as in a coarse dtype, slices along an axis are
distinguished by the multiset of their values, which no order changes. A finding is compared element by element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, dtype

    Array = np.ndarray[Any, Any]

__all__ = ["bits_of", "hashed", "places_between"]

_TELLING = 0.5  # of the values of a vector at least this share occurs once, or its order is not known


def bits_of(tensor: Tensor, kind: dtype) -> Array:
    """The values of a tensor after a cast as integers of 64 bits, in its shape; equal values are equal integers."""
    import torch

    tensor = tensor.detach().to(kind)
    if tensor.dtype.is_floating_point:
        result: Array = (tensor.to(torch.float64) + 0.0).contiguous().view(torch.int64).numpy()
        return result
    return tensor.to(torch.int64).contiguous().numpy()


def hashed(bits: Array) -> Array:
    """A pseudo-random number for each value; sums of them are hashes of multisets.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    import numpy as np

    mixed: Array = bits.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    result: Array = mixed ^ (mixed >> np.uint64(31))
    return result


def places_between(one: Array, two: Array) -> Array | None:
    """For each place of the second, flat, its place in the first; None where the values differ or tell too little.

    >>> import numpy as np
    >>> places_between(np.array([[1, 2], [3, 4]]), np.array([[1, 3], [2, 4]])).tolist()
    [0, 2, 1, 3]
    >>> places_between(np.array([[1, 1, 2], [1, 2, 2]]), np.array([[1, 2, 2], [1, 1, 2]])).tolist()
    [3, 4, 5, 0, 1, 2]
    """
    import numpy as np

    if one.size != two.size or one.size == 0:
        return None
    first, second = one.reshape(-1), two.reshape(-1)
    if np.array_equal(first, second):
        return np.arange(one.size)
    lone = _by_value(first, second)
    if lone is not None or one.ndim == two.ndim == 1:
        return lone
    one, two = np.squeeze(one), np.squeeze(two)
    found = _by_slices(one, two)
    if found is None and two.ndim > one.ndim:
        back = _by_slices(two, one)
        if back is not None:
            found = np.empty_like(back)
            found[back] = np.arange(len(back))
    return found


def _by_value(one: Array, two: Array) -> Array | None:
    """The map by the values themselves; most of them have to occur once, and equals go in their order."""
    import numpy as np

    first, second = np.argsort(one, kind="stable"), np.argsort(two, kind="stable")
    values = one[first]
    again = int((values[1:] == values[:-1]).sum())
    if not np.array_equal(values, two[second]) or again > (0 if one.size > 64 else (1 - _TELLING) * one.size / 2):
        return None
    result = np.empty(len(one), dtype=np.int64)
    result[second] = first
    return result


def _by_slices(one: Array, two: Array) -> Array | None:
    """The map by the slices along each axis of the second, which is one or several axes of the first."""
    import numpy as np

    mixed, wanted = hashed(one), hashed(two)
    numbers = np.arange(one.size).reshape(one.shape)
    for groups in _dealt(one.shape, two.shape):
        order = [axis for group in groups for axis in group]
        here = mixed.transpose(order).reshape(two.shape)
        maps = []
        for axis in range(two.ndim):
            others = tuple(n for n in range(two.ndim) if n != axis)
            first, second = here.sum(axis=others), wanted.sum(axis=others)
            ranks = np.argsort(first, kind="stable"), np.argsort(second, kind="stable")
            if not np.array_equal(first[ranks[0]], second[ranks[1]]):
                break
            way = np.empty(len(first), dtype=np.int64)
            way[ranks[1]] = ranks[0]
            maps.append(way)
        else:
            if np.array_equal(one.transpose(order).reshape(two.shape)[np.ix_(*maps)], two):
                return numbers.transpose(order).reshape(two.shape)[np.ix_(*maps)].reshape(-1)
    return None


def _dealt(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The ways to make each axis of the target of axes of the source, in their order."""
    for owners in product(range(len(target)), repeat=len(source)):
        groups = tuple(tuple(n for n, owner in enumerate(owners) if owner == axis) for axis in range(len(target)))
        if all(prod(source[n] for n in group) == size for group, size in zip(groups, target)):
            yield groups
