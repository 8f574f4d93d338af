"""Ops on rows, those of embeddings and heads, or along any axis: `slice_rows`, `pad_to_multiple`, `resize_rows`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..specs import DTYPES, TensorSpec
from .along import RowsOp
from .base import Op, OpError, Specs, Tensors
from .numerics import narrow, specs_of, torch_dtype, widen
from .operands import arithmetic_float, integer_range, largest_float, operands, whole_elements
from .registry import op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PadToMultiple", "ResizeRows", "SliceRows", "fill", "holds"]

_BLOCK = 1 << 22  # numbers drawn at once: 16 MiB of float32


@op
@dataclass(frozen=True)
class SliceRows(RowsOp):
    """Keep rows start to stop - 1 of dim 0, or of an axis.

    >>> SliceRows(2, 5).infer((TensorSpec([8, 3], "F32"),))
    (TensorSpec(shape=(3, 3), dtype='F32'),)

    Args:
        start, stop: 0 <= start <= stop <= rows; without `stop` to the end. Nothing is clipped.
        axis: the axis of the rule whose entries are meant; dim 0 where left out.

    What is cut is lost, so there is an inverse only where nothing was.

    Raises:
        OpError: rows that are not there.
    """

    name = "slice_rows"
    start: int = 0
    stop: int | None = None
    axis: str | None = None

    def infer(self, specs: Specs) -> Specs:
        spec = _rows(self, specs)
        stop = spec.shape[0] if self.stop is None else self.stop
        if not 0 <= self.start <= stop <= spec.shape[0]:
            raise OpError(f"{self}: {spec} has rows 0 to {spec.shape[0] - 1} only, and stop comes after start")
        return (TensorSpec((stop - self.start, *spec.shape[1:]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        return (tensors[0].narrow(0, self.start, spec.shape[0]),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return self if inputs is not None and self.infer(inputs) == inputs else None

    def on_moments(self) -> Op:
        return self


@op
@dataclass(frozen=True)
class PadToMultiple(RowsOp):
    """Append rows to dim 0, or to an axis, until their number is a multiple of n.

    Vocabularies are padded to multiples of 64 or 128.

    >>> op, spec = PadToMultiple(64), TensorSpec([100, 3], "F32")
    >>> op.infer((spec,))[0].shape, str(op.inverse((spec,)))
    ((128, 3), 'slice_rows(stop=100)')

    Args:
        n: the multiple, 1 or more.
        value: what the new rows hold; an integer where the tensor holds integers.
        axis: as for `slice_rows`.

    The inverse cuts the rows again, exactly; without inputs their number is unknown, and so is the inverse.

    Raises:
        OpError: no rows, or a value that the dtype cannot hold.
    """

    name = "pad_to_multiple"
    n: int
    value: int | float = 0
    axis: str | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise OpError(f"pad_to_multiple wants a multiple of 1 or more, not {self.n}")

    def infer(self, specs: Specs) -> Specs:
        spec = _rows(self, specs)
        holds(self, spec, self.value)
        return (TensorSpec((-(-spec.shape[0] // self.n) * self.n, *spec.shape[1:]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        result = tensors[0].new_empty(spec.shape)
        result[: tensors[0].shape[0]] = tensors[0]
        fill(result[tensors[0].shape[0] :], self.value)
        return (result,)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return None if inputs is None else SliceRows(0, inputs[0].shape[0], self.axis)

    def on_moments(self) -> Op:
        return replace(self, value=0)


@op
@dataclass(frozen=True)
class ResizeRows(RowsOp):
    """Give dim 0, or an axis, n rows: cut, or filled up, or put together by a map of classes or tokens.

    >>> str(ResizeRows(5, rows=(("0", 7), ("3", 2))))
    'resize_rows(n=5, rows=[["0", 7], ["3", 2]])'
    >>> str(ResizeRows(12).inverse((TensorSpec([10, 4], "F32"),)))
    'slice_rows(stop=10)'

    Args:
        n: rows afterwards.
        fill: new rows are the mean of all old rows, zeros, or `normal`: drawn from N(mean, scale * cov) of all old
            rows, after John Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021).
        rows: which old row each new one takes: a table `{0=7, 3=2}` of new = old, or a list with one old row for each
            of the first new ones. New rows that it leaves out are filled. Without it the rows stay where they are.
        scale: of the covariance; Hewitt's note takes 1e-5, so that new rows start close to the mean.
        seed: of the draws; the same seed gives the same rows, and the global generators stay as they were.
        axis: as for `slice_rows`.

    `mean` and `normal` compute in float32 (float64 for float64) and round once. Old rows are moved, not computed.

    The inverse is exact where every old row is still there.

    Raises:
        OpError: a row that is not there or is named twice, a mean of no rows or of integers.
    """

    name = "resize_rows"
    n: int
    fill: Literal["mean", "normal", "zeros"] = "mean"
    rows: tuple[int, ...] | tuple[tuple[str, int], ...] | None = None
    seed: int = 0
    scale: float = 1e-5
    axis: str | None = None

    def __post_init__(self) -> None:
        if self.n < 0 or self.scale < 0:
            raise OpError("resize_rows wants neither n nor scale below 0")
        if self.fill not in ("mean", "normal", "zeros"):
            raise OpError(f"resize_rows fills with mean, normal or zeros, not {self.fill!r}")
        taken = self._pairs(self.n)
        if len(dict(taken)) != len(taken) or any(not 0 <= new < self.n for new, _ in taken):
            raise OpError(f"resize_rows: each new row is named once at most, and lies in 0 to {self.n - 1}")

    def infer(self, specs: Specs) -> Specs:
        spec = _rows(self, specs)
        pairs = self._pairs(spec.shape[0])
        absent = sorted({old for _, old in pairs if not 0 <= old < spec.shape[0]})
        if absent:
            raise OpError(f"{self.name}: {spec} has no row {', '.join(map(str, absent))}")
        if len(pairs) < self.n and self.fill != "zeros":
            arithmetic_float(self, spec)
            if not spec.shape[0]:
                raise OpError(f"{self.name}: {spec} has no rows to take a mean of; fill=zeros needs none")
        return (TensorSpec((self.n, *spec.shape[1:]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        (spec,), old = self.infer(specs_of(tensors)), tensors[0]
        pairs = self._pairs(old.shape[0])
        filled = sorted(set(range(self.n)) - {new for new, _ in pairs})
        result = old.new_empty(spec.shape)
        at = [torch.tensor(side, dtype=torch.int64, device=old.device) for side in zip(*pairs)] or None
        if at is not None:
            result[at[0]] = old[at[1]]
        if filled:
            result[torch.tensor(filled, device=old.device)] = self._new_rows(old, len(filled))
        return (result,)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        if inputs is None:
            return None
        count = inputs[0].shape[0]
        if self.rows is None:
            return SliceRows(0, count, self.axis) if self.n >= count else None
        places = {old: new for new, old in self._pairs(count)}
        if len(places) < count:
            return None
        return ResizeRows(count, "zeros", tuple(places[i] for i in range(count)), axis=self.axis)

    def on_moments(self) -> Op | None:
        taken = [old for _, old in self._pairs(0)] if self.rows is not None else []
        return replace(self, fill="zeros") if len(set(taken)) == len(taken) else None

    def _pairs(self, count: int) -> list[tuple[int, int]]:
        """(new, old) for each row that is taken over from `count` old ones."""
        if self.rows is None:
            return [(i, i) for i in range(min(self.n, count))]
        pairs: list[tuple[int, int]] = []
        entries: tuple[int | tuple[str, int], ...] = self.rows
        for position, row in enumerate(entries):
            if isinstance(row, int):
                pairs.append((position, row))
            elif row[0].isdecimal():
                pairs.append((int(row[0]), row[1]))
            else:
                raise OpError(f"resize_rows: {row[0]!r} is no row number")
        return pairs

    def _new_rows(self, old: Tensor, count: int) -> Tensor:
        import torch

        if self.fill == "zeros":
            return torch.zeros(count, *old.shape[1:], dtype=old.dtype, device=old.device)
        wide = widen(old).reshape(old.shape[0], -1)
        mean = wide.mean(0)
        drawn = mean.expand(count, -1) if self.fill == "mean" else mean + self._deviations(wide - mean, count)
        return narrow(drawn, specs_of((old,))[0].dtype, self.name).reshape(count, *old.shape[1:])

    def _deviations(self, centered: Tensor, count: int) -> Tensor:
        """Draws from N(0, scale * cov): random mixtures of the rows themselves, so that no matrix is factored."""
        import torch

        total = centered.shape[0]
        generator = torch.Generator().manual_seed(self.seed)
        result = torch.empty(count, centered.shape[1], dtype=centered.dtype, device=centered.device)
        step = max(1, _BLOCK // total)
        for start in range(0, count, step):
            part = result[start : start + step]
            mixture = torch.randn(part.shape[0], total, generator=generator, dtype=torch.float32)
            part.copy_(mixture.to(centered) @ centered)
        return result * math.sqrt(self.scale / total)


def _rows(op: Op, specs: Specs) -> TensorSpec:
    (spec,) = operands(op, specs, "one tensor")
    if not spec.shape:
        raise OpError(f"{op.name} works on rows, and {spec} has none")
    return whole_elements(op, spec)


def holds(op: Op, spec: TensorSpec, value: int | float) -> None:
    """Raise an `OpError` where the dtype of a tensor cannot hold a value."""
    kind = DTYPES[spec.dtype].kind
    if kind in ("float", "complex"):
        fits = abs(value) <= largest_float(spec.dtype) and spec.dtype != "F8_E8M0"
    else:
        low, high = integer_range(spec.dtype)
        fits = isinstance(value, int) and low <= value <= high
    if not fits:
        raise OpError(f"{op.name}: {spec.dtype} cannot hold the value {value}")


def fill(part: Tensor, value: int | float) -> None:
    """Fill a tensor with a value that its dtype can hold."""
    import torch

    dtype = specs_of((part,))[0].dtype
    if DTYPES[dtype].kind == "float":
        part.copy_(narrow(torch.tensor(float(value), dtype=torch.float64), dtype, "pad_to_multiple").expand(part.shape))
    else:
        part.copy_(torch.tensor(value, dtype=torch_dtype(dtype)).expand(part.shape))
