"""Making a result some rows at a time, and the arguments that all ops here share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...specs import DTYPES, TensorSpec, dtype_name
from ..base import Op, OpError, Tensors
from ..numerics import narrow, specs_of, torch_dtype
from ..operands import arithmetic_float, largest_float

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Banded", "BandedOp", "bands", "blank", "float_dtype", "largest", "result_dtype"]

_BAND = 1 << 17
"""Elements of a band: with their codes they lie in a core's cache."""


def bands(rows: int, columns: int, step: int = 1) -> Iterator[tuple[int, int]]:
    """Runs of rows of a cache's size, each of a multiple of `step` rows but for the last."""
    count = max(_BAND // max(columns, 1) // step, 1) * step
    for start in range(0, rows, count):
        yield start, min(start + count, rows)


def blank(spec: TensorSpec, like: Tensor) -> Tensor | None:
    """The result where there is nothing to compute: on the meta device, or without elements; else None."""
    import torch

    if spec.numel and not like.is_meta:
        return None
    return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=like.device)


Band = Callable[[int, int, "Tensor"], object]
"""Fills `[rows, columns]` with some rows, from the first to before the last."""


@dataclass(frozen=True, slots=True)
class Banded:
    """A tensor that is made some rows at a time, each rounded once to the tensor's dtype.

    Args:
        op: named where a value is past the range of the dtype.
        spec: of the tensor.
        like: a tensor on the same device.
        band: fills some rows, counted over all dims but the last.
        bound: returns a bound of all magnitudes; called at most once, where values are rounded. Each value is checked
            where the bound is past the range of the dtype, or is not finite.
        columns: of a row; those of the tensor where left out.
        step: bands are of a multiple of so many rows.
        wide: dtype of what `band` fills; float32 by default.
    """

    op: Op
    spec: TensorSpec
    like: Tensor
    band: Band
    bound: Callable[[], float]
    columns: int | None = None
    step: int = 1
    wide: torch.dtype | None = None

    def made(self, out: Tensor | None = None) -> Tensor:
        """Return the tensor, filled.

        Args:
            out: contiguous memory for it; new where there is none.

        Raises:
            OpError: a value past the range of the dtype.
        """
        import torch

        spec, wide = self.spec, self.wide or torch.float32
        result = out if out is not None and out.device == self.like.device else _room(spec, self.like.device)
        columns = self.columns or spec.shape[-1]
        flat, room = result.view(-1, columns), None
        fits = result.dtype == wide or self.bound() <= largest_float(spec.dtype)
        for start, stop in bands(flat.shape[0], columns, self.step):
            if result.dtype == wide:
                self.band(start, stop, flat[start:stop])
                continue
            if room is None:
                room = torch.empty(stop - start, columns, dtype=wide, device=result.device)
            values = room[: stop - start]
            self.band(start, stop, values)
            flat[start:stop] = values if fits else narrow(values, spec.dtype, str(self.op))
        return result


@dataclass(frozen=True)
class BandedOp(Op):
    """An op with one result, which is made in bands."""

    def banded(self, tensors: Tensors, spec: TensorSpec) -> Banded:
        """Return how the result is made; it has elements, and the tensors have values.

        Args:
            spec: of the result.
        """
        raise NotImplementedError

    def run(self, tensors: Tensors) -> Tensors:
        return self.run_into(tensors, (None,))

    def run_into(self, tensors: Tensors, rooms: Sequence[Tensor | None]) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        made = blank(spec, tensors[0])
        return (self.banded(tensors, spec).made(rooms[0]) if made is None else made,)


def _room(spec: TensorSpec, device: torch.device) -> Tensor:
    """Return memory for a result. numpy asks the system for huge pages, which are filled more than twice as fast."""
    import numpy as np
    import torch

    if device.type != "cpu":
        return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device)
    return torch.from_numpy(np.empty(spec.nbytes, "u1")).view(torch_dtype(spec.dtype)).view(spec.shape)


def largest(numbers: Sequence[Tensor], each: Sequence[float]) -> float:
    """Return a bound of the sum of products: the largest magnitudes of some tensors, times a number each.

    >>> import torch
    >>> largest([torch.tensor([-2.0, 1.0]), torch.tensor([0.5])], [10, 4])
    22.0
    """
    return math.fsum(n * float(some.abs().amax()) for some, n in zip(numbers, each) if some.numel())


def float_dtype(op: Op, dtype: str | None) -> str | None:
    """The dtype of a result by its name here.

    Raises:
        OpError: no dtype, or one that arithmetic does not know.
    """
    if dtype is None:
        return None
    try:
        found = dtype_name(dtype)
    except CheckpointError as error:
        raise OpError(f"{op.name}: {error.diagnostics[0].headline}") from None
    arithmetic_float(op, TensorSpec((), found), "the result")
    return found


def result_dtype(dtype: str | None, scale: TensorSpec) -> str:
    """The dtype that is asked for; else that of the scales, where it is one of weights: BF16 where it is not."""
    held = DTYPES[scale.dtype]
    return dtype or (scale.dtype if held.kind == "float" and held.bits >= 16 else "BF16")
