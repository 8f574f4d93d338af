"""Floats to quantised weights: `fp8_quant`, `int8_quant`, `gguf_quant`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...specs import TensorSpec
from ..base import Op, OpError, OpPart, Specs, Tensors
from ..numerics import specs_of
from ..op_parts import RunsOf, parts_of_rows
from ..operands import arithmetic_float, operands, pair
from ..registry import op as registered
from .bands import bands, blank
from .floats import Fp8Dequant, Int8Dequant
from .gguf_blocks import BLOCK_SIZES, GgufDequant

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Fp8Quant", "GgufQuant", "Int8Quant"]

_LARGEST = 448.0


@registered
@dataclass(frozen=True)
class Fp8Quant(Op):
    """Round a weight to FP8 with scales; targets: weight, scale.

    >>> Fp8Quant(128).infer((TensorSpec([300, 256], "BF16"),))
    (TensorSpec(shape=(300, 256), dtype='F8_E4M3'), TensorSpec(shape=(3, 2), dtype='F32'))
    >>> Fp8Quant(per="channel").infer((TensorSpec([300, 256], "BF16"),))[1]
    TensorSpec(shape=(300, 1), dtype='BF16')

    By blocks: f = 448 / max |w|, q = w · f, scale 1 / f in F32; source: transformers' `Fp8Quantize`, which stores it as
    `weight_scale_inv`. By channel (row) and tensor: s = max |w| / 448 in the weight's dtype, q = w / s; source:
    compressed-tensors, which stores it as `weight_scale`. A block, row or tensor of zeros stays zeros.

    Args:
        block: rows and columns of a block, [rows, columns], or one number for a square.
        per: one scale for each row, or one for the tensor, in place of blocks.

    Values are rounded to the nearest F8_E4M3. The inverse, but for rounding, is `fp8_dequant`.

    Raises:
        OpError: fewer than two dims, or no floats; block together with per, or neither.
    """

    name = "fp8_quant"
    joins = True
    block: int | tuple[int, int] | None = None
    per: Literal["channel", "tensor"] | None = None

    def __post_init__(self) -> None:
        if (self.block is None) == (self.per is None):
            raise OpError(f"{self.name} wants block=128, per=channel or per=tensor")
        if self.block is not None:
            pair(self, self.block, "block")

    def infer(self, specs: Specs) -> Specs:
        spec = _matrix(self, specs)
        *leading, rows, columns = spec.shape
        if self.block is not None:
            height, width = pair(self, self.block, "block")
            scale = TensorSpec((*leading, -(-rows // height), -(-columns // width)), "F32")
        elif self.per == "channel":
            scale = TensorSpec((*leading, rows, 1), spec.dtype)
        else:
            scale = TensorSpec((*leading, 1, 1) if leading else (1,), spec.dtype)
        return TensorSpec(spec.shape, "F8_E4M3"), scale

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        if self.per == "tensor":
            return None
        return _parts(self, specs[0], self.infer(specs), limit, pair(self, self.block or 1, "block")[0])

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        (weight,), (_, scale) = tensors, self.infer(specs_of(tensors))
        if self.block is None:
            scales = _largest(weight, self.per == "tensor") / torch.tensor(_LARGEST, dtype=weight.dtype)
            q, s = _rounded(weight, scales, -_LARGEST, _LARGEST, torch.float8_e4m3fn)
            return q, s.reshape(scale.shape)
        return self._by_blocks(weight, scale)

    def _by_blocks(self, weight: Tensor, scale: TensorSpec) -> Tensors:
        import torch

        height, width = pair(self, self.block or 1, "block")
        result = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        scales = torch.empty(scale.shape, dtype=torch.float32, device=weight.device)
        columns = weight.shape[-1]
        for number in range(scale.shape[-2] if weight.numel() and not weight.is_meta else 0):
            band = slice(number * height, (number + 1) * height)
            values = weight[..., band, :].float()
            room = torch.nn.functional.pad(values.abs().amax(-2), (0, scale.shape[-1] * width - columns))
            largest = room.view(*room.shape[:-1], scale.shape[-1], width).amax(-1)
            factor = torch.where(largest > 0, _LARGEST / largest, 1.0)
            scales[..., number, :] = 1.0 / factor
            each = factor.repeat_interleave(width, -1)[..., None, :columns]
            result[..., band, :] = (values * each).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return result, scales

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return Fp8Dequant(self.block) if inputs is None else None


@registered
@dataclass(frozen=True)
class Int8Quant(Op):
    """Round a weight to 8-bit integers with a scale for each row; targets: weight, scale.

    >>> Int8Quant().infer((TensorSpec([300, 256], "BF16"),))
    (TensorSpec(shape=(300, 256), dtype='I8'), TensorSpec(shape=(300, 1), dtype='BF16'))

    s = max |w| / 127.5 in the weight's dtype, q = round(w / s), from -128 to 127; source: compressed-tensors
    (`int-quantized`, symmetric, by channel). A row of zeros stays zeros.

    The inverse, but for rounding, is `int8_dequant`.

    Raises:
        OpError: fewer than two dims, or no floats.
    """

    name = "int8_quant"
    joins = True

    def infer(self, specs: Specs) -> Specs:
        spec = _matrix(self, specs)
        return TensorSpec(spec.shape, "I8"), TensorSpec((*spec.shape[:-1], 1), spec.dtype)

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        return _parts(self, specs[0], self.infer(specs), limit)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        self.infer(specs_of(tensors))
        scales = _largest(tensors[0], False) / torch.tensor(127.5, dtype=tensors[0].dtype)
        return _rounded(tensors[0], scales, -128, 127, torch.int8)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return Int8Dequant() if inputs is None else None


@registered
@dataclass(frozen=True)
class GgufQuant(Op):
    """Round floats to the blocks of a GGUF type, as bytes.

    >>> GgufQuant().infer((TensorSpec([8, 64], "BF16"),))
    (TensorSpec(shape=(8, 68), dtype='U8'),)

    Q8_0 has blocks of 32 along the last axis: d = max |w| / 127 in float16, q = round(w / d), halves away from zero.
    Source: `quantize_row_q8_0_ref` of ggml.

    Args:
        type: of the blocks: Q8_0, or Q4_0, Q4_1, Q5_0, Q5_1, TQ1_0, TQ2_0, MXFP4. All but Q8_0 are made by the gguf
            package, which must be installed. llama-quantize makes other types of a file, such as Q4_K.

    The inverse, but for rounding, is `gguf_dequant`.

    Raises:
        OpError: no floats, a last axis that is not of whole blocks, or another type.
    """

    name = "gguf_quant"
    type: str = "Q8_0"

    def __post_init__(self) -> None:
        if self.type in _MADE:
            return
        text = f"{self.name} makes blocks of {', '.join(_MADE)}, not of {self.type}"
        if _BY_THE_PROGRAM.fullmatch(self.type) is None:
            raise OpError(text)
        help = f"without this op, write a file in F16; then: llama-quantize new.gguf quantised.gguf {self.type}"
        raise OpError(f"{text}, which only llama.cpp makes", help=help)

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one tensor")
        arithmetic_float(self, spec)
        elements, nbytes = BLOCK_SIZES[self.type]
        if not spec.shape or spec.shape[-1] % elements:
            raise OpError(f"{self.name}: the last axis of {spec} is not of whole blocks of {elements}")
        return (TensorSpec((*spec.shape[:-1], spec.shape[-1] // elements * nbytes), "U8"),)

    def packing(self) -> str:
        return self.type

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        return _parts(self, specs[0], self.infer(specs), limit)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        (spec,) = self.infer(specs_of(tensors))
        empty = blank(spec, tensors[0])
        if empty is not None:
            return (empty,)
        if self.type != "Q8_0":
            return (_by_gguf(self, tensors[0]).view(spec.shape),)
        result = torch.empty(spec.shape, dtype=torch.uint8, device=tensors[0].device)
        blocks, made = tensors[0].reshape(-1, 32), result.view(-1, 34)
        for start, stop in bands(blocks.shape[0], 32):
            values = blocks[start:stop].float()
            scale = values.abs().amax(-1, keepdim=True) / 127
            scaled = values * torch.where(scale == 0, 0, 1 / scale)
            magnitude = scaled.abs()
            floor = magnitude.floor()
            # Halves go away from zero; the fraction is exact, which adding a half first would not be.
            rounded = floor.add_((magnitude - floor >= 0.5).float()).copysign_(scaled)
            made[start:stop, :2] = scale.to(torch.float16).view(torch.uint8)
            made[start:stop, 2:] = rounded.to(torch.int8).view(torch.uint8)
        return (result,)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return GgufDequant(self.type) if inputs is None else None


_MADE = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")
_BY_THE_PROGRAM = re.compile(r"Q[2-6]_K(_[SML])?|IQ[1-4]_(XXS|XS|NL|S|M)")
"""Types of `llama-quantize`, which quantises in ways of its own."""


def _by_gguf(op: GgufQuant, tensor: Tensor) -> Tensor:
    import torch

    try:
        import gguf  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise OpError(f"{op.name}: {op.type} is made by the gguf package: pip install gguf") from None
    made = gguf.quantize(tensor.float().cpu().numpy(), gguf.GGMLQuantizationType[op.type])
    return torch.from_numpy(made).to(tensor.device)


def _parts(op: Op, spec: TensorSpec, results: Specs, limit: int, step: int = 1) -> Iterator[OpPart] | None:
    """The op on some rows of all matrices together, of which the first result has as many."""
    *leading, columns = spec.shape
    rows = math.prod(leading)
    if not spec.numel or (len(leading) > 1 and leading[-1] % step):
        return None
    whole = RunsOf(TensorSpec((rows, columns), spec.dtype), step)
    made = [TensorSpec((result.numel // result.shape[-1], result.shape[-1]), result.dtype) for result in results]
    each = (step, *(1 for _ in made[1:]))
    return parts_of_rows(op, [whole], [RunsOf(one, count) for one, count in zip(made, each)], limit)


def _matrix(op: Op, specs: Specs) -> TensorSpec:
    (spec,) = operands(op, specs, "one tensor")
    arithmetic_float(op, spec)
    if len(spec.shape) < 2:
        raise OpError(f"{op.name} wants a weight of 2 dims or more, not {spec}")
    return spec


def _largest(weight: Tensor, whole: bool) -> Tensor:
    """The largest magnitude of each row [..., 1], or of each matrix [..., 1, 1], in the weight's dtype."""
    import torch

    if weight.is_meta or not weight.numel():
        shape = (*weight.shape[:-2], 1, 1) if whole else (*weight.shape[:-1], 1)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    dims = (-2, -1) if whole else (-1,)
    return torch.maximum(weight.amax(dims, keepdim=True), -weight.amin(dims, keepdim=True))


def _rounded(weight: Tensor, scales: Tensor, low: float, high: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """round(w / s) within a range, the quotient in the weight's dtype; and the scales without zeros."""
    import torch

    scales = torch.where(scales == 0, torch.finfo(scales.dtype).eps, scales)
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.is_meta or not weight.numel():
        return result, scales
    flat, made = weight.reshape(-1, weight.shape[-1]), result.view(-1, weight.shape[-1])
    per_row = scales.expand(*weight.shape[:-1], 1).reshape(-1, 1)
    for start, stop in bands(*flat.shape):
        quotient = (flat[start:stop] / per_row[start:stop]).clamp_(low, high)
        made[start:stop] = (quotient if dtype.is_floating_point else quotient.round_()).to(dtype)
    return result, scales
