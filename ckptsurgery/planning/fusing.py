"""Axes that travel together need no sizes of their own: `(h hd)` on both sides is one run of rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from ..language.axes import Axis
from .solving import ConcreteDims

__all__ = ["fused"]


def fused(left: ConcreteDims, right: ConcreteDims, apart: Collection[str]) -> tuple[ConcreteDims, ConcreteDims]:
    """Both sides with every two axes merged that stand next to each other, in the same order, wherever either stands.

    >>> heads, size, part = Axis("h", marker="p"), Axis("hd"), Axis("p")
    >>> fused(((heads, size),), ((part, heads, size),), {"p"})[1]
    ((Axis(name='p', marker=None, choices=None, size=None), Axis(name='h hd', marker='p', choices=None, size=None)),)

    Args:
        apart: names that must stay as they are, since a key, a marker or an op speaks of them.
    """
    sides = (*left, *right)
    found = _pair(sides, apart)
    while found is not None:
        sides = tuple(_merged(axes, *found) for axes in sides)
        found = _pair(sides, apart)
    return sides[: len(left)], sides[len(left) :]


def _pair(sides: ConcreteDims, apart: Collection[str]) -> tuple[Axis, Axis] | None:
    for axes in sides:
        for a, b in pairwise(axes):
            plain = not {a.name, b.name} & set(apart) and a.size is None and b.size is None
            one_marker = a.marker is None or b.marker is None or a.marker == b.marker
            if plain and one_marker and all(_together(other, a, b) for other in sides):
                return a, b
    return None


def _together(axes: Sequence[Axis], a: Axis, b: Axis) -> bool:
    """Whether both stand here, the second right after the first, or neither."""
    if a not in axes or b not in axes:
        return not any(axis.name in (a.name, b.name) for axis in axes)
    return axes.index(b) == axes.index(a) + 1


def _merged(axes: Sequence[Axis], a: Axis, b: Axis) -> tuple[Axis, ...]:
    if a not in axes:
        return tuple(axes)
    at = axes.index(a)
    return (*axes[:at], Axis(f"{a.name} {b.name}", marker=a.marker or b.marker), *axes[at + 2 :])
