"""Sizes of axes, from source shapes, `dims` and target shapes.

Each dimension of each tensor is an equation: the product of its axes is its size, where a ragged axis counts with its
own size for each value of its marker. Equations with one unknown are solved until nothing new is found. `GivenSizes`
are those that are known beforehand: by `dims`, by choices and ranges, and by what was gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..errors import Diagnostic, Remedy
from ..language.axes import Axis, AxisList, Dim
from ..language.domains import numbers_of
from ..language.keys import Span
from ..wording import counted
from .expanding import ResolvedRule
from .joining import Group
from .rule_ops import spellings

__all__ = ["ConcreteDims", "Equations", "GivenSizes", "SizeError", "Variable", "concrete", "extent"]

Variable = tuple[str, int | None]
"""An axis name, and the value of its marker where it has one."""

ConcreteDims = tuple[tuple[Axis, ...], ...]
"""The dimensions of one tensor, with `...` and optional axes settled."""

Env = Mapping[str, int]

Tensors = Sequence[tuple[ConcreteDims, Env, Sequence[int]]]
"""Dimensions, marker values that the key fixes, and shape of each tensor."""


class SizeError(Exception):
    """The sizes contradict each other or stay open; `diagnostic` says which.

    Args:
        axis: the axis whose size is open.
    """

    def __init__(self, diagnostic: Diagnostic, axis: str | None = None) -> None:
        super().__init__(str(diagnostic))
        self.diagnostic = diagnostic
        self.axis = axis


def concrete(axes: AxisList, rank: int) -> tuple[ConcreteDims, int, bool]:
    """The dimensions of a tensor of this rank, the number that `...` stands for, and whether optional axes are there.

    Raises:
        SizeError: the rank does not fit.
    """
    firm = sum(not d.optional and not d.ellipsis for d in axes.dims)
    optional = sum(d.optional for d in axes.dims)
    present = optional > 0 and rank >= firm + optional
    left_alone = rank - firm - (optional if present else 0)
    if left_alone < 0 or (left_alone > 0 and not axes.has_ellipsis):
        raise SizeError(Diagnostic("rank-mismatch", f"{axes} does not fit a tensor of {counted(rank, 'dimension')}"))
    return settle(axes, left_alone, present), left_alone, present


def settle(axes: AxisList, left_alone: int, present: bool) -> ConcreteDims:
    """The dimensions with `...` standing for `left_alone` of them and optional axes there or not."""
    dims: list[tuple[Axis, ...]] = []
    for dim in axes.dims:
        if dim.ellipsis:
            dims += [(Axis(f"...{n}"),) for n in range(left_alone)]
        elif not dim.optional or present:
            dims.append(dim.axes)
    return tuple(_numbered(dims))


def _numbered(dims: Sequence[tuple[Axis, ...]]) -> list[tuple[Axis, ...]]:
    """Literal sizes become axes of their own, the same ones on both sides in order; ones vanish."""
    seen: dict[int, int] = {}
    result = []
    for dim in dims:
        axes = []
        for axis in dim:
            if axis.size is not None and axis.size != 1:
                seen[axis.size] = seen.get(axis.size, 0) + 1
                axis = replace(axis, name=f"={axis.size}#{seen[axis.size]}")
            axes.append(axis)
        result.append(tuple(axes))
    return result


def whole(rank: int) -> AxisList:
    """The axis list of a tensor that moves as it is."""
    return AxisList((Dim(ellipsis=True),)) if rank else AxisList(())


@dataclass(frozen=True)
class Linear:
    """`const + coefficient * unknown`: what one equation may hold."""

    const: int
    coefficient: int = 0
    unknown: Variable | None = None

    def times(self, other: Linear) -> Linear | None:
        """The product, None where it is no longer linear."""
        if self.unknown is not None and other.unknown is not None:
            return None
        if self.unknown is None:
            return Linear(self.const * other.const, self.const * other.coefficient, other.unknown)
        return other.times(self)

    def plus(self, other: Linear) -> Linear | None:
        """The sum, None where two unknowns meet."""
        if self.unknown is not None and other.unknown is not None and self.unknown != other.unknown:
            return None
        return Linear(self.const + other.const, self.coefficient + other.coefficient, self.unknown or other.unknown)


@dataclass
class Equations:
    """The sizes known so far, and the equations that may give more.

    Args:
        given: the size that `dims` or the keys give for a variable, or None.
        solved: sizes found.
        by_division: variables found from a source by division alone.
    """

    given: Callable[[str, int | None], int | None]
    solved: dict[Variable, int] = field(default_factory=dict)
    by_division: set[Variable] = field(default_factory=set)

    def size(self, axis: Axis, env: Env) -> Linear:
        """The size of one axis under these marker values."""
        if axis.size is not None:
            return Linear(axis.size)
        variable = self.variable(axis, env)
        known = self.solved.get(variable)
        if known is None:
            known = self.given(*variable)
            if known is not None:
                self.solved[variable] = known
        return Linear(known) if known is not None else Linear(0, 1, variable)

    @staticmethod
    def variable(axis: Axis, env: Env) -> Variable:
        """The variable behind an axis: one for each value of its marker."""
        return (axis.name, env.get(axis.marker) if axis.marker else None)

    def product(self, axes: Sequence[Axis], env: Env) -> Linear | None:
        """The size of axes merged into one dimension, None where it is not linear in one unknown."""
        if not axes:
            return Linear(1)
        first, inner = axes[0], axes[1:]
        outer = self.size(first, env)
        if not any(a.marker == first.name for a in inner):
            rest = self.product(inner, env)
            return rest and outer.times(rest)
        if outer.unknown is not None:
            return None
        total: Linear | None = Linear(0)
        for value in range(outer.const):
            block = self.product(inner, {**env, first.name: value})
            total = total.plus(block) if total is not None and block is not None else None
        return total

    def open(self, dims: ConcreteDims, places: Sequence[Env]) -> bool:
        """Whether a dimension has no size yet at one of these marker values."""
        sizes = (self.product(axes, env) for axes in dims for env in places)
        return any(size is None or size.unknown is not None for size in sizes)

    def solve_both(self, sources: Tensors, targets: Tensors) -> None:
        """Take in the equations of both sides, so that the sizes of one are held against the other.

        Raises:
            SizeError: as for `solve`.
        """
        known = -1
        while known < len(self.solved):
            known = len(self.solved)
            self.solve(targets, certain=True)
            self.solve(sources, certain=False)

    def solve(self, tensors: Tensors, *, certain: bool) -> None:
        """Take in the equations of these tensors until nothing new follows.

        Args:
            certain: whether the shapes confirm what they solve (a target's do); else a division alone is noted.

        Raises:
            SizeError: a contradiction, or a size that does not divide.
        """
        progress = True
        while progress:
            progress = False
            for dims, env, shape in tensors:
                for axes, size in zip(dims, shape):
                    progress |= self.take(axes, env, size, certain)

    def take(self, axes: Sequence[Axis], env: Env, size: int, certain: bool) -> bool:
        """Solve one dimension for its unknown; whether something new was found."""
        total = self.product(axes, env)
        if total is None:
            return False
        if total.unknown is None or total.coefficient == 0:
            if total.const != size:
                raise SizeError(self.contradiction(axes, env, total.const, size))
            return False
        rest = size - total.const
        if rest < 0:
            text = f"'{shown(axes)}' should be {total.const} or more, but the dimension is {size}"
            raise SizeError(Diagnostic("size-mismatch", text, facts=(("sizes", self.listed(axes, env)),)))
        if rest % total.coefficient:
            raise SizeError(self.indivisible(axes, total, size))
        self.solved[total.unknown] = rest // total.coefficient
        if total.coefficient > 1 and not certain:
            self.by_division.add(total.unknown)
        return True

    def contradiction(self, axes: Sequence[Axis], env: Env, expected: int, size: int) -> Diagnostic:
        """The diagnostic for a dimension that is not what its axes make."""
        if all(axis.size is not None for axis in axes):
            return Diagnostic("size-mismatch", f"the rule writes {shown(axes)}, and the dimension is {size}")
        if len(axes) == 1 and str(axes[0]).startswith("..."):
            place = str(axes[0]).removeprefix("...")
            text = f"dimension {place} of '...' is {expected} in one tensor and {size} in another"
            return Diagnostic("size-mismatch", text)
        text = f"'{shown(axes)}' should be {expected}, but the dimension is {size}"
        return Diagnostic("size-mismatch", text, facts=(("sizes", self.listed(axes, env)),))

    def indivisible(self, axes: Sequence[Axis], total: Linear, size: int) -> Diagnostic:
        """The diagnostic for a dimension that its known axes do not divide."""
        unknown = total.unknown[0] if total.unknown else "?"
        less = f" less {total.const}" if total.const else ""
        return Diagnostic(
            "indivisible",
            f"'{shown(axes)}' of {size}{less} is no multiple of {total.coefficient}, so {unknown!r} has no size",
            facts=(("sizes", self.listed(axes, {})),),
            advice="check the axes, and the sizes that are given for them",
        )

    def listed(self, axes: Sequence[Axis], env: Env) -> str:
        """The sizes of axes, for a diagnostic."""
        parts = []
        for axis in axes:
            if axis.size is None:
                known = [f"{n}" for (name, _), n in self.solved.items() if name == axis.name]
                parts.append(f"{axis} = {' / '.join(known) or '?'}")
        return ", ".join(parts)


def shown(axes: Sequence[Axis]) -> str:
    """Axes as a rule writes them, literal sizes by their digits."""
    text = " ".join(str(a.size) if a.size is not None else str(a) for a in axes)
    return f"({text})" if len(axes) > 1 else text


def extent(equations: Equations, axes: Sequence[Axis], env: Env) -> int:
    """The size of axes merged into one dimension, all sizes known.

    Raises:
        SizeError: one is not; the axis is named, and the size that settles it.
    """
    total = equations.product(axes, env)
    if total is None or total.unknown is not None:
        variable = total.unknown if total and total.unknown else _open(equations, axes, env)
        name = variable[0]
        text = f"the size of axis {name!r} does not follow from any shape"
        raise SizeError(Diagnostic("unsolved-axis", text, remedies=(Remedy.size(name),)), name)
    return total.const


def _open(equations: Equations, axes: Sequence[Axis], env: Env) -> Variable:
    """The first size that is not known, a ragged one at the first value of its marker that lacks it."""
    known: dict[str, int] = {}
    for axis in axes:
        values = range(known[axis.marker]) if axis.marker in known else [env.get(axis.marker or "", 0)]
        for value in values:
            size = equations.size(axis, {**env, **({axis.marker: value} if axis.marker else {})})
            if size.unknown is not None:
                return size.unknown
            known[axis.name] = size.const
    return (axes[0].name, None)


@dataclass(frozen=True)
class GivenSizes:
    """What is known of the sizes of one rule before any shape is looked at."""

    bound: ResolvedRule

    def size(self, name: str, value: int | None, group: Group, scattered: Sequence[str]) -> int | None:
        """The size of an axis, or None.

        Args:
            value: of the name on which the size depends, where it does.
            group: what one step reads. scattered: names that only the targets' keys bind.
        """
        signature = self.bound.signature
        if value is None and name in signature.counts:
            return signature.counts[name]
        if name in group.extents:
            return group.extents[name]
        known = self.bound.dims.get(name)
        if isinstance(known, int):
            return known
        if isinstance(known, tuple):
            stage = self._stage(name, group) if value is None else self._value(name, value)
            return known[stage] if stage is not None and stage < len(known) else None
        if isinstance(known, dict) and value is not None:
            return self._by_choice(known, name, value)
        if name in scattered and value is None and name in self.spans:
            return int(self.spans[name].last) - int(self.spans[name].first) + 1
        return None

    def _stage(self, name: str, group: Group) -> int | None:
        """The outermost index of the flat index that a name is part of, where the group fixes it."""
        for outer, *inner in self.bound.flats:
            if name in inner and outer in group.values:
                return int(group.values[outer])
        return None

    def _value(self, name: str, index: int) -> int:
        """The captured integer behind an index of the name that an axis depends on; of other choices the position."""
        signature = self.bound.signature
        for marker in self._markers_of(name):
            numbers = numbers_of(self.bound.rule, marker)
            if numbers is not None:
                return numbers[index] if index < len(numbers) else index
            span = self.spans.get(marker)
            if span is not None and marker in (*signature.gathered, *signature.scattered):
                return index + int(span.first)
        return index

    def _by_choice(self, table: Mapping[str, int], name: str, index: int) -> int | None:
        spelled = [spelling for marker in self._markers_of(name) for spelling in spellings(self.bound.rule, marker)]
        for spelling in spelled:
            if index < len(spelling) and spelling[index] in table:
                return table[spelling[index]]
        return None if spelled else table.get(str(self._value(name, index)))

    def _markers_of(self, name: str) -> list[str]:
        return sorted({str(axis.marker) for axis in self.bound.rule.marked if axis.name == name})

    @cached_property
    def spans(self) -> dict[str, Span]:
        """The range of each name that has one."""
        terms = (*self.bound.rule.sources, *self.bound.rule.targets)
        return {c.name: c.span for t in terms for c in t.pattern.captures if c.span is not None}
