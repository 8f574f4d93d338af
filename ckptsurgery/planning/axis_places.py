"""Where the axes of a rule are in its tensors, for ops that work along one of them by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..ops.base import AxisPlace, Op, OpError, Specs
from .solving import ConcreteDims, Equations
from .steps import ApplyOp

__all__ = ["Axes", "axes_of", "placed_runs"]

Axes = tuple[tuple[tuple[str, int], ...], ...]
"""For each dimension of a tensor the axes in it with their sizes, outermost first."""

_OPAQUE = ""  # the name of what a dimension is where one size depends on another axis


def axes_of(dims: ConcreteDims, shape: Sequence[int], env: Mapping[str, int], equations: Equations) -> Axes:
    """The axes of a tensor with their sizes, as far as they are known; a dimension of ragged axes is one."""
    found: list[tuple[tuple[str, int], ...]] = []
    for axes, size in zip(dims, shape):
        sizes = [equations.product((axis,), env) for axis in axes]
        whole = all(a.marker is None or a.marker in env for a in axes)
        known = [s.const for s in sizes if s is not None and s.unknown is None]
        found.append(
            tuple((a.name, n) for a, n in zip(axes, known)) if whole and len(known) == len(axes) else ((_OPAQUE, size),)
        )
    return tuple(found)


def placed_runs(op: Op, tensors: Iterable[tuple[int, Axes]], specs: Specs) -> tuple[list[ApplyOp], dict[int, Axes]]:
    """The op along its axis, for each place that the axis has; and the axes of each tensor afterwards.

    Args:
        tensors: the number of each tensor and its axes.
        specs: of all tensors.

    Raises:
        OpError: the axis is not in a tensor, or has no size of its own.
    """
    groups: dict[Op, list[tuple[int, ...]]] = {}
    after: dict[int, Axes] = {}
    name = str(getattr(op, "axis"))  # noqa: B009 - a field of such ops
    for number, axes in tensors:
        place = _place(op, name, axes)
        placed = op.placed(place)
        (made,) = placed.infer((specs[number],))
        groups.setdefault(placed, []).append((number,))
        size = made.shape[place.dim] // max(1, place.outer * place.inner)
        after[number] = tuple(tuple((n, size if n == name else s) for n, s in dim) for dim in axes)
    return [ApplyOp(placed, tuple(found)) for placed, found in groups.items()], after


def _place(op: Op, name: str, axes: Axes) -> AxisPlace:
    for dim, inside in enumerate(axes):
        for at, (axis, size) in enumerate(inside):
            if axis == name:
                return AxisPlace(dim, _product(inside[:at]), size, _product(inside[at + 1 :]))
    ragged = any(axis == _OPAQUE for inside in axes for axis, _ in inside)
    why = ", or its size depends on another axis" if ragged else ""
    known = ", ".join(axis for inside in axes for axis, _ in inside if axis and not axis.startswith(("...", "=")))
    where = f"; the axes are {known}" if known else "; name the axes in the rule"
    raise OpError(f"{op.name}: no axis is called {name!r}{why}{where}")


def _product(axes: Sequence[tuple[str, int]]) -> int:
    size = 1
    for _, n in axes:
        size *= n
    return size
