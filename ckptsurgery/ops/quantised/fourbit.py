"""Weights of 4-bit floats and of code books: `mxfp4_dequant`, `nvfp4_dequant`, `nf4_dequant`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...specs import TensorSpec, dtype_name
from ..base import Op, OpError, OpPart, SourceNote, Specs, Tensors
from ..op_parts import RunsOf, parts_of_rows
from ..operands import arithmetic_float, operands
from ..registry import op as registered
from .bands import Banded, BandedOp, float_dtype, largest
from .code_books import E2M1, exponents, values_of_bytes, widened
from .scales import times_grouped

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mxfp4Dequant", "Nf4Dequant", "Nvfp4Dequant"]


@registered
@dataclass(frozen=True)
class Mxfp4Dequant(BandedOp):
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

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        (made,), (blocks, scales) = self.infer(specs), specs
        return _parts(self, blocks, [RunsOf(_rows(scales))], made, limit)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        blocks, scales = tensors
        return _four_bits(self, spec, blocks, exponents(scales))


@registered
@dataclass(frozen=True)
class Nvfp4Dequant(BandedOp):
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

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        (made,), (packed, scale, whole) = self.infer(specs), specs
        if whole.numel != 1:
            return None
        return _parts(self, packed, [RunsOf(_rows(scale)), RunsOf(whole, None)], made, limit)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        packed, scale, whole = tensors
        each = widened(scale, dtype_name(scale.dtype)).float()
        by = whole.float().reshape(*spec.shape[:-2] if whole.numel() > 1 else (), *[1] * min(2, each.dim()))
        return _four_bits(self, spec, packed, each * by if self.multiply else each / by)


@registered
@dataclass(frozen=True)
class Nf4Dequant(BandedOp):
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

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        (made,), (weight, absmax, book, *nested, state) = self.infer(specs), specs
        # The state, which is not read here, has the sizes of blocks. They follow from the counts where these are even.
        block, uneven = divmod(made.numel, max(absmax.numel, 1))
        one = not nested or nested[0].numel == 1
        if uneven or block < 2 or block & (block - 1) or weight.dtype != "U8" or len(absmax.shape) != 1:
            return None
        if not one and (absmax.numel != nested[0].numel * _NESTED or len(nested[0].shape) != 1):
            return None
        blocks = 1 if one else _NESTED
        sources = [RunsOf(TensorSpec((weight.nbytes,), "U8"), block * blocks // 2), RunsOf(absmax, blocks)]
        sources += [RunsOf(book, None), *(RunsOf(spec, None if one else 1) for spec in nested[:1])]
        sources += [RunsOf(spec, None) for spec in (*nested[1:], state)]
        result = RunsOf(TensorSpec((made.numel,), made.dtype), block * blocks)
        return parts_of_rows(_Nf4Run(made.shape, made.dtype, block), sources, [result], limit)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        state = _State.of(self, _content(tensors[-1]))
        if state.shape != spec.shape:
            raise OpError(f"{self.name}: quant_state has the shape {list(state.shape)}, not {list(spec.shape)}")
        return _looked_up(self, tensors, state, spec)


_NESTED = 256
"""Blocks that share a nested scale, in what bitsandbytes writes."""


@dataclass(frozen=True)
class _Nf4Run(BandedOp):
    """`nf4_dequant` of a run of whole blocks; the result is flat.

    Args:
        whole: the weight's shape.
        block: elements of a block.
    """

    name = "nf4_dequant"
    joins = True
    whole: tuple[int, ...]
    dtype: str
    block: int

    def infer(self, specs: Specs) -> Specs:
        return (TensorSpec((2 * specs[0].numel,), self.dtype),)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        state, count = _State.of(self, _content(tensors[-1])), spec.numel
        nested = len(tensors) == 6 and tensors[3].numel() > 1
        if (
            state.shape != self.whole
            or (count > self.block != state.block)
            or (nested and state.nested_block != _NESTED)
        ):
            raise OpError(f"{self.name}: quant_state does not belong to {list(self.whole)} in blocks of {self.block}")
        return _looked_up(self, tensors, state, spec)


def _content(tensor: Tensor) -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()


def _looked_up(op: Op, tensors: Tensors, state: _State, spec: TensorSpec) -> Banded:
    """quant_map[code] · absmax."""
    import torch

    (weight, absmax, quant_map, *nested, _), count = tensors, spec.numel
    if nested:
        plain = values_of_bytes(absmax.reshape(1, -1), _book(nested[1]), 8).view(-1)
        absmax = times_grouped(plain, nested[0], state.nested_block).add_(state.offset)
    if absmax.numel() != -(-count // state.block):
        raise OpError(f"{op.name}: {count} elements in blocks of {state.block} have no {absmax.numel()} absmax")
    codes, book, size = weight.contiguous().view(torch.uint8).view(-1), _book(quant_map), state.block

    def band(start: int, stop: int, out: Tensor) -> None:
        last = -(-stop // 2)
        if 2 * last == stop:
            values_of_bytes(codes[start // 2 : last], book, 4, high_first=True, out=out.view(-1))
        else:
            out[:, 0] = values_of_bytes(codes[start // 2 : last], book, 4, high_first=True)[: stop - start]
        times_grouped(out.view(-1), absmax[start // size : -(-stop // size)], size)

    bound = partial(largest, [absmax], [max(map(abs, book))])
    return Banded(op, spec, weight, band, bound, columns=1, step=math.lcm(size, 2))


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


def _rows(spec: TensorSpec) -> TensorSpec:
    """The spec as a matrix of all of its rows."""
    return TensorSpec((math.prod(spec.shape[:-1]), spec.shape[-1]), spec.dtype)


def _parts(op: Op, packed: TensorSpec, more: list[RunsOf], made: TensorSpec, limit: int) -> Iterator[OpPart] | None:
    """The op on some rows of codes, with the scales of these."""
    if not made.numel or packed.dtype == "F4":
        return None
    rows = math.prod(made.shape[:-1])
    codes = RunsOf(TensorSpec((rows, made.shape[-1] // 2), packed.dtype))
    scales = RunsOf(TensorSpec((rows, more[0].spec.numel // rows), more[0].spec.dtype))
    return parts_of_rows(op, [codes, scales, *more[1:]], [RunsOf(_rows(made))], limit)


def _uneven(columns: int, groups: int) -> bool:
    return bool(columns % groups) if groups else columns > 0


def _four_bits(op: Op, spec: TensorSpec, packed: Tensor, scales: Tensor) -> Banded:
    """e2m1(code) · s, with a scale for each group of a row."""
    import torch

    columns = spec.shape[-1]
    codes = packed.contiguous().view(torch.uint8).reshape(-1, columns // 2)
    numbers = scales.reshape(codes.shape[0], -1)
    size = columns // numbers.shape[1] if numbers.shape[1] else 1

    def band(start: int, stop: int, out: Tensor) -> None:
        times_grouped(values_of_bytes(codes[start:stop], E2M1, 4, out=out), numbers[start:stop], size)

    return Banded(op, spec, packed, band, partial(largest, [numbers], [6]))
