"""Steps over tensors that are held in chunks, as steps over the chunks.

A program relates whole tensors. Where the source holds a tensor in chunks, or only a part of a target is wanted, its
layout is cut to the boxes on both sides (`planning/boxes.py`), and what is left is a program over plain tensors that
the rest of the executor runs as it runs any other. So nothing below this module knows of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...boxes import Box
from ...ops.base import Op
from ...planning.boxes import between
from ...planning.cutting import cut_of
from ...planning.layout import Layout
from ...planning.steps import Move, Program, Run, Step
from ...specs import TensorSpec
from ...storage.checkpoint import Checkpoint
from ...storage.chunks import chunks_of

__all__ = ["Boxes", "over_boxes", "over_chunks", "program_between"]

Boxes = tuple[tuple[Box, ...], ...]
"""For each tensor of one side of a program the boxes of it that are at hand."""


def over_chunks(steps: Sequence[Step], checkpoint: Checkpoint) -> tuple[Sequence[Step], Checkpoint]:
    """Return steps whose sources are in one piece each, and the checkpoint that holds these."""
    if all(entry.file is not None for entry in checkpoint.entries.values()):
        return steps, checkpoint
    held = [key for step in steps for key in step.sources if chunks_of(checkpoint.entries[key])]
    if not held:
        return steps, checkpoint
    view, names = checkpoint.in_chunks(held)
    programs: dict[tuple[int, Boxes], Program] = {}
    made = []
    for step in steps:
        if names.keys().isdisjoint(step.sources):
            made.append(step)
            continue
        known = [
            names.get(key) or [(key, Box.whole(spec.shape))] for key, spec in zip(step.sources, step.program.inputs)
        ]
        boxes = tuple(tuple(box for _, box in found) for found in known)
        program = programs.get((id(step.program), boxes))
        if program is None:
            program = programs[id(step.program), boxes] = over_boxes(step.program, boxes)
        made.append(step._replace(sources=tuple(name for found in known for name, _ in found), program=program))
    return made, view


def over_boxes(program: Program, sources: Boxes) -> Program:
    """A program over boxes of its inputs, which makes its outputs whole."""
    cut = program_between(program, sources, tuple((Box.whole(spec.shape),) for spec in program.outputs))
    if cut is not None:
        return cut
    wholes = tuple((Box.whole(spec.shape),) for spec in program.inputs)
    join = between(Layout.identity([spec.shape for spec in program.inputs]), sources, wholes)
    dtypes = tuple(spec.dtype for spec in program.inputs)
    return Program(_specs(program.inputs, sources), (Move(join, dtypes), *program.instructions), program.outputs)


def program_between(program: Program, sources: Boxes, targets: Boxes) -> Program | None:
    """A program from boxes of the inputs to boxes of the outputs; None where it has to see whole tensors.

    Args:
        sources: for each input its boxes, which are dense and follow one another as the inputs of the result.
        targets: for each output the boxes that are wanted, likewise.
    """
    chains: Sequence[Sequence[Op]] = ((),) * len(program.outputs)
    layout = program.moves
    if layout is None:
        cut = cut_of(program)
        if cut is None:
            return None
        layout, chains = cut.layout, cut.chains
    moved = between(layout, sources, targets)
    before = {piece.target: program.inputs[piece.source].dtype for piece in layout.pieces}
    owners = [number for number, boxes in enumerate(targets) for _ in boxes]
    dtypes = tuple(before.get(number, program.outputs[number].dtype) for number in owners)
    made = Program.of(_specs(program.inputs, sources), (Move(moved, dtypes),))
    for place, number in enumerate(owners):
        for op in chains[number]:
            made = made.then(Run(op, ((place,),)))
    return made


def _specs(wholes: Sequence[TensorSpec], boxes: Boxes) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(box.extent, whole.dtype) for whole, some in zip(wholes, boxes) for box in some)
