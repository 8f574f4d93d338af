"""Steps over boxes: where a source is held in chunks, and where a part of a target is wanted.

A program relates whole tensors. Its layout is cut to the boxes on both sides (`planning/box_layouts.py`), and what is
left is a program over plain tensors that the rest of the executor runs as it runs any other. So nothing below this
module knows of boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ...boxes import Box
from ...ops.base import Op
from ...ops.keyed import asks_at
from ...planning.box_layouts import between
from ...planning.cutting import chains_of
from ...planning.layout import Layout
from ...planning.steps import ApplyOp, Move, Program, Step
from ...specs import TensorSpec
from ...storage.checkpoint import Checkpoint
from ...storage.chunked_tensors import chunks_of

__all__ = ["BoxSteps", "Boxes", "by_elements", "over_chunks", "to_boxes"]

Boxes = tuple[tuple[Box, ...], ...]
"""For each tensor of one side of a program the boxes of it that are at hand."""

Names = Mapping[str, Sequence[tuple[str, Box]]]
"""Key of a tensor in chunks -> the keys and boxes of these."""


class BoxSteps(NamedTuple):
    """Steps over boxes.

    Args:
        steps: their sources are tensors of `checkpoint`, their targets the boxes that are wanted, by the whole's key.
        checkpoint: the source.
        whole: steps that have to see whole tensors, as they were.
    """

    steps: Sequence[Step]
    checkpoint: Checkpoint
    whole: Sequence[Step]


def over_chunks(steps: Sequence[Step], checkpoint: Checkpoint) -> tuple[Sequence[Step], Checkpoint]:
    """Return steps whose sources are in one piece each, and the checkpoint that holds these."""
    view, names = _in_chunks(steps, checkpoint)
    if not names:
        return steps, checkpoint
    made: list[Step] = []
    programs: dict[tuple[int, Boxes], Program] = {}
    for step in steps:
        if names.keys().isdisjoint(step.sources):
            made.append(step)
            continue
        held, boxes = _sources(step, names)
        known = id(step.program), boxes
        if known not in programs:
            programs[known] = _over_boxes(step.program, boxes)
        made.append(step._replace(sources=held, program=programs[known]))
    return made, view


def to_boxes(steps: Sequence[Step], checkpoint: Checkpoint, wanted: Mapping[str, Box]) -> BoxSteps:
    """Return steps that make a box of each target that is wanted, from what it needs of the sources."""
    view, names = _in_chunks(steps, checkpoint)
    made: list[Step] = []
    whole: list[Step] = []
    programs: dict[tuple[int, Boxes, Boxes], tuple[Program, tuple[int, ...]] | None] = {}
    for step in steps:
        targets = tuple((wanted[key],) if key in wanted else () for key in step.targets)
        if not any(targets):
            continue
        held, boxes = _sources(step, names)
        known = id(step.program), boxes, targets
        if known not in programs:
            programs[known] = _needed(_between(step.program, boxes, targets))
        found = programs[known]
        if found is None:
            whole.append(step)
            continue
        program, used = found
        keys = tuple(key for key, box in zip(step.targets, targets) if box)
        made.append(step._replace(sources=tuple(held[n] for n in used), targets=keys, program=program))
    return BoxSteps(made, view, whole)


def _in_chunks(steps: Sequence[Step], checkpoint: Checkpoint) -> tuple[Checkpoint, Names]:
    """The checkpoint that holds chunks as tensors of their own besides, and for each tensor in chunks their keys."""
    if all(entry.file is not None for entry in checkpoint.entries.values()):
        return checkpoint, {}
    entries, names = dict(checkpoint.entries), dict[str, list[tuple[str, Box]]]()
    for key in dict.fromkeys(key for step in steps for key in step.sources):
        for chunk in chunks_of(checkpoint.entries[key]):
            name = f"{key}{list(chunk.low)}"
            while name in entries:
                name += "'"
            entries[name] = chunk.entry(checkpoint.read_file_into)
            names.setdefault(key, []).append((name, chunk.box))
    return checkpoint.with_entries(entries), names


def _sources(step: Step, names: Names) -> tuple[tuple[str, ...], Boxes]:
    """The keys of what a step reads, one after another, and for each of its inputs their boxes."""
    whole = ([(key, Box.whole(spec.shape))] for key, spec in zip(step.sources, step.program.inputs))
    known = [names.get(key) or one for key, one in zip(step.sources, whole)]
    return tuple(name for held in known for name, _ in held), tuple(tuple(box for _, box in held) for held in known)


def _over_boxes(program: Program, sources: Boxes) -> Program:
    """A program over boxes of its inputs, which makes its outputs whole."""
    cut = _between(program, sources, tuple((Box.whole(spec.shape),) for spec in program.outputs))
    if cut is not None:
        return cut
    wholes = tuple((Box.whole(spec.shape),) for spec in program.inputs)
    join = between(Layout.identity([spec.shape for spec in program.inputs]), sources, wholes)
    dtypes = tuple(spec.dtype for spec in program.inputs)
    return Program(_specs(program.inputs, sources), (Move(join, dtypes), *program.instructions), program.outputs)


def _between(program: Program, sources: Boxes, targets: Boxes) -> Program | None:
    """A program from boxes of the inputs to boxes of the outputs; None where it has to see whole tensors.

    Args:
        sources: for each input its boxes, which are dense and follow one another as the inputs of the result.
        targets: for each output the boxes that are wanted, likewise.
    """
    found = by_elements(program)
    if found is None:
        return None
    layout, chains = found
    moved = between(layout, sources, targets)
    before = {piece.target: program.inputs[piece.source].dtype for piece in layout.pieces}
    owners = [number for number, boxes in enumerate(targets) for _ in boxes]
    dtypes = tuple(before.get(number, program.outputs[number].dtype) for number in owners)
    made = Program.of(_specs(program.inputs, sources), (Move(moved, dtypes),))
    for place, number in enumerate(owners):
        for op in chains[number]:
            made = made.then(ApplyOp(op, ((place,),)))
    return made


def by_elements(program: Program) -> tuple[Layout, Sequence[Sequence[Op]]] | None:
    """Return a program as one rearrangement and, for each output, the ops on single elements that follow.

    None where it has to see whole tensors.
    """
    if program.moves is not None:
        return program.moves, ((),) * len(program.outputs)
    cut = chains_of(program)
    if cut is None or cut.joins is not None or any(asks_at(op) for chain in cut.chains for op in chain):
        return None  # what an op draws depends on where an element is in the whole
    return cut.layout, cut.chains


def _needed(program: Program | None) -> tuple[Program, tuple[int, ...]] | None:
    """A program without the inputs that it does not read, and the numbers of those that it does."""
    if program is None:
        return None
    move = program.instructions[0]
    if not isinstance(move, Move):
        return program, tuple(range(len(program.inputs)))
    used = sorted({piece.source for piece in move.layout.pieces}) or [0]
    places = {number: place for place, number in enumerate(used)}
    layout = Layout(
        tuple(move.layout.sources[number] for number in used),
        move.layout.targets,
        tuple(replace(piece, source=places[piece.source]) for piece in move.layout.pieces),
    )
    inputs = tuple(program.inputs[number] for number in used)
    rest = program.instructions[1:]
    return Program(inputs, (Move(layout, move.dtypes), *rest), program.outputs), tuple(used)


def _specs(wholes: Sequence[TensorSpec], boxes: Boxes) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(box.extent, whole.dtype) for whole, some in zip(wholes, boxes) for box in some)
