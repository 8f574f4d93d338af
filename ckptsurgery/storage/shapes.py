"""Which shapes a file may announce: those that torch and numpy can make."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MOST_DIMENSIONS", "shape_problem"]

MOST_DIMENSIONS = 64  # of numpy, and of torch's loops over elements
_LIMIT = 1 << 63


def shape_problem(shape: Sequence[int], bits: int) -> str | None:
    """Why a shape of non-negative integers is absurd for elements of so many bits; None if it is not.

    >>> shape_problem([2, 3], 32), shape_problem([1 << 62, 0, 4], 32)
    (None, 'has the shape [4611686018427387904, 0, 4], whose size does not fit 64 bits')
    """
    if len(shape) > MOST_DIMENSIONS:
        return f"has {len(shape):,} dimensions; {MOST_DIMENSIONS} is the limit"
    # A zero does not save an absurd shape: strides are products of the other sizes.
    total = bits
    for n in shape:
        total *= n or 1
        if total >= _LIMIT:
            digits = [n if n < _LIMIT else f"2^{n.bit_length() - 1}" for n in shape]
            return f"has the shape [{', '.join(map(str, digits))}], whose size does not fit 64 bits"
    return None
