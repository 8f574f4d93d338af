"""From a group of sources to a program: sizes solved, axes turned into pieces, ops inferred.

Programs know no keys: groups of equal shapes (all layers, usually) share one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from ..errors import Diagnostic
from ..language.axes import Axis, AxisList
from ..language.keys import is_index
from ..language.rules import Term
from ..ops.base import Op, OpError, Specs
from ..specs import DTYPES, TensorSpec
from ..wording import counted
from .axis_places import Axes, axes_of, placed_runs
from .expanding import ResolvedRule
from .fusing import fused
from .joining import Group
from .layout import Layout, Side, arrange, side_by_side
from .rule_ops import RuleOps
from .solving import ConcreteDims, Equations, GivenSizes, SizeError, concrete, extent, settle, whole
from .steps import ApplyOp, Instruction, Move, Program, Select

__all__ = ["Built", "ProgramBuilder"]


@dataclass(frozen=True)
class Built:
    """A program, with the grid of scattered indices of each target term and what was only assumed.

    Args:
        program: the work.
        grids: for each target term its scattered names and, in the order of the program's outputs, their indices.
        interleaved: whether outputs go index by index over all terms, rather than term by term.
        assumed: splits that nothing but divisibility supports.
        sizes: of the axes, as they were solved, or as ops behind the rearrangement made them.
    """

    program: Program
    grids: tuple[tuple[tuple[str, ...], tuple[tuple[int, ...], ...]], ...]
    interleaved: bool
    assumed: tuple[str, ...]
    sizes: Mapping[str, int]


@dataclass
class Arrival:
    """One tensor per row, on its way to the target."""

    dims: AxisList | None
    bound: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...]
    specs: Specs


@dataclass
class ProgramBuilder:
    """Builds the programs of one rule."""

    bound: ResolvedRule
    ops: RuleOps
    targets: Mapping[str, TensorSpec] | None
    given: GivenSizes = field(init=False)
    _assumed: list[str] = field(default_factory=list)
    _sizes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.given = GivenSizes(self.bound)

    def build(
        self, group: Group, inputs: Specs, target_shapes: Sequence[Mapping[tuple[int, ...], TensorSpec]]
    ) -> Built:
        """The program of one group.

        Args:
            inputs: specs of the group's sources, in order.
            target_shapes: for each target term the specs that the target has, by scattered index.

        Raises:
            SizeError, OpError: what does not fit.
        """
        self._assumed, self._sizes = [], {}
        instructions: list[Instruction] = []
        arrivals = self._before(group, inputs, instructions)
        env = self._env(group)
        terms = self.bound.rule.targets
        # ways[n] is one (arrival, target term) pair whose tensors the move makes
        if self.ops.joined_after:
            ways = [(a, _arranged_by(terms)) for a in range(len(arrivals))]
        elif len(arrivals) == 1:
            if len(terms) > 1:
                instructions.append(Select(tuple(range(len(arrivals[0].specs))) * len(terms)))
            ways = [(0, t) for t in range(len(terms))]
        elif len(arrivals) == len(terms):
            ways = [(n, n) for n in range(len(terms))]
        else:
            came = f"{counted(len(arrivals), 'tensor', 'arrives')} at {counted(len(terms), 'target')}"
            raise OpError(f"{came}: an op has to join them, or more targets to take them")
        layouts, grids, axes = [], [], []
        for arrival, term in ways:
            layout, grid, found = self._layout(arrivals[arrival], terms[term], group, env, target_shapes[term])
            layouts.append(layout)
            grids.append(grid)
            axes += found
        dtypes = self._dtypes(layouts, [arrivals[a] for a, _ in ways])
        move = Move(side_by_side(layouts), dtypes)
        _check_packed(move)
        instructions.append(move)
        grids = self._after(len(ways), grids, instructions, axes, inputs)
        program = Program.of(inputs, instructions)
        self._check_targets(len(program.outputs), len(grids[0][1]), sum(len(indices) for _, indices in grids))
        return Built(program, tuple(grids), self.ops.joined_after, tuple(self._assumed), self._sizes)

    def _check_targets(self, made: int, times: int, named: int) -> None:
        """Hold the number of tensors made against the number of keys: none is lost, and none made of nothing."""
        if made != named:
            op = next((op for op in reversed(self.ops.after) if op.joins), self.ops.after[-1])
            targets = counted(len(self.bound.rule.targets), "target")
            raise OpError(f"{op} makes {counted(made // times, 'tensor')}, and the rule has {targets}")

    def _before(self, group: Group, inputs: Specs, instructions: list[Instruction]) -> list[Arrival]:
        specs = inputs
        width = [len(rows[0]) for rows in group.rows]
        starts = [0]
        for rows, w in zip(group.rows, width):
            starts.append(starts[-1] + len(rows) * w)
        units = [
            [tuple(range(s + r * w, s + (r + 1) * w)) for r in range(len(rows))]
            for s, rows, w in zip(starts, group.rows, width)
        ]
        for op in self.ops.before:
            if op.axis_role == "along":
                runs, _ = placed_runs(op, self._source_axes(group, units, specs), specs)
                for run in runs:
                    specs = run.after(specs)
                instructions += runs
                continue
            if op.axis_role is not None:
                continue
            flat = [unit for term in units for unit in term]
            groups = tuple(flat) if op.joins else tuple((i,) for unit in flat for i in unit)
            run = ApplyOp(op, groups)
            made = [len(op.infer(tuple(specs[i] for i in g))) for g in groups]
            specs = run.after(specs)
            instructions.append(run)
            if op.joins:
                numbers = iter(range(len(specs)))
                counts = iter(made)
                units = [[tuple(next(numbers) for _ in range(next(counts))) for _ in term] for term in units]
        # Each output of an op that gives several arrives for itself, with the rows that are gathered together.
        order = tuple(unit[output] for term in units for output in range(len(term[0])) for unit in term)
        arrivals = self._arrivals(group, units, specs)
        if order != tuple(range(len(order))):
            instructions.append(Select(order))
        return arrivals

    def _source_axes(
        self, group: Group, units: list[list[tuple[int, ...]]], specs: Specs
    ) -> Iterator[tuple[int, Axes]]:
        """The tensors before the rearrangement, each with the axes that its term names."""
        sources, env = self.bound.rule.sources, self._env(group)
        for number, term in enumerate(units):
            for row, unit in enumerate(term):
                here = {**env, **dict(zip(group.bound[number], group.indices[number][row]))}
                for at, tensor in enumerate(unit):
                    axes = sources[at if self.ops.joined_before and at < len(sources) else number].axes
                    shape = specs[tensor].shape
                    dims, _, _ = concrete(axes if axes is not None else whole(len(shape)), len(shape))
                    equations = Equations(lambda name, value: self.given.size(name, value, group, ()))
                    equations.solve([(dims, here, shape)], certain=False)
                    yield tensor, axes_of(dims, shape, here, equations)

    def _arrivals(self, group: Group, units: list[list[tuple[int, ...]]], specs: Specs) -> list[Arrival]:
        sources = self.bound.rule.sources
        joined = self.ops.joined_before
        arrivals = []
        for number, term in enumerate(units):
            axes = next((t.axes for t in sources if t.axes), None) if joined else sources[number].axes
            for output in range(len(term[0])):
                own = tuple(specs[unit[output]] for unit in term)
                arrivals.append(Arrival(axes, group.bound[number], group.indices[number], own))
        return arrivals

    def _dtypes(self, layouts: Sequence[Layout], arrivals: Sequence[Arrival]) -> tuple[str, ...]:
        dtypes: list[str] = []
        for layout, arrival in zip(layouts, arrivals):
            found = {s.dtype for s in arrival.specs}
            if len(found) > 1:
                raise SizeError(
                    Diagnostic(
                        "dtype-mismatch",
                        f"sources of different dtypes become one tensor: {', '.join(sorted(found))}",
                        help="cast them first: SOURCE | cast(f32) -> TARGET",
                    )
                )
            dtypes += [found.pop()] * len(layout.targets)
        return tuple(dtypes)

    def _after(
        self,
        ways: int,
        grids: list[Grid],
        instructions: list[Instruction],
        axes: list[Axes],
        inputs: Specs,
    ) -> list[Grid]:
        """Append the ops after the move; `grids` is left with one grid for each target term."""
        count = sum(len(indices) for _, indices in grids)
        singles = tuple((i,) for i in range(count))
        instructions += [ApplyOp(op, singles) for op in self.ops.over("reduce")]
        joined = False
        for op in self.ops.after:
            if op.axis_role == "along":
                runs, found = placed_runs(op, enumerate(axes), Program.of(inputs, instructions).outputs)
                instructions += runs
                axes = [found[n] for n in range(len(axes))]
                self._resized(op, axes)
            if op.axis_role is not None:
                continue
            if op.joins and not joined:
                size = len(grids[0][1])
                instructions.append(ApplyOp(op, tuple(tuple(w * size + s for w in range(ways)) for s in range(size))))
                terms = len(self.bound.rule.targets)
                grids = [grids[0]] * terms
                count, joined = size * terms, True
                axes = [axes[s] for s in range(size) for _ in range(terms)]
            else:
                instructions.append(ApplyOp(op, tuple((i,) for i in range(count))))
        return grids

    def _resized(self, op: Op, axes: Sequence[Axes]) -> None:
        """Note the size that an axis has in what is made."""
        name = str(getattr(op, "axis"))  # noqa: B009 - a field of ops along an axis
        made = {size for dims in axes for inside in dims for axis, size in inside if axis == name}
        if len(made) == 1:
            self._sizes[name] = made.pop()

    def _env(self, group: Group) -> dict[str, int]:
        return {n: int(v) for n, v in group.values.items() if is_index(str(v))}

    def _layout(
        self,
        arrival: Arrival,
        term: Term,
        group: Group,
        env: Mapping[str, int],
        wanted: Mapping[tuple[int, ...], TensorSpec],
    ) -> tuple[Layout, Grid, list[Axes]]:
        ranks = {len(s.shape) for s in arrival.specs}
        if len(ranks) > 1:
            raise SizeError(
                Diagnostic("rank-mismatch", "the tensors that are gathered have different numbers of dimensions")
            )
        rank = ranks.pop()
        dims, left_alone, present = concrete(arrival.dims if arrival.dims is not None else whole(rank), rank)
        reduced = tuple(str(getattr(op, "axis")) for op in self.ops.over("reduce"))  # noqa: B009 - a field of such ops
        arrived = dims if term.axes is None else settle(term.axes, left_alone, present)
        target_dims = (*((Axis(n),) for n in reduced), *arrived)
        scattered = tuple(n for n in self.bound.signature.scattered if n in term.pattern.names)
        try:
            return self._arranged(arrival, dims, target_dims, term, scattered, reduced, group, env, wanted)
        except SizeError as open_axis:
            apart = {
                *env,
                *arrival.bound,
                *scattered,
                *reduced,
                *self.bound.signature.counts,
                *self.bound.signature.over,
            }
            apart |= {str(a.marker) for axes in (*dims, *target_dims) for a in axes if a.marker}
            together = fused(dims, target_dims, apart)
            if open_axis.diagnostic.code != "unsolved-axis" or together == (dims, target_dims):
                raise
            try:
                return self._arranged(arrival, *together, term, scattered, reduced, group, env, wanted)
            except SizeError as error:
                raise (open_axis if error.diagnostic.code == "unsolved-axis" else error) from None

    def _arranged(
        self,
        arrival: Arrival,
        dims: ConcreteDims,
        target_dims: ConcreteDims,
        term: Term,
        scattered: tuple[str, ...],
        reduced: tuple[str, ...],
        group: Group,
        env: Mapping[str, int],
        wanted: Mapping[tuple[int, ...], TensorSpec],
    ) -> tuple[Layout, Grid, list[Axes]]:
        equations = Equations(lambda name, value: self.given.size(name, value, group, scattered))
        self._check_markers(dims, target_dims, {*env, *arrival.bound}, {*env, *scattered})
        sources = [
            (dims, {**env, **dict(zip(arrival.bound, i))}, s.shape) for i, s in zip(arrival.indices, arrival.specs)
        ]
        equations.solve(sources, certain=False)
        grid = self._grid(scattered, term, equations, wanted)
        places = [{**env, **dict(zip(scattered, index))} for index in grid]
        shapes = []
        if wanted and self.ops.keep_shapes and equations.open((*dims, *target_dims), places):
            shapes = [
                (target_dims[len(reduced) :], place, wanted[index].shape)
                for index, place in zip(grid, places)
                if index in wanted and len(wanted[index].shape) == len(target_dims) - len(reduced)
            ]
        equations.solve_both(sources, shapes)
        markers = self._markers(dims, target_dims, arrival.bound, scattered, equations, env)
        layout = arrange(
            Side(dims, arrival.bound, arrival.indices), Side(target_dims, scattered, grid), markers, env, equations
        )
        self._sizes |= {name: n for (name, marker), n in equations.solved.items() if marker is None}
        _check_whole(layout, [s.shape for s in arrival.specs])
        self._note_assumptions(equations, dims, scattered, bool(wanted))
        axes = [axes_of(target_dims, s, p, equations)[len(reduced) :] for s, p in zip(layout.targets, places)]
        return layout, (scattered, grid), axes

    def _grid(
        self, scattered: Sequence[str], term: Term, equations: Equations, wanted: Mapping[tuple[int, ...], TensorSpec]
    ) -> tuple[tuple[int, ...], ...]:
        extents = []
        for at, name in enumerate(scattered):
            size = equations.size(Axis(name), {})
            if size.unknown is not None and wanted:
                extents.append(max(index[at] for index in wanted) + 1)
                equations.solved[(name, None)] = extents[-1]
                continue
            extents.append(extent(equations, (Axis(name),), {}))
        if math.prod(extents) > _MOST_PARTS:
            raise SizeError(
                Diagnostic(
                    "too-many-targets",
                    f"one tensor would be taken apart into {math.prod(extents):,} ({', '.join(scattered)})",
                    help=f"keep {scattered[0]} as an axis: at most {_MOST_PARTS:,} keys are made of one tensor",
                )
            )
        return tuple(product(*map(range, extents)))

    def _markers(
        self,
        dims: ConcreteDims,
        target_dims: ConcreteDims,
        gathered: Sequence[str],
        scattered: Sequence[str],
        equations: Equations,
        env: Mapping[str, int],
    ) -> dict[str, int]:
        """Axes that some size depends on and that no key binds, with their extents."""
        both = (*dims, *target_dims)
        marks = {a.marker for axes in both for a in axes if a.marker} - {*env}
        names = {a.name for axes in both for a in axes}
        free = sorted(m for m in marks if m in names and m not in gathered and m not in scattered)
        return {m: extent(equations, (Axis(m),), env) for m in free}

    def _check_markers(self, dims: ConcreteDims, target_dims: ConcreteDims, left: set[str], right: set[str]) -> None:
        for side, keyed in ((dims, left), (target_dims, right)):
            for axes in side:
                for at, axis in enumerate(axes):
                    if axis.marker and axis.marker not in keyed and axis.marker not in {a.name for a in axes[:at]}:
                        raise SizeError(
                            Diagnostic(
                                "ragged-axis",
                                f"{axis} has no one size: {axis.marker!r} is neither in the key nor "
                                "before it in the same group",
                                help=f"({axis.marker} {axis})",
                            )
                        )

    def _note_assumptions(
        self, equations: Equations, dims: ConcreteDims, scattered: Sequence[str], checked: bool
    ) -> None:
        if checked:
            return
        counts = self.bound.signature.counts
        for name, value in equations.by_division:
            for axes in dims:
                others = [a for a in axes if a.name != name and a.size != 1]
                if any(a.name == name for a in axes) and others and all(a.name in counts for a in others):
                    split = " ".join(map(str, axes))
                    self._assumed.append(
                        f"({split}): {len(self._choices(others[0].name))} equal parts of {name} = "
                        f"{equations.solved[(name, value)]}, because it divides"
                    )

    def _choices(self, name: str) -> range:
        return range(self.bound.signature.counts[name])


def _arranged_by(terms: Sequence[Term]) -> int:
    """The target term whose axes say how tensors arrive at an op that makes all targets.

    Raises:
        OpError: two terms say it differently.
    """
    listed = [n for n, term in enumerate(terms) if term.axes is not None]
    if len({str(terms[n].axes) for n in listed}) > 1:
        raise OpError("the targets of an op that makes several have one list of axes, that of what the op is given")
    return listed[0] if listed else 0


def _check_whole(layout: Layout, shapes: Sequence[tuple[int, ...]]) -> None:
    """The sizes that were solved make up the sources exactly: no element is left out, none is read beyond the end."""
    for solved, shape in zip(layout.sources, shapes):
        if solved != shape:
            text = f"the axes of the source make up {list(solved)}, but it is {list(shape)}"
            raise SizeError(Diagnostic("size-mismatch", text))


def _check_packed(move: Move) -> None:
    """Elements that share a byte cannot be moved one by one; whole tensors can."""
    copies = move.layout.copies
    for number, (shape, dtype) in enumerate(zip(move.layout.targets, move.dtypes)):
        if DTYPES[dtype].bits % 8 and (copies is None or move.layout.sources[copies[number]] != shape):
            raise SizeError(
                Diagnostic(
                    "packed-dtype",
                    f"{dtype} packs several elements into a byte, so it cannot be rearranged",
                    help="a rule without axes hands the tensor on as it is",
                )
            )


_MOST_PARTS = 1 << 16  # no model has more layers, heads and experts; a header of a few bytes may announce any number
Grid = tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]
