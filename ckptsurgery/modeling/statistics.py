"""Statistics of tensors: one row a tensor, over its finite values, in float64 and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, overload

from ..notebook_view import TextInNotebooks
from ..specs import TensorSpec
from ..wording import brief, counted

if TYPE_CHECKING:
    from torch import Tensor

    from ..ops.moments import Moments

    Promises = Mapping[str, Moments]

__all__ = ["Stats", "TensorStats", "stats_of"]

_CHUNK = 1 << 20
_BINS = 41  # odd, so that a symmetric distribution has a bar in its middle


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What one tensor holds.

    Args:
        name: its name.
        spec: its shape and dtype.
        mean, std, min, max: of its finite values; the std is that of the population. NaN where there are none.
        norm: the Euclidean norm of its finite values.
        zeros: the fraction of its values that are zero.
        nonfinite: how many values are infinite or NaN.
        histogram: how many of its finite values lie in each of 41 equal intervals from min to max; one where these
            are equal; empty without finite values.
    """

    name: str
    spec: TensorSpec
    mean: float
    std: float
    min: float
    max: float
    norm: float
    zeros: float
    nonfinite: int
    histogram: tuple[int, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The row as plain data."""
        return asdict(self) | {"spec": str(self.spec)}


@dataclass(frozen=True, slots=True, repr=False)
class Stats(TextInNotebooks, Sequence[TensorStats]):
    """Rows, readable as a table by `str`."""

    rows: tuple[TensorStats, ...]

    @overload
    def __getitem__(self, at: int) -> TensorStats: ...
    @overload
    def __getitem__(self, at: slice) -> Stats: ...
    def __getitem__(self, at: int | slice) -> TensorStats | Stats:
        return Stats(self.rows[at]) if isinstance(at, slice) else self.rows[at]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TensorStats]:
        return iter(self.rows)

    def to_html(self, title: str = "statistics", before: Stats | None = None, promised: Promises | None = None) -> str:
        """Make a page with a histogram of each tensor.

        >>> import torch
        >>> page = stats_of({"w": torch.arange(5.0)}).to_html("weights")
        >>> page.startswith("<!doctype html>"), "<title>weights</title>" in page
        (True, True)

        Args:
            title: in the window's title bar.
            before: statistics taken earlier, drawn as outlines under the same names.
            promised: what an initialiser promises, as `Selection.promised` returns it: drawn as lines at the mean and
                at one standard deviation from it, and compared.
        """
        from .histogram_page import histogram_page

        earlier = [row.to_json() for row in before or ()]
        return histogram_page(title, [row.to_json() for row in self.rows], earlier, promised or {})

    def __repr__(self) -> str:
        return brief("Stats", counted(len(self.rows), "tensor"), *(row.name for row in self.rows[:3]))

    def __str__(self) -> str:
        head = ("name", "tensor", "mean", "std", "min", "max", "norm", "zeros", "nonfinite")
        lines = [head, *map(_cells, self.rows)]
        widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
        return "\n".join(_line(cells, widths) for cells in lines)


def _cells(row: TensorStats) -> tuple[str, ...]:
    numbers = [f"{value:.4g}" for value in (row.mean, row.std, row.min, row.max, row.norm)]
    return (row.name, str(row.spec), *numbers, f"{row.zeros:.1%}", str(row.nonfinite))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:])]
    return "  ".join([*left, *right]).rstrip()


def stats_of(tensors: Mapping[str, Tensor]) -> Stats:
    """Statistics of each tensor; none may be meta.

    >>> import torch
    >>> print(stats_of({"w": torch.tensor([0.0, 3.0, 4.0, float("inf")])}))
    name  tensor   mean  std  min  max  norm  zeros  nonfinite
    w     F32 [4]  2.333  1.7  0    4    5  25.0%          1
    """
    return Stats(tuple(_row(name, tensor) for name, tensor in tensors.items()))


def _row(name: str, tensor: Tensor) -> TensorStats:
    count = zeros = 0
    total = squares = 0.0
    low, high = math.inf, -math.inf
    for chunk in _chunks(tensor):
        finite = chunk[chunk.isfinite()]
        if finite.numel():
            count += finite.numel()
            zeros += int((finite == 0).sum())
            total += float(finite.sum())
            squares += float(finite.square().sum())
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    mean = total / count if count else math.nan
    spread = sum(float((c[c.isfinite()] - mean).square().sum()) for c in _chunks(tensor)) if count else 0.0
    values = tensor.numel() * (2 if tensor.is_complex() else 1)
    return TensorStats(
        name,
        TensorSpec(tuple(tensor.shape), tensor.dtype),
        mean=mean,
        std=math.sqrt(spread / count) if count else math.nan,
        min=low if count else math.nan,
        max=high if count else math.nan,
        norm=math.sqrt(squares),
        zeros=zeros / values if values else 0.0,
        nonfinite=values - count,
        histogram=_histogram(tensor, low, high) if count else (),
    )


def _histogram(tensor: Tensor, low: float, high: float) -> tuple[int, ...]:
    """Count the finite values by intervals of equal width."""
    import torch

    counts = torch.zeros(_BINS if high > low else 1, dtype=torch.int64, device=tensor.device)
    half = 0.5 if math.isinf(high - low) else 1.0  # the range of the largest floats has no float of its own
    width = high * half - low * half or 1.0
    for chunk in _chunks(tensor):
        share = (chunk[chunk.isfinite()] * half - low * half) / width
        at = (share * len(counts)).long().clamp_(max=len(counts) - 1)
        counts += torch.bincount(at, minlength=len(counts))
    return tuple(counts.tolist())


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The values as float64, a megabyte of elements at a time; complex ones as pairs of real ones."""
    import torch

    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        part = torch.view_as_real(part).reshape(-1) if part.is_complex() else part
        # float8 goes by way of float32: some backends have no direct cast.
        yield (part.float() if part.is_floating_point() and part.dtype.itemsize < 4 else part).double()
