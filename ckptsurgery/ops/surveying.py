"""Merges that need facts of whole tensors, found block by block before the elements are blended block by block.

A block's facts add up to those of the tensor: inner products, or counts of magnitudes. So no tensor is held whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

from ..specs import DTYPES
from .base import BlockFacts, Op, OpError, Specs, Tensors
from .blending import Blending, widened
from .keyed import At

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Rows = np.ndarray[Any, np.dtype[np.floating[Any]]]

__all__ = ["Products", "Settled", "Surveying", "added", "begins", "products", "tally"]

DIGIT = 16
"""Bits of a magnitude that one pass counts by."""

_STRETCH = 1 << 15  # elements: a product of so many is one term of the sum, however tensors are cut into blocks
_RUN = 1 << 6
"""Elements whose products are added in float32, in less than half of the time; a stretch is then some 1e-9 off."""
_SMALLEST = 1e-24  # of a sum of squares; below it, float32 may have no digits for their terms

Products = tuple[tuple[tuple[float, ...], ...], ...]
"""For each stretch of the tensors the inner product of each with each."""


@dataclass(frozen=True)
class Surveying(Blending):
    """Base of merges that read whole tensors before they blend; a subclass gives `facts`, `finding` and `mixed`."""

    elementwise = True

    def surveys(self, specs: Specs) -> int:
        """Passes over the tensors; none where they are integers, or where the arguments settle everything."""
        if any(DTYPES[spec.dtype].kind != "float" for spec in specs):
            return 0
        return self.passes(max(DTYPES[spec.dtype].itemsize for spec in specs))

    def passes(self, itemsize: int) -> int:
        """Passes over tensors whose widest element has so many bytes."""
        return 1

    def survey(self, tensors: Tensors) -> BlockFacts:
        return self.facts(widened(tensors), ())

    def after(self, facts: BlockFacts) -> Op:
        return Settled(self, (self.finding(facts, ()),))

    def facts(self, tensors: Tensors, known: Sequence[Any]) -> BlockFacts:
        """BlockFacts of blocks of float tensors of one dtype; `known` holds the findings of the passes before."""
        raise OpError(f"{self.name} does not say what it surveys")

    def finding(self, facts: Any, known: Sequence[Any]) -> Any:
        """What follows from the facts of whole tensors."""
        return facts

    def mixed(self, tensors: Tensors, at: At, known: Sequence[Any]) -> Tensor:
        """The result, of blocks of float tensors of one dtype, by the findings of all passes."""
        raise OpError(f"{self.name} does not say how it blends")

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        known: tuple[Any, ...] = ()
        for _ in range(self.passes(max(4, tensors[0].element_size()))):
            known = (*known, self.finding(self.facts(tensors, known), known))
        return self.mixed(tensors, at, known)


@dataclass(frozen=True)
class Settled(Blending):
    """A merge with the findings of its first passes; after the last one it is elementwise."""

    elementwise = True
    op: Surveying
    known: tuple[Any, ...]

    @property
    def policy(self) -> str:
        return self.op.policy

    def infer(self, specs: Specs) -> Specs:
        return self.op.infer(specs)

    def surveys(self, specs: Specs) -> int:
        return self.op.surveys(specs) - len(self.known)

    def survey(self, tensors: Tensors) -> BlockFacts:
        return self.op.facts(widened(tensors), self.known)

    def after(self, facts: BlockFacts) -> Op:
        return Settled(self.op, (*self.known, self.op.finding(facts, self.known)))

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        return self.op.mixed(tensors, at, self.known)

    def __str__(self) -> str:
        return str(self.op)


def products(tensors: Sequence[Tensor]) -> Products:
    """Return the inner products of blocks of tensors as flat vectors: runs of 64 of float32 in it, all else in float64.

    numpy takes a block by one call, in one thread and so in one order, whatever number of threads torch has.
    """
    import numpy as np

    rows = [tensor.detach().cpu().reshape(-1).numpy() for tensor in tensors]
    whole = len(rows[0]) // _STRETCH * _STRETCH
    found: list[tuple[tuple[float, ...], ...]] = []
    for part, width in ((slice(whole), _STRETCH), (slice(whole, None), len(rows[0]) - whole)):
        stretches = [row[part].reshape(-1, width or 1) for row in rows]
        inner = np.empty((len(stretches[0]), len(rows), len(rows)))
        for a, b in combinations_with_replacement(range(len(rows)), 2):
            inner[:, a, b] = inner[:, b, a] = _inner(stretches[a], stretches[b])
        squares = np.diagonal(inner, axis1=1, axis2=2)
        for n in np.flatnonzero(~((squares >= _SMALLEST) & (squares < np.inf)).all(1)).tolist():
            wide = np.stack([stretch[n] for stretch in stretches]).astype(np.float64)
            inner[n] = np.einsum("aj,bj->ab", wide, wide)
        found.extend(tuple(map(tuple, matrix)) for matrix in inner.tolist())
    return tuple(found)


def _inner(one: Rows, other: Rows) -> Rows:
    """Return the inner product of each row of one with that of the other."""
    import numpy as np

    inner: Rows
    if one.dtype == np.float64 or one.shape[1] != _STRETCH:
        inner = np.einsum("ij,ij->i", one, other, dtype=np.float64)
        return inner
    runs = (len(one), _STRETCH // _RUN, _RUN)
    with np.errstate(all="ignore"):  # what does not fit into float32 is taken again
        inner = np.einsum("ijk,ijk->ij", one.reshape(runs), other.reshape(runs)).sum(1, dtype=np.float64)
    return inner


def added(found: Products, count: int) -> list[list[float]]:
    """Return the inner products of whole tensors: sums that are exact but for one rounding, in any order.

    >>> added((((1.0, 2.0), (2.0, 5.0)), ((1.0, 0.5), (0.5, 1.0))), 2)
    [[2.0, 2.5], [2.5, 6.0]]

    Args:
        found: products of blocks.
        count: of tensors.
    """
    return [[math.fsum(block[row][column] for block in found) for column in range(count)] for row in range(count)]


def tally(sizes: Tensor, begin: int, passed: int) -> Tensor:
    """Count magnitudes by their next digit, those whose digits so far are `begin`.

    Magnitudes of floats are ordered as their bits are. NaNs are larger than all numbers.

    Args:
        sizes: absolute values, float32 or float64.
        begin: the leading digits that are known.
        passed: how many these are.
    """
    import torch

    width = 8 * sizes.element_size()
    bits = sizes.reshape(-1).view(torch.int32 if width == 32 else torch.int64)
    rest = width - DIGIT * (passed + 1)
    if passed:
        bits = bits[(bits >> rest + DIGIT) == begin]
    digits = bits >> rest
    # The first digit has nothing before it but the sign, which is 0.
    return torch.bincount(digits & ((1 << DIGIT) - 1) if passed else digits, minlength=1 << DIGIT)


def begins(counts: Tensor, rank: int, begin: int = 0) -> tuple[int, int]:
    """Return the leading digits of the magnitude of a rank, with one more, and its rank among those that share them.

    Args:
        counts: the tally of the next digit.
        rank: how many magnitudes with the leading digits `begin` come before it, from 0.
    """
    import torch

    upto = counts.cumsum(0)
    digit = int(torch.searchsorted(upto, rank, right=True))
    return begin << DIGIT | digit, rank - int(upto[digit] - counts[digit])
