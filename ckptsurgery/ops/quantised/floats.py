"""Weights of one byte an element with scales beside them: `fp8_dequant`, `int8_dequant`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ...specs import TensorSpec
from ..base import Op, OpError, OpPart, Specs, Tensors
from ..numerics import specs_of
from ..op_parts import RunsOf, parts_of_rows
from ..operands import arithmetic_float, operands, pair
from ..registry import op as registered
from .bands import Banded, BandedOp, float_dtype, largest, result_dtype
from .code_books import exponents, widened
from .scales import add_grouped, scale_grid, times_grouped

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fp8Dequant", "Int8Dequant"]

Block = int | tuple[int, int] | None


@registered
@dataclass(frozen=True)
class Fp8Dequant(BandedOp):
    """Multiply a quantised weight by its scales; sources: weight, scale.

    >>> specs = TensorSpec([300, 256], "F8_E4M3"), TensorSpec([3, 2], "F32")
    >>> Fp8Dequant().infer(specs)
    (TensorSpec(shape=(300, 256), dtype='BF16'),)

    W[r, c] = q[r, c] · s[r // rows, c // columns], where a scale is for a block of [rows, columns]; source: the
    `weight_scale_inv` of blockwise FP8 checkpoints and the `weight_scale` of compressed-tensors. Dims in front
    (experts) are equal on both. A scale of U8 or F8_E8M0 is an exponent: 2 ** (byte - 127).

    Args:
        block: rows and columns of a block, [rows, columns], or one number for a square. Left out, it is read off the
            scale's shape: one scale for the tensor, one a row, or blocks of ceil(rows / block) x ceil(columns / block)
            scales. Of several sizes that fit, 128 x 128 is taken first, then one that divides the weight.
        dtype: of the result.

    Each product is taken in float32 (float64 for a float64 scale) and rounded once. Scales could be chosen in more
    than one way, so it has no inverse.

    Raises:
        OpError: shapes that do not belong together; at run time a value past the range of `dtype`.
    """

    name = "fp8_dequant"
    joins = True
    block: Block = None
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if self.block is not None:
            pair(self, self.block, "block")
        object.__setattr__(self, "dtype", float_dtype(self, self.dtype))

    def infer(self, specs: Specs) -> Specs:
        weight, scale = operands(self, specs, "weight", "scale_inv")
        arithmetic_float(self, weight, "weight")
        _scale(self, scale, "scale_inv")
        scale_grid(self, weight, scale, self.block, "scale_inv")
        return (TensorSpec(weight.shape, self.dtype),)

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        return _parts(self, specs, limit)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        return _scaled(self, spec, self.block, tensors)


@registered
@dataclass(frozen=True)
class Int8Dequant(BandedOp):
    """Multiply a weight of 8-bit integers by its scales; sources: weight, scale, and a zero point where there is one.

    >>> specs = TensorSpec([300, 256], "I8"), TensorSpec([300, 1], "BF16")
    >>> Int8Dequant().infer(specs), str(Int8Dequant(absmax=True))
    ((TensorSpec(shape=(300, 256), dtype='BF16'),), 'int8_dequant(absmax=true)')

    W = (q - z) · s, with a scale and a zero point for each row, group, block, or the tensor; source: compressed-tensors
    (`int-quantized`). With `absmax` the scale is the largest magnitude of its row, and W = q · s · (1/127); source:
    `int8_vectorwise_dequant` of bitsandbytes, whose scales are called `SCB`.

    Args:
        block: as for `fp8_dequant`.
        dtype: of the result; the scale's where left out, and F16 with `absmax`.
        absmax: the scale is a largest magnitude.

    Computed in float32 and rounded once. Scales could be chosen in more than one way, so it has no inverse.

    Raises:
        OpError: shapes that do not belong together; at run time a value past the range of `dtype`.
    """

    name = "int8_dequant"
    joins = True
    block: Block = None
    dtype: str | None = None
    absmax: bool = False

    def __post_init__(self) -> None:
        if self.block is not None:
            pair(self, self.block, "block")
        object.__setattr__(self, "dtype", float_dtype(self, self.dtype))

    def infer(self, specs: Specs) -> Specs:
        names = ("weight", "scale", "zero_point")[: 3 if len(specs) == 3 and not self.absmax else 2]
        weight, scale, *zero = operands(self, specs, *names)
        if weight.dtype not in ("I8", "U8"):
            raise OpError(f"{self.name} wants a weight of 8-bit integers, not {weight}")
        _scale(self, scale, "scale")
        scale_grid(self, weight, scale, self.block)
        if zero and (zero[0].shape != scale.shape or zero[0].dtype not in ("I8", "U8")):
            raise OpError(f"{self.name}: beside scale {scale}, zero_point is I8 {list(scale.shape)}, not {zero[0]}")
        return (TensorSpec(weight.shape, "F16" if self.absmax and not self.dtype else result_dtype(self.dtype, scale)),)

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        return _parts(self, specs, limit)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        return _scaled(self, spec, self.block, tensors, self.absmax)


def _parts(op: Fp8Dequant | Int8Dequant, specs: Specs, limit: int) -> Iterator[OpPart] | None:
    """The op on some rows of blocks, with the scales of these."""
    (made,), (weight, scale, *zero) = op.infer(specs), specs
    grid = scale_grid(op, weight, scale, op.block)
    matrices, rows = weight.numel // max(grid.height * weight.shape[-1], 1), grid.size[0]
    if not weight.numel or (matrices > 1 and grid.height % rows):
        return None
    whole = grid.shape == (1, 1) and matrices == 1
    step = 1 if whole else rows
    flat = tuple(TensorSpec((matrices * grid.height, weight.shape[-1]), spec.dtype) for spec in (weight, made))
    scales = (TensorSpec((matrices * grid.shape[0], grid.shape[1]), spec.dtype) for spec in (scale, *zero))
    sources = [RunsOf(flat[0], step), *(RunsOf(spec, None if whole else 1) for spec in scales)]
    part = replace(op, block=None if whole else grid.size, dtype=made.dtype)
    return parts_of_rows(part, sources, [RunsOf(flat[1], step)], limit)


def _scaled(op: Op, spec: TensorSpec, block: Block, tensors: Tensors, absmax: bool = False) -> Banded:
    """(q - z) · s, a band of rows at a time."""
    weight, scale, *zero = tensors
    held = specs_of(tensors)
    grid = scale_grid(op, held[0], held[1], block)
    scales = exponents(scale) if held[1].dtype == "U8" else widened(scale, held[1].dtype)
    scales = scales.reshape(-1, grid.shape[1])
    zeros = [z.to(scales.dtype).reshape(scales.shape) for z in zero]
    flat = weight.reshape(-1, weight.shape[-1])
    bound = partial(largest, [scales], [_LARGEST_CODE.get(held[0].dtype, math.inf)])

    def band(start: int, stop: int, out: Tensor) -> None:
        widened(flat[start:stop], held[0].dtype, out)
        for z in zeros:
            add_grouped(out, grid.rows(z, start, stop), grid.size[1], -1)
        times_grouped(out, grid.rows(scales, start, stop), grid.size[1])
        if absmax:
            out.mul_(_OVER_127)

    return Banded(op, spec, weight, band, bound, wide=scales.dtype)


_LARGEST_CODE = {"I8": 256, "U8": 256}
"""Dtype of codes -> the largest magnitude of a code less a zero point; of FP8, NaN may be among them."""

_OVER_127 = 7.874015718698502e-3


def _scale(op: Op, scale: TensorSpec, what: str) -> None:
    if scale.dtype not in ("F8_E8M0", "U8"):
        arithmetic_float(op, scale, what)
