"""How far two tensors of one shape are apart, in one pass over blocks of both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..specs import DTYPES, TensorSpec
from ..storage.tensors import torch_dtype
from .compared_sides import ComparedSide

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Difference", "difference"]

_BLOCK = 1 << 20
"""Elements read at a time."""
_PART = 1 << 15
"""Elements computed with at a time: as float64, with what is computed from them, they stay in the processor's cache."""
_SHORT = {"F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
"""Dtypes whose squares float64 holds exactly enough: they neither overflow nor vanish."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How two tensors differ.

    Args:
        numel: elements of each.
        differing: how many elements differ in value; two NaNs do not. None where torch cannot read the dtype. 0 where
            only bits differ that mean the same, as the sign of a zero.
        nonfinite: how many of these are NaN or infinite on either side; the other numbers leave them out.
        max_abs: the largest |a - b|.
        max_rel: the largest |a - b| / max(|a|, |b|), from 0 to 2.
        cosine: of the two tensors as vectors; None where one of them is zero.
    """

    numel: int
    differing: int | None
    nonfinite: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    cosine: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the difference as plain data."""
        return asdict(self)


def difference(a: ComparedSide, b: ComparedSide, key: str) -> Difference | None:
    """How a key differs between two sides, which have the same shape for it; None where it does not.

    Bytes are compared first, so that equal tensors need no torch.
    """
    one, other = a.specs[key], b.specs[key]
    if one.dtype == other.dtype and _same_bytes(a, b, key, one):
        return None
    if any(DTYPES[s.dtype].bits < 8 or DTYPES[s.dtype].torch is None for s in (one, other)):
        return Difference(one.numel, None)
    sums, short = _Sums(), one.dtype in _SHORT and other.dtype in _SHORT
    for start in range(0, one.numel, _BLOCK):
        stop = min(start + _BLOCK, one.numel)
        sums.add_all(_block(a, key, one, start, stop), _block(b, key, other, start, stop), short)
    found = sums.result(one.numel)
    return None if one.dtype != other.dtype and not found.differing else found


def _same_bytes(a: ComparedSide, b: ComparedSide, key: str, spec: TensorSpec) -> bool:
    return all(bytes(a.read(key, *span)) == bytes(b.read(key, *span)) for span in _spans(spec.nbytes))


def _spans(nbytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, nbytes, _BLOCK):
        yield start, min(start + _BLOCK, nbytes)


def _block(side: ComparedSide, key: str, spec: TensorSpec, start: int, stop: int) -> Tensor:
    """Elements `[start, stop)`, flat."""
    import torch

    size = DTYPES[spec.dtype].itemsize
    data = bytearray(side.read(key, start * size, stop * size))
    return torch.frombuffer(data, dtype=torch.uint8).view(torch_dtype(spec.dtype, key))


@dataclass(slots=True)
class _Sums:
    differing: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    dot: float = 0.0
    squares_a: float = 0.0
    squares_b: float = 0.0
    # Powers of two by which either side is divided, so that no square of what is tiny or huge is lost.
    exponent_a: int = -1000
    exponent_b: int = -1000

    def add_all(self, a: Tensor, b: Tensor, short: bool) -> None:
        """Add blocks, part by part."""
        for start in range(0, a.numel(), _PART):
            x, y = a[start : start + _PART], b[start : start + _PART]
            if not short or not self.add_finite(x.double(), y.double()):
                self.add(x, y)

    def add_finite(self, x: Tensor, y: Tensor) -> bool:
        """Add what is finite throughout, in few passes; False where it is not, and nothing was added."""
        dot, squares_a, squares_b = float(x.dot(y)), float(x.dot(x)), float(y.dot(y))
        if not (math.isfinite(squares_a) and math.isfinite(squares_b)):
            return False
        apart = (x - y).abs_()
        largest = float(apart.max())
        if largest:
            self.differing += int(apart.count_nonzero())
            self.max_abs = max(self.max_abs, largest)
            size = x.abs_().maximum(y.abs_()).clamp_(min=5e-324)
            self.max_rel = max(self.max_rel, float(apart.div_(size).max()))
        more_a, more_b = min(self.exponent_a, 0), min(self.exponent_b, 0)
        self.exponent_a, self.exponent_b = max(self.exponent_a, 0), max(self.exponent_b, 0)
        self.dot = self.dot * 2.0 ** (more_a + more_b) + dot * 2.0 ** -(self.exponent_a + self.exponent_b)
        self.squares_a = self.squares_a * 4.0**more_a + squares_a * 4.0**-self.exponent_a
        self.squares_b = self.squares_b * 4.0**more_b + squares_b * 4.0**-self.exponent_b
        return True

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add any values: those that are not finite are counted and left out."""
        x, y = _wide(a), _wide(b)
        # Integers of 64 bits are compared as they are: float64 would round them.
        exact = a.dtype == b.dtype and not a.dtype.is_floating_point
        differ = a != b if exact else (x != y) & ~(x.isnan() & y.isnan())
        apart = _exactly_apart(a, b) if exact and not a.is_complex() and a.dtype.itemsize == 8 else (x - y).abs()
        finite = x.isfinite() & y.isfinite()
        self.differing += int(differ.sum())
        self.nonfinite += int((differ & ~finite).sum())
        x, y, apart = x[finite], y[finite], apart[finite]
        if x.numel() == 0:
            return
        size = x.abs().maximum(y.abs())
        self.max_abs = max(self.max_abs, float(apart.max()))
        self.max_rel = max(self.max_rel, float((apart / size.clamp(min=5e-324)).max()))
        a_now, b_now = _exponent(x, self.exponent_a), _exponent(y, self.exponent_b)
        more_a, more_b = self.exponent_a - a_now, self.exponent_b - b_now
        self.exponent_a, self.exponent_b = a_now, b_now
        x, y = x * 2.0**-a_now, y * 2.0**-b_now
        self.dot = self.dot * 2.0 ** (more_a + more_b) + float((x.conj() * y).real.sum())
        self.squares_a = self.squares_a * 4.0**more_a + float(x.abs().square().sum())
        self.squares_b = self.squares_b * 4.0**more_b + float(y.abs().square().sum())

    def result(self, numel: int) -> Difference:
        norms = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        cosine = max(-1.0, min(1.0, self.dot / norms)) if norms else None
        return Difference(numel, self.differing, self.nonfinite, self.max_abs, self.max_rel, cosine)


def _exactly_apart(a: Tensor, b: Tensor) -> Tensor:
    """How far integers of 64 bits are apart: floats of that size have no bits for small differences."""
    import torch

    about = (a.double() - b.double()).abs()
    near = a.view(torch.int64) - b.view(torch.int64)  # exact where it does not overflow, signed or not
    return torch.where(about < 2.0**60, near.abs().double(), about)


def _exponent(x: Tensor, least: int) -> int:
    return max(least, min(1000, math.frexp(float(x.abs().max()))[1]))


def _wide(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
