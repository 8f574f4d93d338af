"""Ops on each element alone: `cast`, `add`, `mul`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..specs import DTYPES, TensorSpec, dtype_name, is_lossless
from .base import Op, OpError, Specs, Tensors, Unchanged
from .numerics import compute, convert, has_data, specs_of
from .operands import arithmetic_float, integer_range, operands
from .registry import op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Add", "Cast", "Mul"]

_NO_CAST = {"F4", "F6_E2M3", "F6_E3M2"}


@op
@dataclass(frozen=True)
class Cast(Op):
    """Change the dtype: rounded as torch rounds, never past the range, NaNs with their bits.

    >>> str(Cast("bfloat16")), Cast("f16").infer((TensorSpec([2], "F32"),))
    ('cast(dtype=BF16)', (TensorSpec(shape=(2,), dtype='F16'),))

    Args:
        dtype: by any of its names (`bf16`, `BF16`, `bfloat16`).
        floats: tensors that are no floats pass unchanged, such as position ids beside weights.
        saturate: a value past the range becomes its end; without it such a value is an error, never inf.

    Floats become integers only when they are whole numbers, and booleans only when they are 0 or 1. Complex numbers
    stay complex. Packed dtypes (F4, F6) are not cast, and nothing is cast to F8_E8M0, which has neither zero nor sign.

    The inverse is the cast back, exact where every old value fits the new dtype; without inputs the old dtype is
    unknown, and so is the inverse.

    Raises:
        OpError: kinds that do not convert; at run time a value that the dtype cannot hold.
    """

    name = "cast"
    elementwise = True
    dtype: str
    floats: bool = False
    saturate: bool = False

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        except CheckpointError as error:
            raise OpError(f"cast: {error.diagnostics[0].headline}; {error.diagnostics[0].help}") from None

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one tensor")
        old, new = DTYPES[spec.dtype], DTYPES[self.dtype]
        if old == new or (self.floats and old.kind != "float"):
            return (spec,)
        if (old.kind == "complex") != (new.kind == "complex"):
            raise OpError(f"cast does not go between real and complex numbers: {old.name} to {new.name}")
        if not {old.name, new.name}.isdisjoint(_NO_CAST) or new.name == "F8_E8M0":
            raise OpError(f"cast cannot turn {old.name} into {new.name}")
        return (TensorSpec(spec.shape, self.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        return (convert(tensors[0], spec.dtype, str(self), self.saturate),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        if inputs is None:
            return None
        (new,), (old,) = self.infer(inputs), inputs
        return Cast(old.dtype) if is_lossless(old.dtype, new.dtype) else None

    def on_moments(self) -> Op:
        return Unchanged()


@op
@dataclass(frozen=True)
class Add(Op):
    """Add a number to each element, as norms that store w - 1 need it.

    >>> str(Add(1)), str(Add(1).inverse())
    ('add(value=1)', 'add(value=-1)')

    Floats below float32 are added in float32 and rounded back. Integers take an integer, and overflow is an error, so
    on them `add(-value)` is the exact inverse; on floats it is the inverse but for rounding.

    Raises:
        OpError: not a number that the dtype can take; at run time a result past its range.
    """

    name = "add"
    elementwise = True
    undone_by = "-"
    value: int | float

    def __post_init__(self) -> None:
        _finite(self, self.value)

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one tensor")
        return (_number(self, spec, self.value),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        if DTYPES[spec.dtype].kind != "float":
            return (_integers(tensors[0], spec.dtype, 1, int(self.value), str(self)),)
        return (compute(tensors[0], lambda t: t + float(self.value), str(self)),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        if inputs is None or DTYPES[inputs[0].dtype].kind != "float":
            return Add(-self.value)
        return None

    def on_moments(self) -> Op:
        return Unchanged()


@op
@dataclass(frozen=True)
class Mul(Op):
    """Multiply each element by a number.

    >>> str(Mul(4).inverse()), Mul(3).inverse((TensorSpec([2], "F32"),))
    ('mul(value=0.25)', None)

    Floats below float32 are multiplied in float32 and rounded back. Integers take an integer, and overflow is an error.

    The inverse is `mul(1 / value)`, but for rounding. It is exact on floats for ±1, ±2, ±4, ...: no bit is lost on the
    way up, since a result past the range is an error; on the way down (0.5) the smallest values would lose theirs. On
    integers it is exact for ±1 alone.

    Raises:
        OpError: not a number that the dtype can take; at run time a result past its range.
    """

    name = "mul"
    elementwise = True
    undone_by = "1 / "
    value: int | float

    def __post_init__(self) -> None:
        _finite(self, self.value)

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one tensor")
        return (_number(self, spec, self.value),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        if DTYPES[spec.dtype].kind != "float":
            return (_integers(tensors[0], spec.dtype, int(self.value), 0, str(self)),)
        return (compute(tensors[0], lambda t: t * float(self.value), str(self)),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        if self.value == 0:
            return None
        if abs(self.value) == 1:
            return self
        if inputs is None or self._only_raises_exponents(inputs[0]):
            return Mul(1 / self.value)
        return None

    def _only_raises_exponents(self, spec: TensorSpec) -> bool:
        if DTYPES[spec.dtype].kind != "float":
            return False
        mantissa, exponent = math.frexp(abs(self.value))
        # float32 holds 2**-126 exactly and without subnormals: a device that flushes them must come back too.
        return mantissa == 0.5 and 1 <= exponent <= 127


def _finite(op: Op, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == math.inf:
        raise OpError(f"{op.name} wants a finite number, not {value!r}")
    if isinstance(value, int) and abs(value) >= 1 << 64:
        raise OpError(f"{op.name}: an integer of {value.bit_length()} bits fits no dtype")


def _number(op: Op, spec: TensorSpec, value: int | float) -> TensorSpec:
    kind = DTYPES[spec.dtype].kind
    if kind in ("int", "uint") and spec.dtype != "U64":
        if not isinstance(value, int):
            raise OpError(f"{op.name}({value}) meets integers, {spec}; give an integer, or cast first")
        return spec
    return arithmetic_float(op, spec)


def _integers(tensor: Tensor, dtype: str, factor: int, offset: int, who: str) -> Tensor:
    """factor * tensor + offset, in int64; Python's own integers tell beforehand whether it fits."""
    import torch

    wide = tensor.to(torch.int64)
    if has_data(tensor):
        low, high = integer_range(dtype)
        ends = [int(v) * factor + offset for v in torch.aminmax(wide)]
        if min(ends) < low or max(ends) > high:
            raise OpError(f"{who}: results run from {min(ends)} to {max(ends)}, outside the range of {dtype}")
    if not -(1 << 63) <= offset < 1 << 63 or not -(1 << 63) <= factor < 1 << 63:
        # Only a tensor of nothing, or of zeros, gets here with a factor that int64 cannot hold.
        return tensor.clone()
    return (wide * factor + offset).to(tensor.dtype)
