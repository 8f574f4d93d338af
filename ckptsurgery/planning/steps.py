"""Steps: which sources make which targets, and by what program.

A program knows shapes and dtypes but no keys, so that all layers share one. It is a list of instructions over a list of
tensors: `Move` rearranges, `ApplyOp` applies an op, `Select` repeats, reorders or leaves out, `Parallel` runs programs
side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from ..many_objects import ById
from ..ops.base import Op, OpError, Specs
from ..ops.keyed import asks_at
from ..specs import TensorSpec
from .layout import Layout, Piece, run_piece, side_by_side

__all__ = [
    "KINDS",
    "ApplyOp",
    "Instruction",
    "Make",
    "Move",
    "Parallel",
    "Program",
    "Select",
    "Step",
    "compose_layouts",
    "cut",
    "outputs_of",
    "programs_of",
    "steps_of",
]

T = TypeVar("T")

KINDS = ("copy", "move", "compute")
"""What a step may do, from the least that happens to the data to the most."""


@dataclass(frozen=True)
class Move:
    """A rearrangement; dtypes stay."""

    layout: Layout
    dtypes: tuple[str, ...]

    def after(self, specs: Specs) -> Specs:
        """Specs after the instruction.

        Raises:
            OpError: specs of other shapes than the layout takes.
        """
        if tuple(s.shape for s in specs) != self.layout.sources:
            raise OpError(
                f"the rearrangement takes {', '.join(str(list(s)) for s in self.layout.sources)}; "
                f"it was given {', '.join(map(str, specs))}"
            )
        return tuple(TensorSpec(shape, dtype) for shape, dtype in zip(self.layout.targets, self.dtypes))


@dataclass(frozen=True)
class ApplyOp:
    """An op, applied to each group of tensors; what it gives stands where the group's first tensor stood.

    Tensors in no group pass by.
    """

    op: Op
    groups: tuple[tuple[int, ...], ...]

    def after(self, specs: Specs) -> Specs:
        """Specs after the instruction."""
        return self.applied(specs, self.op.infer)

    def applied(self, items: Sequence[T], each: Callable[[tuple[T, ...]], Sequence[T]]) -> tuple[T, ...]:
        """The list of items after `each` was applied to every group; `items` may be specs or tensors."""
        heads = {group[0]: group for group in self.groups}
        inside = {i for group in self.groups for i in group}
        result: list[T] = []
        for i, item in enumerate(items):
            if i in heads:
                result += each(tuple(items[j] for j in heads[i]))
            elif i not in inside:
                result.append(item)
        return tuple(result)


@dataclass(frozen=True)
class Select:
    """The list of tensors made anew: which of them, in which order, one of them several times if need be."""

    indices: tuple[int, ...]

    def after(self, specs: Specs) -> Specs:
        """Specs after the instruction."""
        return self.applied(specs)

    def applied(self, items: Sequence[T]) -> tuple[T, ...]:
        """What it makes of a list."""
        return tuple(items[i] for i in self.indices)


@dataclass(frozen=True)
class Make:
    """One more tensor at the end of the list, which an op makes of none."""

    op: Op

    def after(self, specs: Specs) -> Specs:
        """Specs after the instruction."""
        return (*specs, *self.op.infer(()))


@dataclass(frozen=True)
class Parallel:
    """Programs side by side, each on its own share of the list."""

    programs: tuple[Program, ...]

    def after(self, specs: Specs) -> Specs:
        """Specs after the instruction."""
        return tuple(spec for program in self.programs for spec in program.outputs)

    def ends(self, before: Sequence[T], after: Sequence[T]) -> Iterator[tuple[tuple[T, ...], tuple[T, ...]]]:
        """For each program its share of two lists, one before it and one after it."""
        start = stop = 0
        for program in self.programs:
            here, there = start + len(program.inputs), stop + len(program.outputs)
            yield tuple(before[start:here]), tuple(after[stop:there])
            start, stop = here, there

    def shares(self, items: Sequence[T]) -> Iterator[tuple[Program, tuple[T, ...]]]:
        """Each program with its share of the list."""
        at = 0
        for program in self.programs:
            end = at + len(program.inputs)
            yield program, tuple(items[at:end])
            at = end


Instruction = Move | ApplyOp | Select | Make | Parallel


@dataclass(frozen=True)
class Program:
    """What happens to the tensors of a step.

    Args:
        inputs: specs of the sources.
        instructions: what is done, in order.
        outputs: specs of the targets.
    """

    inputs: Specs
    instructions: tuple[Instruction, ...]
    outputs: Specs

    @classmethod
    def of(cls, inputs: Specs, instructions: Sequence[Instruction]) -> Program:
        """The program with the specs it leads to.

        Raises:
            OpError: an op that cannot take what reaches it.
        """
        specs = inputs
        for instruction in instructions:
            specs = instruction.after(specs)
        return cls(inputs, tuple(instructions), specs)

    def then(self, instruction: Instruction) -> Program:
        """The program with one more instruction."""
        return Program(self.inputs, (*self.instructions, instruction), instruction.after(self.outputs))

    @cached_property
    def moves(self) -> Layout | None:
        """The one rearrangement that the program is, or None where an op changes values or one would not do."""
        layout: Layout | None = Layout.identity([s.shape for s in self.inputs])
        for instruction in self.instructions:
            layout = _moved(layout, instruction) if layout is not None else None
        return layout

    @cached_property
    def changes_values(self) -> bool:
        """Whether an op runs in it; all else only moves data."""
        return any(
            isinstance(i, ApplyOp | Make) or (isinstance(i, Parallel) and any(p.changes_values for p in i.programs))
            for i in self.instructions
        )

    @cached_property
    def asks_at(self) -> bool:
        """Whether an op in it asks for the key that it makes."""
        return any(
            asks_at(i.op)
            if isinstance(i, ApplyOp | Make)
            else isinstance(i, Parallel) and any(p.asks_at for p in i.programs)
            for i in self.instructions
        )

    @cached_property
    def copies(self) -> tuple[int, ...] | None:
        """For each target the source whose bytes it holds, or None where more than copying is needed."""
        return self.moves.copies if self.moves is not None else None

    @property
    def kind(self) -> str:
        """`"copy"`, `"move"` or `"compute"`."""
        if self.copies is not None:
            return "copy"
        return "compute" if self.changes_values else "move"

    def specs_on_the_way(self) -> list[Specs]:
        """Specs before the first instruction and after each."""
        stages = [self.inputs]
        for instruction in self.instructions:
            stages.append(instruction.after(stages[-1]))
        return stages


def _moved(layout: Layout, instruction: Instruction) -> Layout | None:
    match instruction:
        case Move(move):
            return compose_layouts(layout, move)
        case Select(indices):
            return _picked(layout, indices)
        case Parallel(programs):
            layouts = [p.moves for p in programs]
            known = [one for one in layouts if one is not None]
            return compose_layouts(layout, side_by_side(known)) if len(known) == len(layouts) else None
        case ApplyOp() | Make():
            return None


def _picked(layout: Layout, indices: tuple[int, ...]) -> Layout:
    pieces = tuple(replace(p, target=n) for n, i in enumerate(indices) for p in layout.pieces if p.target == i)
    return Layout(layout.sources, tuple(layout.targets[i] for i in indices), pieces)


def compose_layouts(first: Layout, second: Layout) -> Layout | None:
    """One rearrangement after another as one; None where it takes more than one.

    It is one where either only hands whole tensors on, or where both move runs.
    """
    copies = first.copies
    if copies is not None:
        pieces = tuple(replace(p, source=copies[p.source]) for p in second.pieces)
        return Layout(first.sources, second.targets, pieces)
    copies = second.copies
    if copies is not None:
        return replace(_picked(first, copies), targets=second.targets)
    return _runs_composed(first, second) if first.contiguous and second.contiguous else None


def _runs_composed(first: Layout, second: Layout) -> Layout:
    made = [first.into(n) for n in range(len(first.targets))]
    pieces: list[Piece] = []
    for later in sorted(second.pieces, key=lambda p: (p.target, p.target_offset)):
        start, end = later.source_offset, later.source_offset + later.numel
        for p in made[later.source]:
            low, high = max(start, p.target_offset), min(end, p.target_offset + p.numel)
            if low < high:
                source, target = p.source_offset + low - p.target_offset, later.target_offset + low - start
                pieces.append(run_piece(p.source, later.target, high - low, source, target))
    return Layout(first.sources, second.targets, tuple(_joined(pieces)))


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Runs in the order of their targets, those that run on made one."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        runs_on = last is not None and (last.source, last.target) == (piece.source, piece.target)
        if last and runs_on and last.source_offset + last.numel == piece.source_offset:
            result[-1] = run_piece(
                last.source, last.target, last.numel + piece.numel, last.source_offset, last.target_offset
            )
        else:
            result.append(piece)
    return result


class Step(NamedTuple):
    """One unit of work: sources in, targets out.

    Args:
        sources: keys of the checkpoint, in the program's order.
        targets: keys made, in the program's order.
        program: what happens in between.
        rules: numbers of the plan's rules that it comes from, those of earlier stages first.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    program: Program
    rules: tuple[int, ...]

    @property
    def kind(self) -> str:
        """`"copy"`, `"move"` or `"compute"`."""
        return self.program.kind


def steps_of(rows: Iterable[tuple[Any, ...]]) -> Iterator[Step]:
    """Steps from their fields, very many of them: without a call of Python for each."""
    return map(tuple.__new__, repeat(Step), rows)


def outputs_of(steps: Sequence[Step]) -> tuple[list[str], Iterable[TensorSpec]]:
    """All targets of steps, and their specs."""
    targets, outputs = map(attrgetter("targets"), steps), map(attrgetter("program.outputs"), steps)
    return list(chain.from_iterable(targets)), chain.from_iterable(outputs)


def programs_of(steps: Sequence[Step]) -> list[tuple[Program, int]]:
    """The programs of steps, which are far fewer, each with how many of them run it."""
    programs = ById(map(attrgetter("program"), steps))
    times = Counter(programs.ids)
    return [(program, times[number]) for number, program in programs.objects.items()]


def cut(step: Step, keys: Collection[str]) -> tuple[Step, ...]:
    """The step that makes these targets alone; none where it makes none of them."""
    wanted = tuple(n for n, k in enumerate(step.targets) if k in keys)
    if len(wanted) == len(step.targets):
        return (step,)
    if not wanted:
        return ()
    targets = tuple(step.targets[n] for n in wanted)
    return (step._replace(targets=targets, program=step.program.then(Select(wanted))),)
