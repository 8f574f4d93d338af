"""Packed types of an output's tensors, and the key-value pairs that a template gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..planning.cutting import run_length
from ..planning.plan import Plan
from ..planning.steps import ApplyOp, Parallel, Program
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from .source_notes import packings

__all__ = ["packed_extras"]

_GGUF = "gguf"


def packed_extras(
    extras: Mapping[str, Any], plan: Plan, checkpoint: Checkpoint, template: str | None
) -> dict[str, Any]:
    """Return the extras of an output, with the packed types of its tensors under the keys that they get.

    Args:
        extras: those that go along from the source.
        template: a GGUF file that the key-value pairs come from, in place of the source's.

    Raises:
        CheckpointError: the template cannot be opened, or has no key-value pairs.
    """
    about: dict[str, Any] = dict(extras.get(_GGUF) or {})
    if template is not None:
        with open_checkpoint(template) as opened:
            found = opened.extras.get(_GGUF)
        if not isinstance(found, Mapping):
            text = f"the template {template!r} is not a GGUF file"
            raise CheckpointError(
                Diagnostic("unsupported-format", text, template, help="name a GGUF file of such a model")
            )
        about |= {"metadata": found["metadata"], "kinds": found["kinds"]}
    types = _types(plan, packings(checkpoint.extras))
    if not about and not types:
        return dict(extras)
    return {**extras, _GGUF: {"metadata": {}, "kinds": {}, **about, "tensor_types": types}}


def _types(plan: Plan, sources: Mapping[str, str]) -> dict[str, str]:
    """Target key -> the name of its blocks: those that an op makes, or that whole rows of the source are made of."""
    made: dict[str, str] = {}
    known: dict[int, str | None] = {}
    for step in plan.steps:
        program = step.program
        if id(program) not in known:
            known[id(program)] = _made_by(program)
        quantised = known[id(program)]
        for number, key in enumerate(step.targets):
            kept = quantised or _kept(program, number, [sources.get(source) for source in step.sources])
            if kept and program.outputs[number].dtype == "U8":
                made[key] = kept
    return made


def _made_by(program: Program) -> str | None:
    """The name of the blocks that the last op of a program makes."""
    for instruction in reversed(program.instructions):
        if isinstance(instruction, ApplyOp):
            return instruction.op.packing()
        if isinstance(instruction, Parallel):
            found = {_made_by(part) for part in instruction.programs}
            return found.pop() if len(found) == 1 else None
    return None


def _kept(program: Program, target: int, types: list[str | None]) -> str | None:
    """The one type of the source rows that a target is made of, none of which is cut."""
    layout, shape = program.moves, program.outputs[target].shape
    if layout is None or not shape or not any(types):
        return None
    pieces = list(layout.into(target))
    found = {types[piece.source] for piece in pieces}
    whole = all(run_length(piece) % shape[-1] == 0 for piece in pieces)
    rows = all(program.inputs[piece.source].shape[-1:] == shape[-1:] for piece in pieces)
    return found.pop() if len(found) == 1 and whole and rows else None
