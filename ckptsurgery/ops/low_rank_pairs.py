"""Common parts of the ops of low-rank updates: the shapes of a pair, the update that it is, and its scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..specs import TensorSpec
from .base import Op, OpError
from .numerics import widen
from .operands import arithmetic_float

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["alpha_divisor", "check_pair", "low_rank_update"]


def check_pair(op: Op, weight: TensorSpec, a: TensorSpec, b: TensorSpec, turned: bool) -> int:
    """Return the rank of A and B, which belong to a weight.

    Args:
        turned: the weight is stored as [in, out].

    Raises:
        OpError: their shapes do not belong together, or they are not floats.
    """
    for spec, what in ((weight, "weight"), (a, "A"), (b, "B")):
        arithmetic_float(op, spec, what)
    if len(weight.shape) < 2 or (turned and len(weight.shape) != 2):
        raise OpError(f"{op.name} wants a weight [out, in, ...] (fan_in_fan_out: [in, out]), not {weight}")
    out, *inner = reversed(weight.shape) if turned else weight.shape
    ones = [1] * (len(weight.shape) - 2)
    rank = a.shape[0] if a.shape else 0
    if rank == 0 or a.shape != (rank, *inner) or b.shape != (out, rank, *ones):
        swapped = a.shape[:1] == (out,) and b.shape[1:] == tuple(inner)
        raise OpError(
            f"{op.name}: beside weight {list(weight.shape)}, A is {_dims('r', *inner)} and B is "
            f"{_dims(out, 'r', *ones)}, with r of 1 or more; they are {list(a.shape)} and {list(b.shape)}"
            + ("; write the sources as weight, A, B" if swapped else "")
        )
    return rank


def low_rank_update(weight: Tensor, a: Tensor, b: Tensor, turned: bool) -> Tensor:
    """Return B·A in the weight's shape and dtype."""
    update = widen(b).to(weight.dtype).flatten(1) @ widen(a).to(weight.dtype).flatten(1)
    return update.t() if turned else update.reshape(weight.shape)


def alpha_divisor(rank: int, rslora: bool) -> float:
    """Return the number that alpha is divided by to scale B·A: r, or sqrt(r) (Kalajdzievski, 2023).

    >>> alpha_divisor(4, False), alpha_divisor(4, True)
    (4, 2.0)
    """
    return math.sqrt(rank) if rslora else rank


def _dims(*dims: int | str) -> str:
    return "[" + ", ".join(map(str, dims)) + "]"
