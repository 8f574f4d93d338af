"""Ops that pick, leave out and add entries of an axis by index: `take`, `drop_rows`, `insert_rows`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..specs import TensorSpec
from .along import RowsOp
from .base import Op, OpError, Specs, Tensors
from .listing import Listing
from .numerics import bits, narrow, specs_of, widen
from .operands import arithmetic_float, operands, whole_elements
from .registry import op
from .rows import fill, holds

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DropRows", "InsertRows", "Take"]

Indices = tuple[int, ...]


@op
@dataclass(frozen=True)
class Take(RowsOp):
    """Take entries of an axis by index, in this order; an index may stand several times.

    result[j] = tensor[ids[j]], along the axis.

    >>> op = Take("x", (2, 0))
    >>> op.infer((TensorSpec([3, 5], "F32"),)), str(op)
    ((TensorSpec(shape=(2, 5), dtype='F32'),), 'take(axis=x, ids=[2, 0])')
    >>> str(Take("x", (2, 0, 1)).inverse())
    'take(axis=x, ids=[1, 2, 0])'

    Args:
        axis: the axis of the rule, alone in its dimension or merged with others: `[(h d) x] | take(h, heads)`.
        ids: indices from 0. A name of `[dims]` or `[data]`; `ids:i` has its own list for each value of `{i}`.
        back: put the entries back where `ids` took them from, result[ids[j]] = tensor[j]; `ids` is a permutation then.
        shared: divide each entry by how often it is taken: the inputs of a layer behind neurons that were repeated
            (Chen et al., "Net2Net", 2016).

    Nothing is computed but with `shared`, in float32 (float64 for float64) and rounded once. The inverse is exact for a
    permutation; other lists lose or repeat entries and have none.

    Raises:
        OpError: an index that is not there; `back` with a list that is not a permutation; `shared` of integers.
    """

    name = "take"
    axis: str
    ids: Indices
    back: bool = False
    shared: bool = False

    def infer(self, specs: Specs) -> Specs:
        spec = _rows(self, specs)
        if self.shared:
            arithmetic_float(self, spec)
        count = spec.shape[0]
        _check(self, self.ids, count)
        if self.back and not _is_permutation(self.ids, count):
            raise OpError(f"{_shown(self, self.ids)} is not a permutation of {count} entries, and cannot be undone")
        return (TensorSpec((len(self.ids), *spec.shape[1:]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        picked = _picked(tensors[0], _turned(self.ids) if self.back else self.ids)
        if not self.shared:
            return (picked,)
        times = Counter(self.ids)
        counts = widen(picked).new_tensor([times[i] for i in self.ids])
        return (narrow(widen(picked) / counts.reshape(-1, *(1 for _ in spec.shape[1:])), spec.dtype, str(self)),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        count = len(self.ids) if inputs is None else inputs[0].shape[0]
        if not _is_permutation(self.ids, count):
            return None
        return Take(self.axis, self.ids if self.back else _turned(self.ids))

    def on_moments(self) -> Op | None:
        return self if len(set(self.ids)) == len(self.ids) else None

    @classmethod
    def undone_as(cls, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        if given.get("shared"):
            return None
        kept = {name: value for name, value in given.items() if name != "back"}
        return cls.name, kept if given.get("back") else kept | {"back": True}


@op
@dataclass(frozen=True)
class DropRows(RowsOp):
    """Leave out entries of dim 0, or of an axis, by index.

    >>> DropRows((1,)).infer((TensorSpec([3, 5], "F32"),)), str(DropRows((1,), "h"))
    ((TensorSpec(shape=(2, 5), dtype='F32'),), 'drop_rows(ids=[1], axis=h)')

    Args:
        ids: indices from 0, each once, in any order; `ids:i` has its own list for each value of `{i}`.
        axis: the axis of the rule whose entries are meant; dim 0 where left out.

    Nothing is computed. What is left out is lost: there is no inverse.

    Raises:
        OpError: an index that is not there or is named twice.
    """

    name = "drop_rows"
    ids: Indices
    axis: str | None = None

    def infer(self, specs: Specs) -> Specs:
        spec = _rows(self, specs)
        _check(self, self.ids, spec.shape[0], once=True)
        return (TensorSpec((spec.shape[0] - len(self.ids), *spec.shape[1:]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        self.infer(specs_of(tensors))
        lost = set(self.ids)
        kept = tuple(i for i in range(tensors[0].shape[0]) if i not in lost)
        return (_picked(tensors[0], kept),)

    def on_moments(self) -> Op:
        return self


@op
@dataclass(frozen=True)
class InsertRows(RowsOp):
    """Add entries of one value to dim 0, or to an axis, at these indices of the result.

    >>> op = InsertRows((1,))
    >>> op.infer((TensorSpec([3, 5], "F32"),)), str(op.inverse())
    ((TensorSpec(shape=(4, 5), dtype='F32'),), 'drop_rows(ids=[1])')

    Args:
        ids: indices of the new entries, each once; `ids:i` has its own list for each value of `{i}`.
        value: what the new entries hold; an integer where the tensor holds integers.
        axis: as for `drop_rows`.

    Old entries are moved, not computed. The inverse, `drop_rows`, is exact.

    Raises:
        OpError: an index beyond the result, or named twice; a value that the dtype cannot hold.
    """

    name = "insert_rows"
    ids: Indices
    value: int | float = 0
    axis: str | None = None

    def infer(self, specs: Specs) -> Specs:
        spec = _rows(self, specs)
        holds(self, spec, self.value)
        count = spec.shape[0] + len(self.ids)
        _check(self, self.ids, count, once=True)
        return (TensorSpec((count, *spec.shape[1:]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        old, added = tensors[0].shape[0], set(self.ids)
        row = tensors[0].new_empty(1, *spec.shape[1:])
        fill(row, self.value)
        places = iter(range(old))
        ids = tuple(old if i in added else next(places) for i in range(spec.shape[0]))
        return (_picked(_stacked(tensors[0], row), ids),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return DropRows(self.ids, self.axis)

    def on_moments(self) -> Op:
        return replace(self, value=0)

    @classmethod
    def undone_as(cls, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        return DropRows.name, {name: value for name, value in given.items() if name != "value"}


def _rows(op: Op, specs: Specs) -> TensorSpec:
    (spec,) = operands(op, specs, "one tensor")
    if not spec.shape:
        raise OpError(f"{op.name} works along an axis, and {spec} has none")
    return whole_elements(op, spec)


def _check(op: Op, ids: Indices, count: int, *, once: bool = False) -> None:
    odd = [] if ids and 0 <= min(ids) <= max(ids) < count else [i for i in ids if not 0 <= i < count]
    if odd:
        raise OpError(f"{_shown(op, ids)}: there is no entry {odd[0]} among {count}")
    if once and len(set(ids)) < len(ids):
        raise OpError(f"{_shown(op, ids)}: an index stands twice")


def _is_permutation(ids: Indices, count: int) -> bool:
    return len(ids) == count and set(ids) == set(range(count))


def _turned(ids: Indices) -> Indices:
    """The indices that put back what these take."""
    places = dict(zip(ids, range(len(ids))))
    return tuple(places[i] for i in range(len(ids)))


def _picked(tensor: Tensor, ids: Indices) -> Tensor:
    """Entries of dim 0, moved as integers of the same width: torch does not index all dtypes."""
    import torch

    index = torch.tensor(tuple(ids), dtype=torch.int64, device=tensor.device)
    whole = tensor.contiguous()
    return (whole if whole.is_complex() else bits(whole)).index_select(0, index).view(tensor.dtype)


def _stacked(tensor: Tensor, row: Tensor) -> Tensor:
    """A tensor with one row more."""
    result = tensor.new_empty(tensor.shape[0] + 1, *tensor.shape[1:])
    result[:-1] = tensor
    result[-1:] = row
    return result


def _shown(op: Op, ids: Indices) -> str:
    """The op with its indices, or with the name of a longer list."""
    listed = str(ids) if isinstance(ids, Listing) else str(list(ids)) if len(ids) <= 8 else f"{len(ids)} indices"
    return f"{op.name}({listed})"
