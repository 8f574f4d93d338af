"""Sides seen in another cut (stacks as slices, heads as rows), for tensors of which none is whole in the other side.

Where one side stacks experts and the other fuses the parts of each, no tensor is made of whole tensors. Between the
slices of the one and the tensors of the other the ordinary moves are found. A view is a stage of the recipe of its own,
before the others for a source and after them for a target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..specs import TensorSpec
from .findings import Finding
from .moves import TensorMove

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CutView", "Loadable", "TensorLoads", "ViewedSide", "complete", "flattened", "unstacked", "with_views"]

_AXES = "abcdfghk"
_MOST_SLICES = 512

Specs = Mapping[str, TensorSpec]


class Loadable(Protocol):
    """What loads a tensor."""

    def load(self) -> Tensor:
        """The tensor."""


class TensorLoads(Protocol):
    """Tensors by key, each loaded when it is asked for."""

    def __getitem__(self, key: str) -> Loadable: ...


@dataclass(frozen=True)
class CutView:
    """A tensor that is seen as its slices along the first axis, or with its first two axes as one.

    >>> view = CutView("w", TensorSpec([2, 3, 4], "F32"), True)
    >>> view.specs, view.move(True).left, view.move(True).right
    ({'w.0': TensorSpec(shape=(3, 4), dtype='F32'), 'w.1': TensorSpec(shape=(3, 4), dtype='F32')}, '[e a b]', '[a b]')

    Args:
        key: the tensor.
        spec: its header.
        slices: whether it is seen as slices.
    """

    key: str
    spec: TensorSpec
    slices: bool

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The keys that are seen, with headers."""
        first, *others = self.spec.shape
        if self.slices:
            return {f"{self.key}.{n}": TensorSpec(tuple(others), self.spec.dtype) for n in range(first)}
        return {self.key: TensorSpec((first * others[0], *others[1:]), self.spec.dtype)}

    def load(self, key: str, whole: Tensor) -> Tensor:
        """The part that a key shows."""
        return whole[int(key.rpartition(".")[2])] if self.slices else whole.flatten(0, 1)

    def move(self, forward: bool) -> TensorMove:
        """The move from the tensor to its parts, or back."""
        names, seen = list(_AXES[: len(self.spec.shape) - 1]), tuple(self.specs)
        if self.slices:
            whole, part = f"[{' '.join(['e', *names])}]", f"[{' '.join(names)}]"
            if forward:
                return TensorMove((self.key,), seen, whole, part, "stack", dims=(("e", len(seen)),))
            return TensorMove(seen, (self.key,), part, whole, "stack")
        whole, part = f"[{' '.join(['heads', *names])}]", f"[{' '.join([f'(heads {names[0]})', *names[1:]])}]"
        if forward:
            return TensorMove((self.key,), (self.key,), whole, part)
        return TensorMove((self.key,), (self.key,), part, whole, dims=(("heads", self.spec.shape[0]),))


def unstacked(specs: Specs) -> list[CutView]:
    """The tensors that may be stacks, as their slices: matrices only where something larger is as deep."""
    deep = {spec.shape[0] for spec in specs.values() if len(spec.shape) > 2}
    return [
        CutView(key, spec, True)
        for key, spec in specs.items()
        if len(spec.shape) > 1 and 1 < spec.shape[0] <= _MOST_SLICES and spec.shape[0] in deep and spec.numel
    ]


def flattened(specs: Specs) -> list[CutView]:
    """The tensors whose first axis may be heads, with their first two axes as one; a bias of heads is a matrix."""
    heads = {spec.shape[:2] for spec in specs.values() if len(spec.shape) > 2}
    return [
        CutView(key, spec, False)
        for key, spec in specs.items()
        if len(spec.shape) > 1 and spec.shape[:2] in heads and min(spec.shape) > 1
    ]


def with_views(specs: Specs, views: Iterable[CutView]) -> dict[str, TensorSpec]:
    """The headers of a side, with the parts in place of the tensors."""
    seen = {view.key: view.specs for view in views}
    return {k: s for key, spec in specs.items() for k, s in seen.get(key, {key: spec}).items()}


class ViewedSide:
    """A side of which some tensors are seen in another cut."""

    def __init__(self, side: TensorLoads, views: Sequence[CutView]) -> None:
        self._side = side
        self._views = {key: view for view in views for key in view.specs}
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, key: str) -> Loadable:
        return _SeenTensor(self, key)

    def load(self, key: str) -> Tensor:
        """A tensor, or a part of one; the last whole one is kept for its other slices."""
        view = self._views.get(key)
        if view is None:
            return self._side[key].load()
        if self._last is None or self._last[0] != view.key:
            self._last = view.key, self._side[view.key].load()
        return view.load(key, self._last[1])


@dataclass(frozen=True)
class _SeenTensor:
    side: ViewedSide
    key: str

    def load(self) -> Tensor:
        return self.side.load(self.key)


def complete(findings: Sequence[Finding], views: Sequence[CutView]) -> list[Finding]:
    """The findings but for those that make only some of a target's parts."""
    kept = list(findings)
    while True:
        made = {key for finding in kept for key in finding.targets}
        lost = {key for view in views if not made >= view.specs.keys() for key in view.specs}
        fewer = [finding for finding in kept if not lost & set(finding.targets)]
        if len(fewer) == len(kept):
            return kept
        kept = fewer
