"""Ops on rows that work along any axis: the tensor is turned so that the axis is dim 0, and turned back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..specs import TensorSpec
from .base import AxisPlace, Op, OpError, Specs, Tensors

__all__ = ["PlacedOp", "RowsOp"]


@dataclass(frozen=True)
class RowsOp(Op):
    """Base of ops on dim 0 of one tensor; a subclass has a field `axis`, which names another axis to work along.

    `infer`, `run` and `inverse` see the rows as dim 0, whatever the axis.
    """

    @property
    def axis_role(self) -> Literal["along"] | None:  # type: ignore[override]
        return None if getattr(self, "axis", None) is None else "along"

    def placed(self, place: AxisPlace) -> Op:
        return PlacedOp(self, place)


@dataclass(frozen=True)
class PlacedOp(Op):
    """An op on rows, applied to an axis at one place of a tensor.

    >>> from .rows import SliceRows
    >>> op = SliceRows(0, 3, axis="h").placed(AxisPlace(dim=0, outer=2, size=4, inner=8))
    >>> op.infer((TensorSpec([64, 5], "F32"),)), str(op)
    ((TensorSpec(shape=(48, 5), dtype='F32'),), 'slice_rows(stop=3, axis=h)')
    """

    op: Op
    place: AxisPlace

    def infer(self, specs: Specs) -> Specs:
        (spec,) = specs
        (made,) = self.op.infer((TensorSpec(self._turned(spec.shape), spec.dtype),))
        return (TensorSpec(self._shape(spec.shape, made.shape[0]), made.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (tensor,) = tensors
        shape = tuple(tensor.shape)
        size, before, after = self._turned(shape)
        rows = tensor.reshape(before, size, after).transpose(0, 1)
        (made,) = self.op.run((rows,))
        return (made.transpose(0, 1).reshape(self._shape(shape, made.shape[0])),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        turned = tuple(TensorSpec(self._turned(s.shape), s.dtype) for s in inputs) if inputs is not None else None
        undone = self.op.inverse(turned)
        if undone is None or turned is None:
            return None
        (made,) = self.op.infer(turned)
        place = AxisPlace(self.place.dim, self.place.outer, made.shape[0], self.place.inner)
        return PlacedOp(undone, place)

    def on_moments(self) -> Op | None:
        op = self.op.on_moments()
        return None if op is None else PlacedOp(op, self.place)

    def _turned(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The shape with the axis in front, all before it and all after it merged."""
        dim, outer, size, inner = self.place.dim, self.place.outer, self.place.size, self.place.inner
        if dim >= len(shape) or shape[dim] != outer * size * inner:
            raise OpError(f"{self.op}: the axis is not in a tensor of shape {list(shape)}")
        return size, math.prod(shape[:dim]) * outer, inner * math.prod(shape[dim + 1 :])

    def _shape(self, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
        place = self.place
        return (*shape[: place.dim], place.outer * count * place.inner, *shape[place.dim + 1 :])

    def __str__(self) -> str:
        return str(self.op)
