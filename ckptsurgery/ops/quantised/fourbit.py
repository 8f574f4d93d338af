"""Weights of 4-bit floats and of code books: `mxfp4_dequant`, `nvfp4_dequant`, `nf4_dequant`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...specs import TensorSpec, dtype_name
from ..base import Op, OpError, SourceNote, Specs, Tensors
from ..numerics import narrow, specs_of, torch_dtype
from ..operands import arithmetic_float, operands
from ..registry import op as registered
from .bands import bands, blank, float_dtype, in_bands
from .code_books import E2M1, exponents, values_of_bytes, widened
from .scales import times_grouped

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mxfp4Dequant", "Nf4Dequant", "Nvfp4Dequant"]


@registered
@dataclass(frozen=True)
class Mxfp4Dequant(Op):
    """Multiply 4-bit floats by powers of two, one for each group along a row; sources: blocks, scales.

    >>> specs = TensorSpec([8, 6, 2, 16], "U8"), TensorSpec([8, 6, 2], "U8")
    >>> Mxfp4Dequant().infer(specs), Mxfp4Dequant().infer((TensorSpec([6, 32], "U8"), TensorSpec([6, 2], "U8")))
    ((TensorSpec(shape=(8, 6, 64), dtype='BF16'),), (TensorSpec(shape=(6, 64), dtype='BF16'),))

    W = e2m1(code) · 2 ** (scale - 127); the first of two codes is in a byte's low bits. Sources: Open Compute Project,
    "Microscaling Formats (MX)" 1.0; the `blocks` and `scales` that transformers reads; the `weight_packed` and
    `weight_scale` of compressed-tensors (`mxfp4-pack-quantized`).

    Args:
        dtype: of the result.

    Blocks are [..., groups, bytes] beside scales [..., groups], or [..., bytes] of whole rows. Computed in float32
    and rounded once; it has no inverse.

    Raises:
        OpError: shapes that do not belong together; at run time a value past the range of `dtype`.
    """

    name = "mxfp4_dequant"
    joins = True
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", float_dtype(self, self.dtype))

    def infer(self, specs: Specs) -> Specs:
        blocks, scales = operands(self, specs, "blocks", "scales")
        shape = _halves(self, blocks)
        if scales.dtype not in ("U8", "F8_E8M0"):
            raise OpError(f"{self.name} wants scales of U8 or F8_E8M0, not {scales}")
        if blocks.shape[:-1] == scales.shape and len(shape) > 1:
            shape = (*shape[:-2], shape[-2] * shape[-1])
        if scales.shape[:-1] != shape[:-1] or not scales.shape[-1:] or _uneven(shape[-1], scales.shape[-1]):
            raise OpError(f"{self.name}: scales {scales} do not belong to blocks {blocks}")
        return (TensorSpec(shape, self.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (blocks, scales), (spec,) = tensors, self.infer(specs_of(tensors))
        return (_four_bits(self, spec, blocks, lambda: exponents(scales)),)


@registered
@dataclass(frozen=True)
class Nvfp4Dequant(Op):
    """Multiply 4-bit floats by FP8 scales and by a scale of the tensor; sources: packed, scale, global_scale.

    >>> specs = TensorSpec([6, 32], "U8"), TensorSpec([6, 4], "F8_E4M3"), TensorSpec([1], "F32")
    >>> Nvfp4Dequant().infer(specs)
    (TensorSpec(shape=(6, 64), dtype='BF16'),)

    W = e2m1(code) · (s / g); the first of two codes is in a byte's low bits. Source: compressed-tensors
    (`nvfp4-pack-quantized`: `weight_packed`, `weight_scale`, `weight_global_scale`).

    Args:
        multiply: W = e2m1(code) · (s · g), as ModelOpt stores `weight`, `weight_scale` and `weight_scale_2`.
        dtype: of the result.

    Computed in float32 and rounded once; it has no inverse.

    Raises:
        OpError: shapes that do not belong together; at run time a value past the range of `dtype`.
    """

    name = "nvfp4_dequant"
    joins = True
    multiply: bool = False
    dtype: str = "BF16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", float_dtype(self, self.dtype))

    def infer(self, specs: Specs) -> Specs:
        packed, scale, whole = operands(self, specs, "packed", "scale", "global_scale")
        shape = _halves(self, packed)
        arithmetic_float(self, scale, "scale")
        arithmetic_float(self, whole, "global_scale")
        if scale.shape[:-1] != shape[:-1] or not scale.shape or _uneven(shape[-1], scale.shape[-1]):
            raise OpError(f"{self.name}: scale {scale} does not belong to packed {packed}")
        if whole.numel != 1 and whole.numel != math.prod(shape[:-2]):
            raise OpError(f"{self.name}: global_scale is one number for each matrix, not {whole}")
        return (TensorSpec(shape, self.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (packed, scale, whole), (spec,) = tensors, self.infer(specs_of(tensors))

        def scales() -> Tensor:
            each = widened(scale, dtype_name(scale.dtype)).float()
            by = whole.float().reshape(*spec.shape[:-2] if whole.numel() > 1 else (), *[1] * min(2, each.dim()))
            return each * by if self.multiply else each / by

        return (_four_bits(self, spec, packed, scales),)


@registered
@dataclass(frozen=True)
class Nf4Dequant(Op):
    """Look 4-bit codes up and multiply them by their blocks' largest magnitudes; sources as bitsandbytes stores them.

    >>> specs = TensorSpec([1024, 1], "U8"), TensorSpec([32], "F32"), TensorSpec([16], "F32"), TensorSpec([90], "U8")
    >>> Nf4Dequant(shape=(32, 64), dtype="bf16").infer(specs)
    (TensorSpec(shape=(32, 64), dtype='BF16'),)

    W = quant_map[code] · absmax[block], over the flattened weight; the first of two codes is in a byte's high bits.
    Sources: weight, absmax, quant_map, quant_state (the tensor called `quant_state.bitsandbytes__nf4` or `…fp4`). With
    nested quantisation: weight, absmax, quant_map, nested_absmax, nested_quant_map, quant_state, and
    absmax = nested_quant_map[code] · nested_absmax[block] + nested_offset. Source: `dequantize_4bit` of bitsandbytes.

    Args:
        shape, dtype: of the result. Left out, planning reads both from quant_state, some 100 bytes of JSON.

    Computed in float32 and rounded once. It has no inverse.

    Raises:
        OpError: shapes that do not belong together; a quant_state that is none, or has another shape.
    """

    name = "nf4_dequant"
    joins = True
    reads_ahead = (-1,)
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", float_dtype(self, self.dtype))

    def told(self, notes: Sequence[SourceNote]) -> Op:
        if self.shape is not None and self.dtype is not None:
            return self
        state = _State.of(self, notes[0].content)
        return replace(self, shape=self.shape or state.shape, dtype=self.dtype or state.dtype)

    def infer(self, specs: Specs) -> Specs:
        nested = ("nested_absmax", "nested_quant_map") if len(specs) == 6 else ()
        weight, absmax, quant_map, *more = operands(
            self, specs, "weight", "absmax", "quant_map", *nested, "quant_state"
        )
        if self.shape is None or self.dtype is None:
            raise OpError(f"{self.name} cannot read quant_state here; say shape=[rows, columns] and dtype")
        count = math.prod(self.shape)
        if -(-count // 2) != weight.nbytes:
            raise OpError(f"{self.name}: weight {weight} does not hold {list(self.shape)} in codes of 4 bits")
        for book, size in ((quant_map, 16), *((m, 256) for m in more[1:-1])):
            if book.numel != size or book.dtype != "F32":
                raise OpError(f"{self.name} wants a code book of F32 [{size}], not {book}")
        if absmax.dtype != ("U8" if nested else "F32"):
            raise OpError(f"{self.name}: absmax is {absmax}; nested quantisation takes 6 sources, plain 4")
        return (TensorSpec(self.shape, self.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        weight, absmax, quant_map, *nested, packed_state = tensors
        (spec,) = self.infer(specs_of(tensors))
        made = blank(spec, weight)
        if made is not None:
            return (made,)
        result = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=weight.device)
        state = _State.of(self, packed_state.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        if state.shape != spec.shape:
            raise OpError(f"{self.name}: quant_state has the shape {list(state.shape)}, not {list(spec.shape)}")
        if nested:
            largest = values_of_bytes(absmax.reshape(1, -1), _book(nested[1]), 8).view(-1)
            absmax = times_grouped(largest, nested[0], state.nested_block).add_(state.offset)
        if absmax.numel() != -(-spec.numel // state.block):
            text = f"{self.name}: {spec.numel} elements in blocks of {state.block} have no {absmax.numel()} absmax"
            raise OpError(text)
        codes, flat, book = weight.contiguous().view(torch.uint8).view(-1), result.view(-1), _book(quant_map)
        for start, stop in bands(spec.numel, 1, math.lcm(state.block, 2)):
            values = values_of_bytes(codes[start // 2 : -(-stop // 2)], book, 4, high_first=True)[: stop - start]
            times_grouped(values, absmax[start // state.block : -(-stop // state.block)], state.block)
            flat[start:stop] = narrow(values, spec.dtype, str(self))
        return (result,)


@dataclass(frozen=True, slots=True)
class _State:
    """The fields of a `quant_state`, which is JSON."""

    shape: tuple[int, ...]
    dtype: str
    block: int
    nested_block: int = 256
    offset: float = 0.0

    @classmethod
    def of(cls, op: Op, content: bytes | None) -> _State:
        try:
            said: Mapping[str, Any] = json.loads(bytes(content or b"").rstrip(b"\0"))
            shape = tuple(int(n) for n in said["shape"])
            block, nested = int(said["blocksize"]), int(said.get("nested_blocksize", 256))
            if block < 1 or nested < 1 or any(n < 0 for n in shape):
                raise ValueError("a size below 1")
            return cls(shape, dtype_name(said["dtype"]), block, nested, float(said.get("nested_offset", 0)))
        except (ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            raise OpError(f"{op.name}: the last source is not a quant_state of bitsandbytes: {error}") from None


def _book(tensor: Tensor) -> tuple[float, ...]:
    return tuple(tensor.reshape(-1).tolist())


def _halves(op: Op, packed: TensorSpec) -> tuple[int, ...]:
    """The shape of codes of 4 bits."""
    if not packed.shape or packed.dtype not in ("U8", "I8", "F4"):
        raise OpError(f"{op.name} wants 4-bit codes in U8, not {packed}")
    return packed.shape if packed.dtype == "F4" else (*packed.shape[:-1], 2 * packed.shape[-1])


def _uneven(columns: int, groups: int) -> bool:
    return bool(columns % groups) if groups else columns > 0


def _four_bits(op: Op, spec: TensorSpec, packed: Tensor, scales: Callable[[], Tensor]) -> Tensor:
    """e2m1(code) · s, with a scale for each group of a row."""
    import torch

    made = blank(spec, packed)
    if made is not None:
        return made
    columns = spec.shape[-1]
    codes = packed.contiguous().view(torch.uint8).reshape(-1, columns // 2)
    numbers = scales().reshape(codes.shape[0], -1)
    size = columns // numbers.shape[1] if numbers.shape[1] else 1

    def band(start: int, stop: int) -> Tensor:
        return times_grouped(values_of_bytes(codes[start:stop], E2M1, 4), numbers[start:stop], size)

    return in_bands(op, spec, packed, band)
