"""A plan as a page: both sides as trees, a ribbon for each rule, and a diagram of what moves where in a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

from ..pages.foldable_rows import tree_rows
from ..pages.page import html_page
from ..specs import TensorSpec
from ..wording import clipped, counted
from .costing import Cost
from .explaining import on_the_way
from .layout import Layout, Piece, Shape
from .record import PlanRecord
from .showing import plan_ends, plan_kinds
from .steps import Instruction, Move, Parallel, Program, Step

__all__ = ["plan_page"]

_PIECES = 24  # pieces of a diagram, in as many colours
_BANDS = 48  # boxes that one piece is drawn as
_PROGRAMS = 1500  # programs with a diagram
_TEXT = 1000  # characters of a rule


def plan_page(plan: PlanRecord, cost: Cost, title: str) -> str:
    """Return the page of a plan."""
    return html_page("plan", title, _Picture(plan).data(title) | {"cost": str(cost)})


class _Picture:
    """The data of a plan's page."""

    def __init__(self, plan: PlanRecord) -> None:
        self.plan = plan
        self.rules: dict[tuple[int, ...], int] = {}
        self.programs: dict[int, tuple[int, Step]] = {}  # by id: its number, and a step that runs it
        self.makers: dict[str, Step] = {}
        self.readers: dict[str, Step] = {}
        for step in plan.steps:
            self.rules.setdefault(step.rules, len(self.rules))
            self.programs.setdefault(id(step.program), (len(self.programs), step))
            self.makers |= dict.fromkeys(step.targets, step)
            for key in step.sources:
                self.readers.setdefault(key, step)

    def data(self, title: str) -> dict[str, Any]:
        """All of it, as plain data."""
        plan = self.plan
        tied = {name: base for alias, base in plan.ties.items() for name in (alias, base)}
        target: dict[str, TensorSpec | None] = {key: self._target_spec(key) for key in plan.keys}
        return {
            "title": title,
            "ends": plan_ends(plan),
            "kinds": list(plan_kinds(plan)),
            "warnings": [[w.severity, w.headline] for w in plan.warnings[:40]],
            "rules": [self._rule(numbers) for numbers in self.rules],
            "programs": [self._program(step) for _, step in islice(self.programs.values(), _PROGRAMS)],
            "source": tree_rows(plan.source, self._of_source),
            "target": tree_rows(target, lambda key: self._of_target(key, tied)),
            "ties": dict(islice(plan.ties.items(), 200)),
        }

    def _rule(self, numbers: tuple[int, ...]) -> dict[str, Any]:
        uses = [self.plan.uses[n] for n in numbers]
        return {
            "text": "  then  ".join(clipped(use.text, _TEXT) for use in uses),
            "place": next((use.place for use in uses if use.place), ""),
            "rest": all(use.is_rest for use in uses),
        }

    def _of_source(self, key: str) -> tuple[int, int, str]:
        """The rule and the program that read a key, and what becomes of it otherwise."""
        step = self.readers.get(key)
        if step is not None:
            return self.rules[step.rules], self.programs[id(step.program)][0], ""
        if key in self.plan.dropped:
            return -1, -1, f"dropped by {clipped(str(self.plan.dropped[key]), _TEXT)}"
        kept = next((kept for left, kept in self.plan.proofs if left == key), None)
        return -1, -1, "left out" if kept is None else f"proved equal to {kept}, then left out"

    def _of_target(self, key: str, tied: Mapping[str, str]) -> tuple[int, int, str, str]:
        """The rule and the program that make a key, what is decided otherwise, and the tensor that it shares."""
        step, shared = self.makers.get(key), tied.get(key, "")
        cast = self.plan.casts.get(key)
        if step is not None:
            said = f"cast from {cast[0]}" if cast else ""
            return self.rules[step.rules], self.programs[id(step.program)][0], said, shared
        if key in self.plan.ties:
            return -1, -1, f"shares the tensor of {self.plan.ties[key]}", shared
        return -1, -1, f"initialised: {clipped(str(self.plan.inits.get(key)), _TEXT)}", shared

    def _target_spec(self, key: str) -> TensorSpec | None:
        plan = self.plan
        made = plan.specs.get(plan.ties.get(key, key))
        return made if made is not None or plan.target is None else plan.target.specs.get(key)

    def _program(self, step: Step) -> dict[str, Any]:
        program = step.program
        return {
            "kind": program.kind,
            "reads": _named(step.sources, program.inputs),
            "makes": _named(step.targets, program.outputs),
            "then": list(on_the_way(step))[:12],
            "moves": [_drawn(layout) for layout in islice(_layouts(program), 3)],
        }


def _named(keys: Sequence[str], specs: Sequence[TensorSpec]) -> list[str]:
    shown = [f"{key}  {spec}" for key, spec in zip(keys[:8], specs)]
    return [*shown, f"… {counted(len(keys), 'tensor')} in all"] if len(keys) > 8 else shown


def _layouts(program: Program) -> Iterator[Layout]:
    """The rearrangements of a program that are more than copies."""
    instructions: Sequence[Instruction] = program.instructions
    for instruction in instructions:
        match instruction:
            case Move(layout) if layout.copies is None:
                yield layout
            case Parallel(programs):
                for one in programs:
                    yield from _layouts(one)


def _drawn(layout: Layout) -> dict[str, Any]:
    """Each tensor as a rectangle of rows and columns, and each piece as boxes in it, in parts of its sides."""
    pieces = layout.pieces[:_PIECES]
    return {
        "sources": [list(shape) for shape in layout.sources[:_PIECES]],
        "targets": [list(shape) for shape in layout.targets[:_PIECES]],
        "more": len(layout.pieces) - len(pieces),
        "pieces": [
            {
                "from": [piece.source, boxes_of(piece, layout.sources[piece.source], of_target=False)],
                "to": [piece.target, boxes_of(piece, layout.targets[piece.target], of_target=True)],
            }
            for piece in pieces
            if piece.source < _PIECES and piece.target < _PIECES
        ],
    }


def boxes_of(piece: Piece, shape: Shape, of_target: bool) -> list[list[float]]:
    """The place of a piece in a tensor that is drawn as rows (its first axis) and columns (all others).

    >>> half = Piece(0, 0, (6,), 6, (1,), 0, (1,))
    >>> boxes_of(half, (4, 3), of_target=False)
    [[0.5, 1.0, 0.0, 1.0]]

    Args:
        shape: of the tensor.
        of_target: whether it is the piece's target, else its source.

    Returns:
        Boxes [top, bottom, left, right], in parts of the height and the width; the first of very many.
    """
    rows = shape[0] if len(shape) > 1 else 1
    columns = max(1, math.prod(shape) // max(1, rows))
    offset, strides = (
        (piece.target_offset, piece.target_strides) if of_target else (piece.source_offset, piece.source_strides)
    )
    axes = sorted((stride, size) for stride, size in zip(strides, piece.shape) if stride)
    high, wide = 1, 1
    bands: list[tuple[int, int]] = []
    for stride, size in axes:
        if stride >= columns and stride == columns * high:
            high *= size
        elif stride < columns and stride == wide:
            fits = min(size, max(1, columns // wide))
            wide, high = wide * fits, high * (size // fits)
        else:
            bands.append((stride, size))
    boxes = []
    for steps in islice(product(*(range(size) for _, size in bands)), _BANDS):
        start = offset + sum(n * stride for n, (stride, _) in zip(steps, bands))
        top, left = divmod(start, columns)
        box = (top / rows, (top + high) / rows, left / columns, (left + wide) / columns)
        boxes.append([round(min(side, 1.0), 4) for side in box])
    return boxes
