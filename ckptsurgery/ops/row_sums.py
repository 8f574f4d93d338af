"""`combine_rows`: rows of an embedding as weighted sums of old ones, by a sparse matrix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..specs import TensorSpec
from .along import RowsOp
from .base import OpError, Specs, Tensors
from .numerics import narrow, specs_of, widen
from .operands import arithmetic_float, operands
from .registry import op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CombineRows"]

_BLOCK = 1 << 22  # numbers multiplied at once: 16 MiB of float32


@op
@dataclass(frozen=True)
class CombineRows(RowsOp):
    """Make n rows of dim 0, or of an axis, each a weighted sum of old rows; the weights are a sparse matrix.

    result[new[k]] = Σ weights[k] * tensor[old[k]], over all entries k of the same new row.

    >>> import torch
    >>> op = CombineRows(2, (0, 1, 1), (2, 0, 1), (1.0, 0.25, 0.75))
    >>> op.run((torch.tensor([[4.0], [8.0], [5.0]]),))[0].tolist()
    [[5.0], [7.0]]

    Vocabularies are transplanted so: a token that both share takes its old row, and any other a mixture of the rows of
    similar tokens (Dobler and de Melo, "FOCUS", 2023; Minixhofer et al., "WECHSEL", 2022, which compute the weights).

    Args:
        n: rows afterwards.
        new, old, weights: of each entry of the matrix its new row, its old row and its value; lists of one length, as
            names of `[dims]` or `[data]`.
        fill: rows without an entry are refused (`error`), the mean of all old rows, or zeros.
        axis: the axis of the rule whose entries are meant; dim 0 where left out.

    Computed in float32 (float64 for float64) in the order of the entries, and rounded once. A row with a single entry
    of weight 1 is moved as it is. It has no inverse.

    Raises:
        OpError: lists of different lengths, a row that is not there, a row without an entry where `fill` is `error`.
    """

    name = "combine_rows"
    n: int
    new: tuple[int, ...]
    old: tuple[int, ...]
    weights: tuple[float, ...]
    fill: Literal["error", "mean", "zeros"] = "error"
    axis: str | None = None

    def __post_init__(self) -> None:
        if self.fill not in ("error", "mean", "zeros"):
            raise OpError(f"{self.name} fills with mean or zeros, or refuses (error), not {self.fill!r}")
        lengths = [len(part) for part in (self.new, self.old, self.weights)]
        if len(set(lengths)) > 1:
            shown = ", ".join(map(str, lengths))
            raise OpError(f"{self.name}: new, old and weights are lists of one length, not of {shown}")
        absent = next((row for row in self.new if not 0 <= row < self.n), None)
        if self.n < 0 or absent is not None:
            raise OpError(f"{self.name}: {self.n} new rows are numbered from 0, without a {absent}")

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one tensor")
        arithmetic_float(self, spec)
        if not spec.shape:
            raise OpError(f"{self.name} works on rows, and {spec} has none")
        absent = next((row for row in self.old if not 0 <= row < spec.shape[0]), None)
        if absent is not None:
            raise OpError(f"{self.name}: {spec} has no row {absent}")
        empty = self._empty()
        if empty and self.fill == "error":
            raise OpError(f"{self.name}: {len(empty)} new rows have no entry, the first is {empty[0]}; fill=mean")
        if empty and self.fill == "mean" and not spec.shape[0]:
            raise OpError(f"{self.name}: {spec} has no rows to take a mean of; fill=zeros needs none")
        return (TensorSpec((self.n, *spec.shape[1:]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        (spec,), tensor = self.infer(specs_of(tensors)), tensors[0]
        whole = tensor.reshape(tensor.shape[0], -1)
        made = self._sums(whole)
        empty = self._empty()
        if empty and self.fill == "mean":
            made[torch.tensor(empty, device=made.device)] = widen(whole).mean(0)
        result = narrow(made, spec.dtype, self.name)
        times = Counter(self.new)
        alone = [(a, b) for a, b, w in zip(self.new, self.old, self.weights) if w == 1 and times[a] == 1]
        if alone:
            to, at = (torch.tensor(side, device=whole.device) for side in zip(*alone))
            result[to] = whole[at]
        return (result.reshape(spec.shape),)

    def _sums(self, whole: Tensor) -> Tensor:
        """The sums, some entries at a time."""
        import torch

        dtype = torch.float64 if whole.dtype == torch.float64 else torch.float32
        made = torch.zeros(self.n, whole.shape[1], dtype=dtype, device=whole.device)
        step = max(1, _BLOCK // max(1, whole.shape[1]))
        for start in range(0, len(self.new), step):
            part = slice(start, start + step)
            new, old = (torch.tensor(tuple(side[part]), device=whole.device) for side in (self.new, self.old))
            weights = torch.tensor(tuple(self.weights[part]), dtype=dtype, device=whole.device)
            made.index_add_(0, new, widen(whole[old]).to(dtype) * weights[:, None])
        return made

    def _empty(self) -> list[int]:
        return sorted(set(range(self.n)).difference(self.new))
