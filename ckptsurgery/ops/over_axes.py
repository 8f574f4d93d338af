"""Ops over an axis that one side of a rule lacks: `same`, `repeat_over`, `mean_over`, `sum_over`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, cast

from ..specs import DTYPES, TensorSpec
from .base import Op, OpError, Specs, Tensors
from .numerics import bits, has_data, narrow, specs_of, widen
from .operands import arithmetic_float, integer_range, operands
from .registry import op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Integers", "MeanOver", "RepeatOver", "Same", "SumOver", "mixed_by", "weighted_sum", "whole_numbers"]


Integers = Literal["error", "first", "max"]


@op
@dataclass(frozen=True)
class Same(Op):
    """Prove that tensors are equal, bit for bit, and pass one of them on.

    >>> Same().joins, Same().axis_role, Same("r").joins, Same("r").axis_role, str(Same("r").inverse())
    (True, None, False, 'reduce', 'repeat_over(axis=r)')

    `same` joins the sources of its side. `same(r)` compares the slices along an axis that only this side has, as
    tensor-parallel files hold replicated norms. NaNs are equal when their bits are, and -0.0 is not 0.0.

    `joins` and `axis_role` depend on the axis: ask the object, not the class. The inverse of the joining form is a copy
    to several targets, which is no op: it is None here, and whoever inverts the rule writes the targets.

    Raises:
        OpError: different shapes or dtypes, or no slice; at run time the first place where bits differ.
    """

    name = "same"
    axis: str | None = None

    @property
    def joins(self) -> bool:  # type: ignore[override]
        return self.axis is None

    @property
    def axis_role(self) -> Literal["reduce"] | None:  # type: ignore[override]
        return None if self.axis is None else "reduce"

    def infer(self, specs: Specs) -> Specs:
        if self.axis is not None:
            return (_without_front(self, specs, "has no slice to pass on"),)
        if not specs:
            raise OpError("same was given no tensor")
        if len(set(specs)) > 1:
            raise OpError(f"same was given different tensors: {', '.join(map(str, specs))}")
        return (specs[0],)

    def run(self, tensors: Tensors) -> Tensors:
        self.infer(specs_of(tensors))
        parts = tensors if self.axis is None else tensors[0].unbind(0)
        what = "source" if self.axis is None else self.axis
        if has_data(parts[0]):
            first = bits(parts[0].contiguous())
            for number, part in enumerate(parts[1:], 1):
                _compare(first, bits(part.contiguous()), f"{what} {number} differs from {what} 0")
        return (parts[0],)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return None if self.axis is None else RepeatOver(self.axis)

    def on_moments(self) -> Op:
        return self


@op
@dataclass(frozen=True)
class RepeatOver(Op):
    """Say that an axis, or a captured index, is filled with copies.

    >>> str(RepeatOver("r").inverse())
    'same(axis=r)'

    The rearrangement itself adds the axis; nothing is computed. The inverse, exactly, is `same(axis)`.
    """

    name = "repeat_over"
    axis_role = "repeat"
    axis: str

    def infer(self, specs: Specs) -> Specs:
        return operands(self, specs, "one tensor")

    def run(self, tensors: Tensors) -> Tensors:
        return tensors

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return Same(self.axis)


@op
@dataclass(frozen=True)
class MeanOver(Op):
    """The mean along an axis, such as heads or checkpoints that become one.

    >>> MeanOver("r").infer((TensorSpec([3, 2], "BF16"),))
    (TensorSpec(shape=(2,), dtype='BF16'),)

    Args:
        axis: the axis, or the captured index or choice, that is averaged over.
        integers: `error` refuses integers, `first` passes those of the first entry on, `max` the largest ones.

    Computed in float32 (float64 for float64) and rounded once. Nothing brings the parts back.

    Raises:
        OpError: integers without a policy, or an axis of size 0.
    """

    name = "mean_over"
    axis_role = "reduce"
    elementwise = True
    axis: str
    integers: Integers = "error"

    def infer(self, specs: Specs) -> Specs:
        spec = _without_front(self, specs, "has no mean")
        if self.integers != "error" and DTYPES[spec.dtype].kind in ("int", "uint", "bool"):
            return (spec,)
        return (arithmetic_float(self, spec),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        if DTYPES[spec.dtype].kind != "float":
            return (whole_numbers(tensors[0].unbind(0), self.integers),)
        return (_reduced(tensors[0], widen(tensors[0]).mean(0), spec.dtype, str(self)),)


@op
@dataclass(frozen=True)
class SumOver(Op):
    """The sum along an axis, such as the partial sums of tensor-parallel biases.

    >>> SumOver("r").infer((TensorSpec([3, 2], "I32"),))
    (TensorSpec(shape=(2,), dtype='I32'),)

    With `w`, each entry is multiplied by its weight first: Σ w[m] · tensor[m], the linear merge of several models.

    Args:
        axis: the axis, or the captured index or choice, that is summed over.
        w: a list of weights in the order of the entries, or a table by choice: `w = { base = 0.5, math = 0.5 }`.
        integers: `sum` adds them up where there are no weights; `first` passes those of the first entry on, `max` the
            largest ones.

    Computed in float32 (float64 for float64) and rounded once; integers in int64, and overflow is an error. A sum of
    nothing is 0. Nothing brings the parts back.

    Raises:
        OpError: booleans, complex or packed numbers; at run time a sum past the range.
    """

    name = "sum_over"
    axis_role = "reduce"
    elementwise = True
    axis: str
    w: tuple[float, ...] | tuple[tuple[str, float], ...] | None = None
    integers: Literal["sum", "first", "max"] = "sum"

    def ordered(self, choices: Sequence[tuple[str, ...]]) -> Op:
        if self.w is None or not any(isinstance(part, tuple) for part in self.w):
            return self
        table = dict(cast("tuple[tuple[str, float], ...]", self.w))
        spelled = next((one for one in choices if set(one) == set(table)), None)
        if spelled is None:
            known = " or ".join(map(str, map(list, choices))) if choices else "none: its key lists no choices"
            raise OpError(f"{self.name}: w names {list(table)}, and the choices of {self.axis} are {known}")
        return SumOver(self.axis, tuple(table[choice] for choice in spelled), self.integers)

    def infer(self, specs: Specs) -> Specs:
        if self.w is not None and specs and specs[0].shape and len(self.w) != specs[0].shape[0]:
            raise OpError(f"{self.name}: {len(self.w)} weights for {specs[0].shape[0]} entries of {self.axis}")
        spec = _without_front(self, specs, None)
        if self.integers != "sum" and DTYPES[spec.dtype].kind in ("int", "uint", "bool"):
            return (spec,)
        if self.w is not None:
            return (arithmetic_float(self, spec),)
        if DTYPES[spec.dtype].kind in ("int", "uint") and spec.dtype != "U64":
            return (spec,)
        return (arithmetic_float(self, spec),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        if self.integers != "sum" and DTYPES[spec.dtype].kind in ("int", "uint", "bool"):
            return (whole_numbers(tensors[0].unbind(0), self.integers),)
        if self.w is not None:
            total = weighted_sum(tensors[0].unbind(0), cast("tuple[float, ...]", self.w))
            return (_reduced(tensors[0], total, spec.dtype, str(self)),)
        if DTYPES[spec.dtype].kind == "float":
            return (_reduced(tensors[0], widen(tensors[0]).sum(0), spec.dtype, str(self)),)
        return (_integer_sum(tensors[0], spec.dtype, str(self)),)


def _without_front(op: Op, specs: Specs, empty: str | None) -> TensorSpec:
    (spec,) = operands(op, specs, "one tensor")
    if not spec.shape:
        raise OpError(f"{op} wants the axis in front, and {spec} has none")
    if spec.shape[0] == 0 and empty:
        raise OpError(f"{op}: an axis of size 0 {empty}")
    return TensorSpec(spec.shape[1:], spec.dtype)


def whole_numbers(tensors: Tensors, policy: str) -> Tensor:
    """What integers of several tensors become: those of the first, or the largest ones."""
    import torch

    if policy == "first":
        return tensors[0]
    stacked = torch.stack(tensors)
    return stacked.any(0) if stacked.dtype == torch.bool else stacked.max(0).values


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w · part, in float32 (float64 for float64)."""
    import torch

    wide = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    return mixed_by(chain([parts[0].to(wide, copy=True)], map(widen, parts[1:])), weights)


def mixed_by(parts: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w · part, in the memory of the first part."""
    others = iter(parts)
    total = next(others).mul_(weights[0])
    for part, weight in zip(others, weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total


def _compare(first: Tensor, other: Tensor, headline: str) -> None:
    import torch

    if torch.equal(first, other):
        return
    places = (first != other).nonzero()
    raise OpError(
        f"same: {headline} in {len(places)} of {first.numel()} elements, first at {places[0].tolist()}; "
        "where they may differ, take one source and drop the others"
    )


def _reduced(tensor: Tensor, result: Tensor, dtype: str, who: str) -> Tensor:
    return narrow(result, dtype, who, was_finite=lambda: widen(tensor).isfinite().all(0))


def _integer_sum(tensor: Tensor, dtype: str, who: str) -> Tensor:
    import torch

    wide = tensor.to(torch.int64)
    total = wide.sum(0)
    if has_data(tensor):
        low, high = integer_range(dtype)
        # float64 is near enough to tell that an int64 sum wrapped around: by 2**64.
        wrapped = (wide.double().sum(0) - total.double()).abs() > float(1 << 62)
        if wrapped.any() or int(total.min()) < low or int(total.max()) > high:
            raise OpError(f"{who}: a sum lies outside the range of {dtype}, {low} to {high}")
    return total.to(tensor.dtype)
