"""Steps: which sources make which targets, and by what program.

A program knows shapes and dtypes but no keys, so that all layers share one. It is a list of instructions over a list of
tensors: `Fork` gives each of several targets its own, `Move` rearranges, `Run` applies an op, `Pick` leaves some out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from ..ops.base import Op, Specs
from ..specs import TensorSpec
from .layout import Layout, Piece

__all__ = ["Fork", "Instruction", "Move", "Pick", "Program", "Run", "Step", "compose_layouts"]

T = TypeVar("T")


@dataclass(frozen=True)
class Fork:
    """The whole list of tensors, `times` over."""

    times: int

    def after(self, specs: Specs) -> Specs:
        """Specs after the instruction."""
        return specs * self.times


@dataclass(frozen=True)
class Move:
    """A rearrangement; dtypes stay."""

    layout: Layout
    dtypes: tuple[str, ...]

    def after(self, specs: Specs) -> Specs:
        """Specs after the instruction."""
        return tuple(TensorSpec(shape, dtype) for shape, dtype in zip(self.layout.targets, self.dtypes))


@dataclass(frozen=True)
class Run:
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
class Pick:
    """Some of the tensors, in this order; the others go nowhere."""

    indices: tuple[int, ...]

    def after(self, specs: Specs) -> Specs:
        """Specs after the instruction."""
        return tuple(specs[i] for i in self.indices)


Instruction = Fork | Move | Run | Pick


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
        """The one rearrangement that the program is, or None where an op changes values."""
        layout = Layout.identity([s.shape for s in self.inputs])
        for instruction in self.instructions:
            match instruction:
                case Fork(times):
                    layout = _forked(layout, times)
                case Move(move):
                    composed = compose_layouts(layout, move)
                    if composed is None:
                        return None
                    layout = composed
                case Pick(indices):
                    layout = _picked(layout, indices)
                case Run():
                    return None
        return layout

    @cached_property
    def copies(self) -> tuple[int, ...] | None:
        """For each target the source whose bytes it holds, or None where more than copying is needed."""
        return self.moves.copies if self.moves is not None else None

    @property
    def kind(self) -> str:
        """`"copy"`, `"move"` or `"compute"`."""
        if self.copies is not None:
            return "copy"
        return "move" if self.moves is not None else "compute"

    def specs_on_the_way(self) -> list[Specs]:
        """Specs before the first instruction and after each."""
        stages = [self.inputs]
        for instruction in self.instructions:
            stages.append(instruction.after(stages[-1]))
        return stages


def _forked(layout: Layout, times: int) -> Layout:
    width = len(layout.targets)
    pieces = [
        Piece(p.source, p.target + n * width, p.shape, p.source_offset, p.source_strides, p.target_offset, p.target_strides)
        for n in range(times)
        for p in layout.pieces
    ]
    return Layout(layout.sources, layout.targets * times, tuple(pieces))


def _picked(layout: Layout, indices: tuple[int, ...]) -> Layout:
    pieces = tuple(replace(p, target=n) for n, i in enumerate(indices) for p in layout.pieces if p.target == i)
    return Layout(layout.sources, tuple(layout.targets[i] for i in indices), pieces)


def compose_layouts(first: Layout, second: Layout) -> Layout | None:
    """One rearrangement after another as one, where the first only hands whole tensors on; else None."""
    copies = first.copies
    if copies is None:
        return None
    pieces = tuple(
        Piece(copies[p.source], p.target, p.shape, p.source_offset, p.source_strides, p.target_offset, p.target_strides)
        for p in second.pieces
    )
    return Layout(first.sources, second.targets, pieces)


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work: sources in, targets out.

    Args:
        sources: keys of the checkpoint, or of what `upstream` makes, in the program's order.
        targets: keys made, in the program's order.
        program: what happens in between.
        rules: numbers of the plan's rules that it comes from, one for each stage.
        upstream: for keys that an earlier stage makes, the step that makes them.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    program: Program
    rules: tuple[int, ...]
    upstream: Mapping[str, Step] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`"copy"`, `"move"` or `"compute"`."""
        return "compute" if self.upstream else self.program.kind
