"""Making a result some rows at a time, and the arguments that all ops here share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...specs import DTYPES, TensorSpec, dtype_name
from ..base import Op, OpError
from ..numerics import narrow, torch_dtype
from ..operands import arithmetic_float, largest_float

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Band", "bands", "blank", "float_dtype", "in_bands", "largest", "result_dtype"]

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


Band = Callable[[int, int, "Tensor"], float]
"""Fills `[rows, columns]` with some rows, from the first to before the last, and returns a bound of their magnitudes.

A bound that is not finite means that each value is looked at.
"""


def in_bands(
    op: Op, spec: TensorSpec, like: Tensor, band: Band, step: int = 1, wide: torch.dtype | None = None
) -> Tensor:
    """Return a tensor made of bands of its rows, each rounded once to the tensor's dtype.

    Args:
        like: a tensor on the same device.
        band: fills some rows, counted over all dims but the last.
        step: bands are of a multiple of so many rows.
        wide: dtype of what `band` fills; float32 by default.

    Raises:
        OpError: a value past the range of the dtype.
    """
    import torch

    wide = wide or torch.float32
    result = _room(spec, like.device)
    columns, limit = spec.shape[-1], largest_float(spec.dtype)
    flat, room = result.view(-1, columns), None
    for start, stop in bands(flat.shape[0], columns, step):
        if result.dtype == wide:
            band(start, stop, flat[start:stop])
            continue
        if room is None:
            room = torch.empty(stop - start, columns, dtype=wide, device=like.device)
        made = room[: stop - start]
        bound = band(start, stop, made)
        flat[start:stop] = made if bound <= limit else narrow(made, spec.dtype, str(op))
    return result


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
