"""Blocks of ggml's types to floats: `gguf_dequant`.

A type is a row of a table: where its block has codes, scales and minima, and of how many bits they are. Source of the
layouts: `ggml-common.h` and `ggml-quants.c` of ggml; `gguf.quants` of the gguf package computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...specs import TensorSpec
from ..base import Op, OpError, OpPart, SourceNote, Specs, Tensors
from ..numerics import specs_of
from ..op_parts import RunsOf, parts_of_rows
from ..operands import operands
from ..registry import op as registered
from .bands import blank, float_dtype, in_bands, largest
from .code_books import pairs_of_bytes, planes

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Blocks = np.ndarray[Any, Any]
    Bytes = np.ndarray[Any, Any]

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

    def parts(self, specs: Specs, limit: int) -> Iterator[OpPart] | None:
        (spec,), (made,) = specs, self.infer(specs)
        if spec.dtype != "U8" or self.type is None:
            return None
        elements, nbytes = BLOCK_SIZES[self.type]
        count = spec.numel // nbytes
        blocks = RunsOf(TensorSpec((count, nbytes), "U8"))
        return parts_of_rows(self, [blocks], [RunsOf(TensorSpec((count, elements), made.dtype))], limit)

    def run(self, tensors: Tensors) -> Tensors:
        (before,), (spec,) = specs_of(tensors), self.infer(specs_of(tensors))
        if before.dtype != "U8" or self.type is None:
            return tensors
        made = blank(spec, tensors[0])
        if made is not None:
            return (made,)
        elements, _ = BLOCK_SIZES[self.type]
        blocks, read = blocks_of(tensors[0].cpu(), self.type), _READ[self.type]
        flat = TensorSpec((len(blocks), elements), spec.dtype)
        made = in_bands(self, flat, tensors[0].cpu(), lambda a, b, out: read(blocks[a:b], out))
        return (made.view(spec.shape).to(tensors[0].device),)


_FIELDS: Mapping[str, Sequence[tuple[str, int]]] = {
    "Q4_0": (("d", 2), ("codes", 16)),
    "Q4_1": (("d", 2), ("m", 2), ("codes", 16)),
    "Q5_0": (("d", 2), ("high", 4), ("codes", 16)),
    "Q5_1": (("d", 2), ("m", 2), ("high", 4), ("codes", 16)),
    "Q8_0": (("d", 2), ("codes", 32)),
    "Q2_K": (("scales", 16), ("codes", 64), ("d", 2), ("m", 2)),
    "Q3_K": (("high", 32), ("codes", 64), ("scales", 8), ("scales_high", 4), ("d", 2)),
    "Q4_K": (("d", 2), ("m", 2), ("scales", 12), ("codes", 128)),
    "Q5_K": (("d", 2), ("m", 2), ("scales", 12), ("high", 32), ("codes", 128)),
    "Q6_K": (("codes", 128), ("high", 64), ("scales", 16), ("d", 2)),
    "IQ4_NL": (("d", 2), ("codes", 16)),
    "IQ4_XS": (("d", 2), ("scales_high", 2), ("scales", 4), ("codes", 128)),
    "TQ1_0": (("codes", 32), ("more", 16), ("last", 4), ("d", 2)),
    "TQ2_0": (("codes", 64), ("d", 2)),
    "MXFP4": (("exponent", 1), ("codes", 16)),
}
"""Name of a type -> the fields of its block in order, each with its bytes; `d` and `m` are float16."""


def blocks_of(tensor: Tensor, type: str) -> Blocks:
    """Return the blocks of a tensor on the CPU, as records."""
    import numpy as np

    record = np.dtype([(name, "<f2" if name in "dm" else f"V{size}") for name, size in _FIELDS[type]])
    return tensor.contiguous().numpy().reshape(-1).view(record)


def _bytes(blocks: Blocks, field: str) -> Bytes:
    """The bytes of a field, [blocks, bytes]; records are copied field by field faster than as slices of bytes."""
    return blocks[field].copy().view("u1").reshape(len(blocks), -1)


def _half(blocks: Blocks, field: str = "d") -> Tensor:
    """A float16 of each block, in float32 [blocks, 1]."""
    import torch

    return torch.from_numpy(blocks[field].astype("f4")[:, None])


def _codes(blocks: Blocks, bits: int, run: int, field: str = "codes") -> Bytes:
    return planes(_bytes(blocks, field), bits, run)


def _fill(out: Tensor, codes: Bytes, offset: int = 0) -> Tensor:
    """Fill with codes less an offset, in float32."""
    import torch

    if offset:
        codes -= offset
    return out.copy_(torch.from_numpy(codes.view("i1")))


def _times(out: Tensor, largest_code: int, scales: Tensor, minima: Tensor | None = None) -> float:
    """Turn codes into scale · code - minimum, by parts of equal size; returns a bound of the result.

    Args:
        scales, minima: float32 [blocks, parts].
    """
    parts = out.view(out.shape[0], scales.shape[1], -1).mul_(scales[..., None])
    if minima is None:
        return largest([scales], [largest_code])
    parts.sub_(minima[..., None])
    return largest([scales, minima], [largest_code, 1])


def _numbers(codes: Bytes, offset: int = 0) -> Tensor:
    """Integers of 8 bits, less an offset, in float32."""
    import torch

    return torch.from_numpy(((codes - offset) if offset else codes).view("i1")).to(torch.float32)


@dataclass(frozen=True, slots=True)
class _Simple:
    """A block of 32 with one scale, perhaps a minimum, low bits, and perhaps a fifth bit apart."""

    offset: int = 0

    def __call__(self, blocks: Blocks, out: Tensor) -> float:
        fields, codes = blocks.dtype.names or (), _codes(blocks, 4, 16)
        if "high" in fields:
            import numpy as np

            bits = np.unpackbits(_bytes(blocks, "high"), axis=1, bitorder="little")
            codes |= bits << 4
        scales = _half(blocks)
        _fill(out, codes, self.offset).mul_(scales)
        if "m" not in fields:
            return largest([scales], [32])
        minima = _half(blocks, "m")
        out.add_(minima)
        return largest([scales, minima], [32, 1])


def _q8_0(blocks: Blocks, out: Tensor) -> float:
    return _times(_fill(out, _bytes(blocks, "codes")), 128, _half(blocks))


def _q2_k(blocks: Blocks, out: Tensor) -> float:
    packed = _bytes(blocks, "scales")
    scales, minima = _numbers(packed & 15), _numbers(packed >> 4)
    return _times(_fill(out, _codes(blocks, 2, 32)), 3, _half(blocks) * scales, _half(blocks, "m") * minima)


def _q3_k(blocks: Blocks, out: Tensor) -> float:
    scales = _codes(blocks, 4, 8, "scales") | _codes(blocks, 2, 4, "scales_high") << 4
    # The offset of 4 is taken where the third bit is not set.
    codes = _codes(blocks, 2, 32) | _codes(blocks, 1, 32, "high") << 2
    return _times(_fill(out, codes, 4), 4, _half(blocks) * _numbers(scales, 32))


def _six_bits(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes, times those of the block, as float32 [blocks, 8] each."""
    import numpy as np

    # A word holds four numbers, so shifts and masks take four at a time.
    words = _bytes(blocks, "scales").view("<u4")
    numbers = np.empty((2, len(words), 2), "<u4")
    for n in (0, 1):
        numbers[n, :, 0] = words[:, n] & 0x3F3F3F3F
        numbers[n, :, 1] = (words[:, 2] >> 4 * n & 0x0F0F0F0F) | (words[:, n] >> 2 & 0x30303030)
    scales, minima = numbers.view("u1")
    return _half(blocks) * _numbers(scales), _half(blocks, "m") * _numbers(minima)


def _q4_k(blocks: Blocks, out: Tensor) -> float:
    return _times(_fill(out, _codes(blocks, 4, 32)), 15, *_six_bits(blocks))


def _q5_k(blocks: Blocks, out: Tensor) -> float:
    codes = _codes(blocks, 4, 32) | _codes(blocks, 1, 32, "high") << 4
    return _times(_fill(out, codes), 31, *_six_bits(blocks))


def _q6_k(blocks: Blocks, out: Tensor) -> float:
    codes = _codes(blocks, 4, 64) | _codes(blocks, 2, 32, "high") << 4
    return _times(_fill(out, codes, 32), 32, _half(blocks) * _numbers(_bytes(blocks, "scales")))


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _looked_up(blocks: Blocks, book: tuple[int, ...]) -> Bytes:
    """The entries of a code book that 4-bit codes name, in runs of 16."""
    import numpy as np

    pairs = pairs_of_bytes(_bytes(blocks, "codes"), book)
    found, item = np.empty((len(blocks), pairs.shape[1] // 16, 2, 16), "u1"), np.dtype("V16")
    for n in (0, 1):
        found.view(item)[:, :, n, 0] = (pairs >> 8 * n).astype("u1").view(item)
    return found.reshape(len(blocks), -1)


def _iq4_nl(blocks: Blocks, out: Tensor) -> float:
    return _times(_fill(out, _looked_up(blocks, _IQ4)), 127, _half(blocks))


def _iq4_xs(blocks: Blocks, out: Tensor) -> float:
    # The low bits of the scales are in order, two a byte; the high bits are four a byte.
    scales = _codes(blocks, 4, 1, "scales") | _codes(blocks, 2, 1, "scales_high") << 4
    return _times(_fill(out, _looked_up(blocks, _IQ4)), 127, _half(blocks) * _numbers(scales, 32))


def _tq1_0(blocks: Blocks, out: Tensor) -> float:
    import numpy as np

    codes, at = np.empty((len(blocks), 256), "u1"), 0
    for field, digits in (("codes", 5), ("more", 5), ("last", 4)):
        # A byte is digits of base 3 as a fraction of 256. The first is 1 from a third of 256 on, 2 from two thirds on.
        rest = _bytes(blocks, field)
        for _ in range(digits):
            np.add(rest >= 86, rest >= 171, out=codes[:, at : at + rest.shape[1]], dtype="u1", casting="unsafe")
            at += rest.shape[1]
            rest *= 3
    return _times(_fill(out, codes, 1), 1, _half(blocks))


def _tq2_0(blocks: Blocks, out: Tensor) -> float:
    return _times(_fill(out, _codes(blocks, 2, 32), 1), 2, _half(blocks))


def _mxfp4(blocks: Blocks, out: Tensor) -> float:
    import numpy as np
    import torch

    # Half of 2 ** (e - 127), as the code book holds doubled values; the bits of float32 below the normal range.
    exponent = _bytes(blocks, "exponent").astype("u4")
    bits = np.where(exponent < 2, 0x00200000 << np.minimum(exponent, 1), (exponent - 1) << 23)
    scales = torch.from_numpy(bits.astype("u4").view("f4"))
    return _times(_fill(out, _looked_up(blocks, _E2M1_DOUBLED)), 12, scales)


_READ: Mapping[str, Callable[[Blocks, Tensor], float]] = {
    "Q4_0": _Simple(8),
    "Q4_1": _Simple(),
    "Q5_0": _Simple(16),
    "Q5_1": _Simple(),
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
