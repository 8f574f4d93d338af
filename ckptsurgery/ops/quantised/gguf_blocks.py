"""Blocks of ggml's types to floats: `gguf_dequant`.

A type is a row of a table: where its block has codes, scales and minima, and of how many bits they are. Source of the
layouts: `ggml-common.h` and `ggml-quants.c` of ggml; `gguf.quants` of the gguf package computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...specs import TensorSpec
from ..base import Op, OpError, SourceNote, Specs, Tensors
from ..numerics import specs_of
from ..operands import operands
from ..registry import op as registered
from .bands import blank, float_dtype, in_bands
from .code_books import planes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BLOCK_SIZES", "GgufDequant"]

BLOCK_SIZES: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17),
}  # fmt: skip
"""Name of a type that is read here -> elements and bytes of a block."""


@registered
@dataclass(frozen=True)
class GgufDequant(Op):
    """Turn the blocks of a GGUF tensor into floats.

    >>> GgufDequant("Q4_K", "bf16").infer((TensorSpec([8, 288], "U8"),))
    (TensorSpec(shape=(8, 512), dtype='BF16'),)

    A tensor of blocks is U8 [..., bytes], and becomes [..., elements]. W = d · q + m, where a block, or a part of it
    with 6-bit scales of its own, has d and m. Types: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS,
    TQ1_0, TQ2_0, MXFP4. Tensors of plain numbers pass as they are. Source: `gguf.quants`.

    Args:
        type: of the blocks. Left out, planning has it from the header of the GGUF file.
        dtype: of the result.

    Computed in float32 and rounded once. It has no inverse; `gguf_quant` makes Q8_0.

    Raises:
        OpError: bytes that are not whole blocks; a type that is not known, here or in a file without types.
    """

    name = "gguf_dequant"
    reads_ahead = (0,)
    type: str | None = None
    dtype: str = "F32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", float_dtype(self, self.dtype))
        if self.type is not None and self.type not in BLOCK_SIZES:
            raise OpError(f"{self.name} reads blocks of {', '.join(BLOCK_SIZES)}, not of {self.type}")

    def told(self, notes: Sequence[SourceNote]) -> Op:
        return replace(self, type=self.type or notes[0].packing)

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one tensor")
        if spec.dtype != "U8":
            return specs
        if self.type is None:
            raise OpError(f"{self.name}: the type of the blocks of {spec} is not known here; say type=Q4_K")
        elements, nbytes = BLOCK_SIZES[self.type]
        if not spec.shape or spec.shape[-1] % nbytes:
            raise OpError(f"{self.name}: {spec} is not made of blocks of {nbytes} bytes, {self.type}")
        return (TensorSpec((*spec.shape[:-1], spec.shape[-1] // nbytes * elements), self.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (before,), (spec,) = specs_of(tensors), self.infer(specs_of(tensors))
        if before.dtype != "U8" or self.type is None:
            return tensors
        made = blank(spec, tensors[0])
        if made is not None:
            return (made,)
        elements, nbytes = BLOCK_SIZES[self.type]
        blocks, read = tensors[0].contiguous().view(-1, nbytes), _READ[self.type]
        flat = TensorSpec((blocks.shape[0], elements), spec.dtype)
        return (in_bands(self, flat, blocks, lambda a, b: read(blocks[a:b])).view(spec.shape),)


@dataclass(frozen=True, slots=True)
class _Simple:
    """A block of 32 with one scale, perhaps a minimum, low bits, and a fifth bit apart.

    Args:
        minimum: where its two bytes begin. high: where four bytes of fifth bits begin. codes: where the others do.
        offset: taken from each code.
    """

    codes: int
    offset: int = 0
    minimum: int | None = None
    high: int | None = None

    def __call__(self, blocks: Tensor) -> Tensor:
        import torch

        codes = planes(blocks[:, self.codes :], 4, 16)
        if self.high is not None:
            codes |= planes(blocks[:, self.high : self.high + 4], 1, 1) << 4
        values = codes.to(torch.float32).sub_(self.offset).mul_(_half(blocks, 0))
        return values if self.minimum is None else values.add_(_half(blocks, self.minimum))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, in float32 [blocks, 1]."""
    import torch

    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def _parts(codes: Tensor, size: int, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """scale · code - minimum, by parts of `size` elements; scales and minima are float32 [blocks, parts]."""
    import torch

    values = codes.to(torch.float32).view(codes.shape[0], -1, size).mul_(scales[..., None])
    return (values if minima is None else values.sub_(minima[..., None])).view(codes.shape[0], -1)


def _signed(codes: Tensor, offset: int) -> Tensor:
    """uint8 codes less an offset, as int8."""
    import torch

    return (codes - offset).view(torch.int8)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes, as float32 [blocks, 8] each."""
    import torch

    first, second, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (both & 15) | (first >> 2 & 48)], -1)
    minima = torch.cat([second & 63, (both >> 4) | (second >> 2 & 48)], -1)
    return scales.to(torch.float32), minima.to(torch.float32)


def _q8_0(blocks: Tensor) -> Tensor:
    import torch

    return blocks[:, 2:].view(torch.int8).to(torch.float32).mul_(_half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    import torch

    packed = blocks[:, :16]
    scales, minima = ((part.to(torch.float32)) for part in (packed & 15, packed >> 4))
    return _parts(planes(blocks[:, 16:80], 2, 32), 16, _half(blocks, 80) * scales, _half(blocks, 82) * minima)


def _q3_k(blocks: Tensor) -> Tensor:
    import torch

    low, high = planes(blocks[:, 96:104], 4, 8), planes(blocks[:, 104:108], 2, 4)
    scales = _signed(low | (high << 4), 32).to(torch.float32)
    # The offset of 4 is taken where the third bit is not set.
    codes = _signed(planes(blocks[:, 32:96], 2, 32) | (planes(blocks[:, :32], 1, 32) << 2), 4)
    return _parts(codes, 16, _half(blocks, 108) * scales)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    return _parts(planes(blocks[:, 16:], 4, 32), 32, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = planes(blocks[:, 48:], 4, 32) | (planes(blocks[:, 16:48], 1, 32) << 4)
    return _parts(codes, 32, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Tensor:
    import torch

    codes = planes(blocks[:, :128], 4, 64) | (planes(blocks[:, 128:192], 2, 32) << 4)
    scales = blocks[:, 192:208].view(torch.int8).to(torch.float32)
    return _parts(_signed(codes, 32), 16, _half(blocks, 208) * scales)


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _looked_up(codes: Tensor, book: tuple[int, ...]) -> Tensor:
    import torch

    table = torch.tensor(book, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _looked_up(planes(blocks[:, 2:], 4, 16), _IQ4).mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    import torch

    # The low bits of the scales are in order, two a byte; the high bits are four a byte.
    low, high = planes(blocks[:, 4:8], 4, 1), planes(blocks[:, 2:4], 2, 1)
    scales = _signed(low | (high << 4), 32).to(torch.float32)
    return _parts(_looked_up(planes(blocks[:, 8:], 4, 16), _IQ4), 32, _half(blocks, 0) * scales)


def _tq1_0(blocks: Tensor) -> Tensor:
    import torch

    # A byte is five digits of base 3 as a fraction of 256: three times the fraction has the first before the point.
    parts = []
    for packed, digits in ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)):
        powers = torch.tensor([3**n for n in range(digits)], dtype=torch.uint8, device=blocks.device)
        parts.append((packed[:, None, :] * powers[:, None]).flatten(1))
    codes = ((torch.cat(parts, 1).to(torch.int16) * 3) >> 8) - 1
    return codes.to(torch.float32).mul_(_half(blocks, 52))


def _tq2_0(blocks: Tensor) -> Tensor:
    import torch

    return _signed(planes(blocks[:, :64], 2, 32), 1).to(torch.float32).mul_(_half(blocks, 64))


def _mxfp4(blocks: Tensor) -> Tensor:
    import torch

    # Half of 2 ** (e - 127), as the code book holds doubled values; the bits of float32 below the normal range.
    exponent = blocks[:, :1].to(torch.int32)
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return _looked_up(planes(blocks[:, 1:], 4, 16), _E2M1_DOUBLED).mul_(bits.view(torch.float32))


_READ: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _Simple(2, offset=8),
    "Q4_1": _Simple(4, minimum=2),
    "Q5_0": _Simple(6, offset=16, high=2),
    "Q5_1": _Simple(8, minimum=2, high=4),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
}
