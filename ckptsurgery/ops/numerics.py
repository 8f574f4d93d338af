"""How values change dtype: float32 in between, nothing past the range without a word, NaNs with their bits.

torch alone would turn 1e6 into inf (float16), NaN (float8_e4m3fnuz) or 448 (float8_e4m3fn), would round a NaN's payload
away, and would wrap integers. Here each is an `OpError`, or does not happen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..specs import DTYPES, TensorSpec, dtype_name
from .base import OpError, Specs, Tensors
from .operands import integer_range, largest_float

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["bits", "compute", "convert", "has_data", "narrow", "specs_of", "torch_dtype", "widen"]

_WITHOUT_INFINITY = {"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


def specs_of(tensors: Tensors) -> Specs:
    """The specs of tensors at hand."""
    return tuple(TensorSpec(t.shape, dtype_name(t.dtype)) for t in tensors)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a safetensors name."""
    import torch

    attribute = DTYPES[name].torch
    if attribute is None or not hasattr(torch, attribute):
        raise OpError(f"this torch has no dtype for {name}")
    found: torch.dtype = getattr(torch, attribute)
    return found


def has_data(tensor: Tensor) -> bool:
    """Whether there are values to look at: not on the meta device, not in an empty tensor."""
    return tensor.numel() > 0 and not tensor.is_meta


def bits(tensor: Tensor) -> Tensor:
    """The tensor's elements as integers of the same width, so that NaNs compare and -0.0 differs from 0.0."""
    import torch

    width = tensor.element_size()
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if width in views:
        return tensor.view(views[width])
    return torch.view_as_real(tensor).view(torch.int64)


def widen(tensor: Tensor) -> Tensor:
    """A float tensor as arithmetic wants it: float64 stays, all else becomes float32."""
    import torch

    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


def compute(tensor: Tensor, function: Callable[[Tensor], Tensor], who: str) -> Tensor:
    """`function` on each element, in float32 (float64 for float64), rounded back; a NaN passes as it is."""
    import torch

    wide = widen(tensor)
    result = narrow(function(wide), dtype_name(tensor.dtype), who, was_finite=wide.isfinite)
    if not has_data(tensor) or not math.isnan(float(torch.aminmax(wide)[0])):
        return result
    return torch.where(wide.isnan(), tensor, result)


def narrow(
    wide: Tensor, dtype: str, who: str, was_finite: Callable[[], Tensor] | None = None, saturate: bool = False
) -> Tensor:
    """A float tensor in another float dtype, never past its range.

    Args:
        was_finite: where `wide` was made of finite values, so that an infinity is refused; called only when needed.
        saturate: values past the range become its ends.

    Raises:
        OpError: a value lies outside the range of `dtype`.
    """
    import torch

    target = torch_dtype(dtype)
    if not has_data(wide):
        return wide.to(target)
    limit = largest_float(dtype)
    narrowed = wide.to(target)
    if narrowed.element_size() > 1:  # what is rounded to less than the limit did not exceed it
        low, high = (float(value) for value in torch.aminmax(narrowed))
        inside = -limit < low and high < limit
    else:  # torch knows no least and greatest of float8
        low, high = (float(value) for value in torch.aminmax(widen(wide)))
        inside = -limit <= low and high <= limit
    if inside:
        return narrowed
    values = widen(wide)
    past = values.abs() > limit
    if dtype not in _WITHOUT_INFINITY:
        infinite = values.isinf()
        past &= ~infinite if was_finite is None else ~infinite | was_finite()
    if past.any():
        if not saturate:
            low, high = (float(v) for v in torch.aminmax(values[~values.isnan()]))
            raise OpError(
                f"{who}: {int(past.sum())} of {wide.numel()} values lie outside the range of {dtype}, "
                f"±{limit:g}; they run from {low:g} to {high:g}"
            )
        wide = torch.where(past, values.clamp(-limit, limit), values)
    return _with_nans_of(wide, wide.to(target))


def convert(tensor: Tensor, dtype: str, who: str, saturate: bool = False) -> Tensor:
    """A tensor in another dtype of the real numbers, or of the complex ones.

    Raises:
        OpError: a value that the dtype cannot hold: past its range, or a fraction where an integer is wanted.
    """
    import torch

    source, target = DTYPES[dtype_name(tensor.dtype)], DTYPES[dtype]
    if source.name == target.name:
        return tensor
    if source.kind == "complex":
        part = {"C32": "F16", "C64": "F32", "C128": "F64"}[dtype]
        return torch.view_as_complex(convert(torch.view_as_real(tensor), part, who, saturate).contiguous())
    if source.kind == target.kind == "float":
        return narrow(tensor, dtype, who, saturate=saturate)
    if target.kind == "float":
        wide = torch.float32 if dtype == "F32" else torch.float64
        return narrow(tensor.to(wide), dtype, who, saturate=saturate)
    if not has_data(tensor):
        return tensor.to(torch_dtype(dtype))
    if source.kind == "float":
        return _float_to_integer(tensor, dtype, who, saturate)
    return _integer_to_integer(tensor, dtype, who, saturate)


def _float_to_integer(tensor: Tensor, dtype: str, who: str, saturate: bool) -> Tensor:
    low, high = integer_range(dtype)
    values = tensor.double()
    if not values.isfinite().all() or not values.eq(values.trunc()).all():
        raise OpError(f"{who}: not all values are whole numbers, and {dtype} holds no others")
    # 2**63 and 2**64 are floats, one less is none: hence "at least" rather than "above".
    past = (values < low) | (values >= float(high + 1))
    if past.any() and not saturate:
        raise _past_integers(int(past.sum()), tensor.numel(), dtype, who)
    target = torch_dtype(dtype)
    result = values.masked_fill(past, 0.0).to(target)
    return result if not past.any() else _fill_ends(result, past, values < low, low, high)


def _integer_to_integer(tensor: Tensor, dtype: str, who: str, saturate: bool) -> Tensor:
    import torch

    low, high = integer_range(dtype)
    # Everything but U64 fits int64; there a value past it shows as a negative one.
    wide = tensor.to(torch.int64)
    huge = wide < 0 if dtype_name(tensor.dtype) == "U64" else torch.zeros_like(wide, dtype=torch.bool)
    below = (wide < low) & ~huge
    above = huge & (dtype != "U64")
    if high < 1 << 63:
        above |= (wide > high) & ~huge
    past = below | above
    if past.any() and not saturate:
        raise _past_integers(int(past.sum()), tensor.numel(), dtype, who)
    result = wide.to(torch_dtype(dtype))
    return result if not past.any() else _fill_ends(result, past, below, low, high)


def _past_integers(count: int, total: int, dtype: str, who: str) -> OpError:
    low, high = integer_range(dtype)
    return OpError(f"{who}: {count} of {total} values lie outside the range of {dtype}, {low} to {high}")


def _fill_ends(result: Tensor, past: Tensor, below: Tensor, low: int, high: int) -> Tensor:
    import torch

    ends = torch.where(below, torch.tensor(low, dtype=result.dtype), torch.tensor(high, dtype=result.dtype))
    return torch.where(past, ends, result)


def _with_nans_of(source: Tensor, result: Tensor) -> Tensor:
    """`result` with the sign and payload of each NaN of `source`, as far as they fit; torch rounds them away."""
    import torch

    nans = widen(source).isnan()
    if not nans.any() or source.dtype == result.dtype:
        return result
    old, new = DTYPES[dtype_name(source.dtype)], DTYPES[dtype_name(result.dtype)]
    raw = bits(source.contiguous())[nans].to(torch.int64)
    payload = raw & ((1 << (old.significand - 1)) - 1)
    shift = new.significand - old.significand
    payload = payload << shift if shift >= 0 else payload >> -shift
    payload = torch.where(payload == 0, 1 << (new.significand - 2), payload)
    if new.name == "F8_E4M3":
        payload = torch.full_like(payload, 7)
    sign = (raw >> (old.bits - 1)) & 1
    exponent = ((1 << new.exponent) - 1) << (new.significand - 1)
    made = (sign << (new.bits - 1)) | exponent | payload
    if new.name.endswith("FNUZ"):
        made = torch.full_like(made, 0x80)
    result = result.clone(memory_format=torch.contiguous_format)
    view = bits(result)
    view[nans] = made.to(view.dtype)
    return result
