"""Weights of integers packed into words: `gptq_dequant`, `awq_dequant`, `packed_dequant`."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ...specs import TensorSpec
from ..base import Op, OpError, OpPart, SourceNote, Specs, Tensors
from ..numerics import specs_of
from ..op_parts import RunsOf, parts_of_rows
from ..operands import arithmetic_float, operands
from ..registry import op as registered
from .bands import Banded, BandedOp, float_dtype, largest, result_dtype
from .code_books import fill_rows, integers, unpacked, values_of_bytes
from .scales import add_grouped, times_grouped

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AwqDequant", "GptqDequant", "PackedDequant"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@registered
@dataclass(frozen=True)
class GptqDequant(BandedOp):
    """Unpack a GPTQ weight and scale it, to [out, in]; sources: qweight, qzeros, scales, and g_idx where it is stored.

    >>> specs = TensorSpec([16, 64], "I32"), TensorSpec([1, 8], "I32"), TensorSpec([1, 64], "F16")
    >>> GptqDequant().infer(specs)
    (TensorSpec(shape=(64, 128), dtype='F16'),)

    W[o, i] = (q[i, o] - z[g, o]) · s[g, o], with g = g_idx[i], or i // (in / groups) without g_idx. Codes of 2, 3, 4
    or 8 bits lie along the inputs in qweight [in · bits / 32, out], along the outputs in qzeros, lowest bits first;
    the bits are read off the shapes. Source: `dequantize_weight` of gptqmodel.

    Args:
        v2: zero points are stored as they are (`checkpoint_format` "gptq_v2"), not less 1.
        dtype: of the result; the scales' where left out.

    Computed in float32 and rounded once. It has no inverse.

    Raises:
        OpError: shapes that do not belong together.
    """

    name = "gptq_dequant"
    joins = True
    v2: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", float_dtype(self, self.dtype))

    def infer(self, specs: Specs) -> Specs:
        names = ("qweight", "qzeros", "scales", "g_idx")[: max(3, min(len(specs), 4))]
        qweight, qzeros, scales, *g_idx = operands(self, specs, *names)
        bits, groups, out = _zeros(self, qzeros, scales)
        inner = qweight.shape[0] * 32 // bits if len(qweight.shape) == 2 else 0
        fits = qweight.dtype == "I32" and qweight.shape[1:] == (out,) and inner * bits == qweight.shape[0] * 32
        if not fits or (g_idx and g_idx[0].shape != (inner,)) or (not g_idx and inner % groups):
            shown = ", ".join(map(str, specs))
            raise OpError(f"{self.name}: qweight [in · {bits} / 32, {out}], qzeros, scales, g_idx [in] are {shown}")
        return (TensorSpec((out, inner), result_dtype(self.dtype, scales)),)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        qweight, qzeros, scales, *g_idx = tensors
        bits, groups, out = _zeros(self, *specs_of(tensors[1:3]))
        zeros = unpacked(qzeros, bits, out)
        if not self.v2:
            zeros = (zeros + 1) & ((1 << bits) - 1)
        if g_idx and not 0 <= int(g_idx[0].min()) <= int(g_idx[0].max()) < groups:
            raise OpError(f"{self.name}: g_idx names groups outside the range of {groups}")
        mixed = bool(g_idx) and not _in_order(g_idx[0], groups)
        if mixed or bits == 3:
            by_row = g_idx[0].long() if mixed else None
            turned = _Turned(qweight, bits, scales.float(), zeros.float(), by_row)
            return Banded(self, spec, qweight, turned.band, turned.bound)
        packed = _Packed(qweight.t(), bits, scales.t().float(), zeros.t().float())
        return Banded(self, spec, qweight, packed.band, packed.bound)


@registered
@dataclass(frozen=True)
class AwqDequant(BandedOp):
    """Unpack an AWQ weight and scale it, to [out, in]; sources: qweight, qzeros, scales.

    >>> specs = TensorSpec([128, 8], "I32"), TensorSpec([1, 8], "I32"), TensorSpec([1, 64], "F16")
    >>> AwqDequant().infer(specs)
    (TensorSpec(shape=(64, 128), dtype='F16'),)

    W[o, i] = (q[i, o] - z[g, o]) · s[g, o], with g = i // (in / groups). Eight codes of 4 bits lie along the outputs
    in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7. Source: `dequantize_gemm` of AutoAWQ (version "gemm").

    Args:
        dtype: of the result; the scales' where left out.

    Computed in float32 and rounded once. It has no inverse.

    Raises:
        OpError: shapes that do not belong together.
    """

    name = "awq_dequant"
    joins = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", float_dtype(self, self.dtype))

    def infer(self, specs: Specs) -> Specs:
        qweight, qzeros, scales = operands(self, specs, "qweight", "qzeros", "scales")
        bits, groups, out = _zeros(self, qzeros, scales)
        inner = qweight.shape[0] if qweight.shape else 0
        if bits != 4 or qweight.dtype != "I32" or qweight.shape != (inner, out // 8) or inner % groups:
            shown = f"{qweight}, {qzeros}, {scales}"
            raise OpError(f"{self.name}: qweight [in, {out} / 8], qzeros, scales [groups, {out}] of 4 bits are {shown}")
        return (TensorSpec((out, inner), result_dtype(self.dtype, scales)),)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        qweight, qzeros, scales = tensors
        words, size = qweight.t().contiguous(), spec.shape[1] // max(scales.shape[0], 1)
        zeros, factors = qzeros.t().contiguous(), scales.t().float()

        def band(start: int, stop: int, out: Tensor) -> None:
            fill_rows(out, words[start // 8 : stop // 8], 4, _AWQ_ORDER)
            add_grouped(out, fill_rows(None, zeros[start // 8 : stop // 8], 4, _AWQ_ORDER), size, -1)
            times_grouped(out, factors[start:stop], size)

        return Banded(self, spec, qweight, band, partial(largest, [factors], [15]), step=8)


@registered
@dataclass(frozen=True)
class PackedDequant(BandedOp):
    """Unpack integers of 1 to 8 bits and scale them; sources: packed, scale, zero_point where stored, shape.

    >>> specs = TensorSpec([64, 16], "I32"), TensorSpec([64, 1], "BF16"), TensorSpec([2], "I64")
    >>> PackedDequant(columns=128).infer(specs)
    (TensorSpec(shape=(64, 128), dtype='BF16'),)

    W = (q - z) · s, with a scale and a zero point for each group along a row. Codes lie in words without gaps, lowest
    bits first, and stand for -2 ** (bits - 1) and up. Source: compressed-tensors (`pack-quantized`: `weight_packed`,
    `weight_scale`, `weight_zero_point`, `weight_shape`).

    Args:
        columns: of the weight. Left out, planning reads them from the source shape, two numbers.
        bits: of a code; left out, they follow from columns and words.
        dtype: of the result; the scale's where left out.

    Computed in float32 and rounded once. It has no inverse.

    Raises:
        OpError: shapes that do not belong together; a stored shape that is another one.
    """

    name = "packed_dequant"
    joins = True
    reads_ahead = (-1,)
    columns: int | None = None
    bits: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", float_dtype(self, self.dtype))
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise OpError(f"{self.name} knows codes of 1 to 8 bits, not {self.bits}")

    def told(self, notes: Sequence[SourceNote]) -> Op:
        if self.columns is not None:
            return self
        content = notes[0].content or b""
        if not content or len(content) % 8:
            raise OpError(f"{self.name}: the last source, shape, is not a list of I64")
        return replace(self, columns=struct.unpack(f"<{len(content) // 8}q", content)[-1])

    def infer(self, specs: Specs) -> Specs:
        names = ("packed", "scale", "zero_point", "shape") if len(specs) == 4 else ("packed", "scale", "shape")
        packed, scale, *zero, shape = operands(self, specs, *names)
        arithmetic_float(self, scale, "scale")
        if packed.dtype != "I32" or len(packed.shape) < 2 or scale.shape[:-1] != packed.shape[:-1]:
            raise OpError(f"{self.name} wants packed I32 [rows, words] and scale [rows, groups], not {packed}, {scale}")
        if shape.dtype != "I64" or shape.shape != (len(packed.shape),):
            raise OpError(f"{self.name}: the last source, shape, is I64 [{len(packed.shape)}], not {shape}")
        columns, bits = self._columns_and_bits(packed)
        if scale.shape[-1] < 1 or columns % scale.shape[-1]:
            raise OpError(f"{self.name}: scale {scale} does not divide {columns} columns")
        *leading, rows, groups = scale.shape
        if zero and (zero[0].shape != (*leading, -(-rows * bits // 32), groups) or zero[0].dtype != "I32"):
            raise OpError(f"{self.name}: beside scale {scale}, zero_point of {bits} bits is not {zero[0]}")
        return (TensorSpec((*packed.shape[:-1], columns), result_dtype(self.dtype, scale)),)

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        (made,), (packed, scale, *zero, shape) = self.infer(specs), specs
        columns, bits = self._columns_and_bits(packed)
        rows = math.prod(packed.shape[:-1])
        # Zero points are packed along the rows of each matrix, 32 rows in whole words.
        if not made.numel or (zero and rows != packed.shape[-2] and packed.shape[-2] % 32):
            return None
        step = 32 if zero else 1
        sources = [RunsOf(TensorSpec((rows, spec.shape[-1]), spec.dtype), step) for spec in (packed, scale)]
        words = (TensorSpec((math.prod(spec.shape[:-1]), spec.shape[-1]), spec.dtype) for spec in zero)
        sources += [*(RunsOf(spec, bits) for spec in words), RunsOf(shape, None)]
        result = RunsOf(TensorSpec((rows, columns), made.dtype), step)
        return parts_of_rows(_PackedRun(columns, bits, made.dtype, made.shape), sources, [result], limit)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        return self._unpacked(tensors, spec, spec.shape)

    def _unpacked(self, tensors: Tensors, spec: TensorSpec, whole: tuple[int, ...]) -> Banded:
        import torch

        packed, scale, *zero, shape = tensors
        if tuple(shape.tolist()) != whole:
            raise OpError(f"{self.name}: the stored shape is {shape.tolist()}, and the weight is {list(whole)}")
        _, bits = self._columns_and_bits(specs_of(tensors)[0])
        rows, groups = scale.shape[-2:]
        zeros = None
        if zero:
            each = [unpacked(z.t(), bits, rows).t() for z in zero[0].reshape(-1, *zero[0].shape[-2:])]
            zeros = torch.cat(each).float().sub_(1 << (bits - 1))
        words = packed.reshape(-1, packed.shape[-1])
        work = _Packed(words, bits, scale.reshape(-1, groups).float(), zeros, 1 << (bits - 1))
        return Banded(self, spec, packed, work.band, work.bound)

    def _columns_and_bits(self, packed: TensorSpec) -> tuple[int, int]:
        if self.columns is None:
            raise OpError(f"{self.name} cannot read the source shape here; say columns, and bits where they are not 4")
        words = packed.shape[-1]
        fitting = [bits for bits in range(1, 9) if -(-self.columns * bits // 32) == words]
        bits = self.bits or (fitting[0] if len(fitting) == 1 else 0)
        if bits not in fitting:
            many = f"codes of {fitting[0]} to {fitting[-1]} bits" if fitting else "no codes of 1 to 8 bits"
            raise OpError(f"{self.name}: {self.columns} columns in {words} words are {many}; say bits")
        return self.columns, bits


@dataclass(frozen=True)
class _PackedRun(PackedDequant):
    """`packed_dequant` of some rows of a weight.

    Args:
        whole: the weight's shape.
    """

    whole: tuple[int, ...] = ()

    def infer(self, specs: Specs) -> Specs:
        return (TensorSpec((specs[0].shape[0], self.columns or 0), self.dtype or "F32"),)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        return self._unpacked(tensors, spec, self.whole)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Rows of packed codes, with scales and zero points [rows, groups]."""

    words: Tensor
    bits: int
    scales: Tensor
    zeros: Tensor | None = None
    offset: int = 0

    def bound(self) -> float:
        """Return a bound of all magnitudes."""
        return largest([self.scales], [1 << self.bits])

    def band(self, start: int, stop: int, out: Tensor) -> None:
        """Fill with (q - z) · s of some rows."""
        import torch

        words, columns = self.words[start:stop].contiguous(), out.shape[1]
        if self.bits == 8 and columns % 4 == 0:
            out.copy_(words.view(torch.uint8))
            if self.offset:
                out.sub_(self.offset)
        elif 8 % self.bits or columns * self.bits % 32:
            out.copy_(unpacked(words, self.bits, columns)).sub_(self.offset)
        else:
            values_of_bytes(words.view(torch.uint8), integers(self.bits, self.offset), self.bits, out=out)
        scales = self.scales[start:stop]
        zeros = self.zeros[start:stop] if self.zeros is not None else None
        size = columns // scales.shape[1]
        if zeros is not None:
            add_grouped(out, zeros, size, -1)
        times_grouped(out, scales, size)


@dataclass(frozen=True, slots=True)
class _Turned:
    """Columns of codes packed along the first axis, which become rows; scales and zero points [groups, columns].

    Args:
        by_row: the group of each row of codes; runs of equal size where there is none.
    """

    words: Tensor
    bits: int
    scales: Tensor
    zeros: Tensor
    by_row: Tensor | None

    def bound(self) -> float:
        """Return a bound of all magnitudes."""
        return largest([self.scales], [1 << self.bits])

    def band(self, start: int, stop: int, out: Tensor) -> None:
        """Fill with (q - z) · s of some columns."""
        import torch

        scales, zeros = self.scales[:, start:stop].contiguous(), self.zeros[:, start:stop].contiguous()
        codes = torch.empty(out.shape[1], out.shape[0], dtype=torch.float32, device=out.device)
        fill_rows(codes, self.words[:, start:stop].contiguous(), self.bits, tuple(range(32 // math.gcd(self.bits, 32))))
        if self.by_row is not None:
            codes.sub_(zeros.index_select(0, self.by_row)).mul_(scales.index_select(0, self.by_row))
        else:
            codes.view(len(scales), -1, out.shape[0]).sub_(zeros[:, None]).mul_(scales[:, None])
        out.copy_(codes.t())


def _zeros(op: Op, qzeros: TensorSpec, scales: TensorSpec) -> tuple[int, int, int]:
    """Bits, groups and outputs, off qzeros [groups, out · bits / 32] and scales [groups, out]."""
    arithmetic_float(op, scales, "scales")
    if len(scales.shape) == 2 and len(qzeros.shape) == 2 and qzeros.shape[0] == scales.shape[0] > 0 < scales.shape[1]:
        groups, out = scales.shape
        bits, rest = divmod(qzeros.shape[1] * 32, out)
        if not rest and bits in (2, 3, 4, 8) and qzeros.dtype == "I32":
            return bits, groups, out
    raise OpError(f"{op.name}: qzeros I32 [groups, out · bits / 32] do not belong to scales: {qzeros}, {scales}")


def _in_order(g_idx: Tensor, groups: int) -> bool:
    """Whether each group is a run of as many inputs as the others."""
    import torch

    count = g_idx.numel()
    if count % groups:
        return False
    return bool(torch.equal(g_idx.long(), torch.arange(count, device=g_idx.device) // max(count // groups, 1)))
