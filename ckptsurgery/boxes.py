"""Boxes: parts of tensors, as a chunked checkpoint stores them and a rank of a sharded model owns them."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Box", "covers_once"]

_PRIME = (1 << 61) - 1

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: every element whose index lies in `[low, low + extent)` along each dimension.

    >>> Box((0, 2), (3, 2)).meets(Box((2, 3), (1, 4)))
    Box(low=(2, 3), extent=(1, 1))

    Args:
        low: the first index along each dimension.
        extent: how many there are.
    """

    low: Shape
    extent: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box that is all of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.extent)

    @property
    def high(self) -> Shape:
        """The first index behind the box along each dimension."""
        return tuple(low + n for low, n in zip(self.low, self.extent))

    def meets(self, other: Box) -> Box | None:
        """Return the elements that two boxes have in common, None where there are none."""
        low = tuple(map(max, self.low, other.low))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.low, self.extent, other.low, other.extent))
        extent = tuple(end - start for start, end in zip(low, ends))
        return Box(low, extent) if all(n > 0 for n in extent) else None


def covers_once(shape: Shape, boxes: Sequence[Box]) -> bool:
    """Whether every element of a tensor lies in exactly one of the boxes.

    >>> halves = [Box((0, 0), (2, 3)), Box((2, 0), (2, 3))]
    >>> covers_once((4, 3), halves), covers_once((4, 3), [halves[0], halves[0]])
    (True, False)

    Each index along each dimension gets a random weight, an element the product of its weights, and a box the sum of
    its elements: the boxes weigh as much as the tensor. That takes time linear in the number of boxes, however they are
    arranged, where comparing them in pairs does not. A set that does not cover once has the same weight with a
    probability of at most `len(shape) / 2**61`, by the lemma of Schwartz and Zippel.
    """
    if any(len(box.low) != len(shape) or len(box.extent) != len(shape) for box in boxes):
        return False
    if any(low < 0 or n < 0 or low + n > size for box in boxes for low, n, size in zip(box.low, box.extent, shape)):
        return False
    chance = random.Random()  # seeded by the system, so that no file can be made to deceive it
    # sums of the weights below an index, which are random themselves
    below = [defaultdict[int, int](lambda: chance.randrange(_PRIME)) for _ in shape]
    return sum(_weight(box, below) for box in boxes) % _PRIME == _weight(Box.whole(shape), below)


def _weight(box: Box, below: Sequence[defaultdict[int, int]]) -> int:
    product = 1
    for low, n, sums in zip(box.low, box.extent, below):
        product = product * (sums[low + n] - sums[low]) % _PRIME
    return product
