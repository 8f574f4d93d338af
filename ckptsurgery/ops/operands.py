"""What an op asks of the specs it is given; each check says what was wanted and what came. No torch here."""

from __future__ import annotations

from ..specs import DTYPES, TensorSpec
from .base import Op, OpError, Specs

__all__ = ["arithmetic_float", "integer_range", "largest_float", "operands", "pair", "whole_elements"]

_NO_ARITHMETIC = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}


def operands(op: Op, specs: Specs, *names: str) -> Specs:
    """The specs, one for each of `names`."""
    if len(specs) != len(names):
        wants = names[0] if len(names) == 1 else f"{len(names)} sources in this order: {', '.join(names)}"
        raise OpError(f"{op.name} takes {wants}; it was given {len(specs)}")
    return specs


def whole_elements(op: Op, spec: TensorSpec, what: str = "the tensor") -> TensorSpec:
    """The spec, whose elements are bytes or more: packed ones cannot be cut one by one."""
    if DTYPES[spec.dtype].bits < 8 or DTYPES[spec.dtype].torch is None:
        raise OpError(f"{op.name} cannot cut the packed elements of {what}, {spec}")
    return spec


def arithmetic_float(op: Op, spec: TensorSpec, what: str = "the tensor") -> TensorSpec:
    """The spec, of a float dtype that can be computed with."""
    if DTYPES[spec.dtype].kind != "float" or spec.dtype in _NO_ARITHMETIC:
        raise OpError(f"{op.name} computes with floats, and {what} is {spec}; cast it first")
    return spec


def integer_range(dtype: str) -> tuple[int, int]:
    """The smallest and the largest value of an integer dtype.

    >>> integer_range("I8"), integer_range("U8")
    ((-128, 127), (0, 255))
    """
    row = DTYPES[dtype]
    if row.kind == "int":
        return -(1 << (row.bits - 1)), (1 << (row.bits - 1)) - 1
    return 0, 1 if row.kind == "bool" else (1 << row.bits) - 1


def largest_float(dtype: str) -> float:
    """The largest finite value of a float dtype.

    >>> largest_float("F16"), largest_float("F8_E5M2"), largest_float("F8_E4M3")
    (65504.0, 57344.0, 448.0)
    """
    if dtype == "F8_E4M3":
        # Of the values with the highest exponent only one stands for NaN, so the range ends later than IEEE's would.
        return 448.0
    row = DTYPES[dtype]
    return (2 - 2.0 ** (1 - row.significand)) * 2.0 ** ((1 << (row.exponent - 1)) - 1)


def pair(op: Op, value: int | tuple[int, int], what: str) -> tuple[int, int]:
    """[rows, columns], where one number stands for both."""
    rows, columns = (value, value) if isinstance(value, int) else value
    if rows < 1 or columns < 1:
        raise OpError(f"{op.name}: {what} wants 1 or more each way, not {rows} x {columns}")
    return rows, columns
