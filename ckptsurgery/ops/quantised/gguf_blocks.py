"""Blocks of ggml's types to floats: `gguf_dequant`.

A type is a row of a table: where its block has codes, scales and minima, and of how many bits they are. Source of the
layouts: `ggml-common.h` and `ggml-quants.c` of ggml; `gguf.quants` of the gguf package computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ...specs import TensorSpec
from ..base import Op, OpError, OpPart, SourceNote, Specs, Tensors
from ..numerics import specs_of
from ..op_parts import RunsOf, parts_of_rows
from ..operands import operands
from ..registry import op as registered
from .bands import Banded, BandedOp, float_dtype, largest
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
class GgufDequant(BandedOp):
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

    def run_into(self, tensors: Tensors, rooms: Sequence[Tensor | None]) -> Tensors:
        if specs_of(tensors) == self.infer(specs_of(tensors)):
            return tensors
        (made,) = super().run_into(tensors, rooms)
        return (made.to(tensors[0].device),)

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        on_host = tensors[0].cpu()
        return _READ[self.type or ""].banded(self, spec, blocks_of(on_host, self.type or ""), on_host)


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


def _numbers(codes: Bytes, offset: int = 0) -> Tensor:
    """Integers of 8 bits, less an offset, in float32."""
    import torch

    return torch.from_numpy(((codes - offset) if offset else codes).view("i1")).to(torch.float32)


Scales = tuple["Tensor", "Tensor | None"]
"""Scales of the parts of each block, and what is added to or taken from them; float32 [blocks, parts]."""


@dataclass(frozen=True, slots=True)
class _GgmlType:
    """How the blocks of a type are read: W = scale · (code - offset) - minimum, by parts of equal size.

    Args:
        codes: returns the codes of some blocks, [blocks, elements].
        scales: returns the scales of blocks, and the minima where the type has them. It is called once for all
            blocks of a run, since a call costs more than the numbers.
        offset: a number, which is taken from each code.
        largest: the largest magnitude of a code less the offset.
        adds: whether minima are added, as the oldest types have it.
    """

    codes: Callable[[Blocks], Bytes]
    scales: Callable[[Blocks], Scales]
    largest: int
    offset: int = 0
    adds: bool = False

    def banded(self, op: Op, spec: TensorSpec, blocks: Blocks, like: Tensor) -> Banded:
        """Return how the floats of blocks are made."""
        import torch

        scales, minima = self.scales(blocks)

        def band(start: int, stop: int, out: Tensor) -> None:
            codes = self.codes(blocks[start:stop])
            if self.offset:
                codes -= self.offset
            out.copy_(torch.from_numpy(codes.view("i1")))
            parts = out.view(stop - start, scales.shape[1], -1).mul_(scales[start:stop, :, None])
            if minima is not None:
                parts.add_(minima[start:stop, :, None]) if self.adds else parts.sub_(minima[start:stop, :, None])

        def bound() -> float:
            return largest([scales, *(() if minima is None else (minima,))], [self.largest, 1])

        return Banded(op, spec, like, band, bound, columns=spec.numel // len(blocks))


def _one(blocks: Blocks) -> Scales:
    return _half(blocks), None


def _one_and_minimum(blocks: Blocks) -> Scales:
    return _half(blocks), _half(blocks, "m")


def _five_bits(blocks: Blocks) -> Bytes:
    """Four low bits, and a fifth one apart."""
    import numpy as np

    high = np.unpackbits(_bytes(blocks, "high"), axis=1, bitorder="little")
    high <<= 4
    high |= _codes(blocks, 4, 16)
    return high


def _q2_k_scales(blocks: Blocks) -> Scales:
    packed = _bytes(blocks, "scales")
    return _half(blocks) * _numbers(packed & 15), _half(blocks, "m") * _numbers(packed >> 4)


def _q3_k_scales(blocks: Blocks) -> Scales:
    scales = _codes(blocks, 4, 8, "scales") | _codes(blocks, 2, 4, "scales_high") << 4
    return _half(blocks) * _numbers(scales, 32), None


def _six_bits(blocks: Blocks) -> Scales:
    """Eight scales and eight minima of 6 bits in 12 bytes, times those of the block."""
    import numpy as np

    # A word holds four numbers, so shifts and masks take four at a time.
    words = _bytes(blocks, "scales").view("<u4")
    numbers = np.empty((2, len(words), 2), "<u4")
    for n in (0, 1):
        numbers[n, :, 0] = words[:, n] & 0x3F3F3F3F
        numbers[n, :, 1] = (words[:, 2] >> 4 * n & 0x0F0F0F0F) | (words[:, n] >> 2 & 0x30303030)
    scales, minima = numbers.view("u1")
    return _half(blocks) * _numbers(scales), _half(blocks, "m") * _numbers(minima)


def _q6_k_scales(blocks: Blocks) -> Scales:
    return _half(blocks) * _numbers(_bytes(blocks, "scales")), None


def _iq4_xs_scales(blocks: Blocks) -> Scales:
    # The low bits of the scales are in order, two a byte; the high bits are four a byte.
    scales = _codes(blocks, 4, 1, "scales") | _codes(blocks, 2, 1, "scales_high") << 4
    return _half(blocks) * _numbers(scales, 32), None


def _mxfp4_scales(blocks: Blocks) -> Scales:
    import numpy as np
    import torch

    # Half of 2 ** (e - 127), as the code book holds doubled values; the bits of float32 below the normal range.
    exponent = _bytes(blocks, "exponent").astype("u4")
    bits = np.where(exponent < 2, 0x00200000 << np.minimum(exponent, 1), (exponent - 1) << 23)
    return torch.from_numpy(bits.astype("u4").view("f4")), None


def _with_high(blocks: Blocks, bits: int, run: int, high_bits: int) -> Bytes:
    """Codes whose high bits are apart, in runs of 32 bytes."""
    high = _codes(blocks, high_bits, 32, "high")
    high <<= bits
    high |= _codes(blocks, bits, run)
    return high


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


def _ternary(blocks: Blocks) -> Bytes:
    import numpy as np

    codes, at = np.empty((len(blocks), 256), "u1"), 0
    for field, digits in (("codes", 5), ("more", 5), ("last", 4)):
        # A byte is digits of base 3 as a fraction of 256. The first is 1 from a third of 256 on, 2 from two thirds on.
        rest = _bytes(blocks, field)
        for _ in range(digits):
            np.add(rest >= 86, rest >= 171, out=codes[:, at : at + rest.shape[1]], dtype="u1", casting="unsafe")
            at += rest.shape[1]
            rest *= 3
    return codes


_NIBBLES = partial(_codes, bits=4, run=16)
_CRUMBS = partial(_codes, bits=2, run=32)

_READ: Mapping[str, _GgmlType] = {
    "Q4_0": _GgmlType(_NIBBLES, _one, 8, offset=8),
    "Q4_1": _GgmlType(_NIBBLES, _one_and_minimum, 15, adds=True),
    "Q5_0": _GgmlType(_five_bits, _one, 16, offset=16),
    "Q5_1": _GgmlType(_five_bits, _one_and_minimum, 31, adds=True),
    "Q8_0": _GgmlType(partial(_bytes, field="codes"), _one, 128),
    "Q2_K": _GgmlType(_CRUMBS, _q2_k_scales, 3),
    # The offset of 4 is taken where the third bit is not set.
    "Q3_K": _GgmlType(partial(_with_high, bits=2, run=32, high_bits=1), _q3_k_scales, 4, offset=4),
    "Q4_K": _GgmlType(partial(_codes, bits=4, run=32), _six_bits, 15),
    "Q5_K": _GgmlType(partial(_with_high, bits=4, run=32, high_bits=1), _six_bits, 31),
    "Q6_K": _GgmlType(partial(_with_high, bits=4, run=64, high_bits=2), _q6_k_scales, 32, offset=32),
    "IQ4_NL": _GgmlType(partial(_looked_up, book=_IQ4), _one, 127),
    "IQ4_XS": _GgmlType(partial(_looked_up, book=_IQ4), _iq4_xs_scales, 127),
    "TQ1_0": _GgmlType(_ternary, _one, 1, offset=1),
    "TQ2_0": _GgmlType(_CRUMBS, _one, 2, offset=1),
    "MXFP4": _GgmlType(partial(_looked_up, book=_E2M1_DOUBLED), _mxfp4_scales, 12),
}
