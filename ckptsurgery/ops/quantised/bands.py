"""Making a result some rows at a time, and the arguments that all ops here share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...specs import DTYPES, TensorSpec, dtype_name
from ..base import Op, OpError
from ..numerics import narrow, torch_dtype
from ..operands import arithmetic_float

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["bands", "blank", "float_dtype", "in_bands", "result_dtype"]

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


def in_bands(op: Op, spec: TensorSpec, like: Tensor, band: Callable[[int, int], Tensor], step: int = 1) -> Tensor:
    """A tensor made of bands of its rows, each rounded once to the tensor's dtype.

    Args:
        like: a tensor on the same device.
        band: called with the first row and the one after the last; gives [rows, columns] in float32 or float64. Rows
            are counted over all dims but the last.
        step: bands are of a multiple of so many rows.

    Raises:
        OpError: a value past the range of the dtype.
    """
    import torch

    result = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=like.device)
    columns = spec.shape[-1]
    flat = result.view(-1, columns)
    for start, stop in bands(flat.shape[0], columns, step):
        flat[start:stop] = narrow(band(start, stop), spec.dtype, str(op))
    return result


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
