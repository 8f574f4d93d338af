"""Packed types of an output's tensors, and the key-value pairs that a template gives it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError, Diagnostic, Remedy
from ..planning.cutting import run_length
from ..planning.plan import Plan
from ..planning.steps import ApplyOp, Parallel, Program
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from .source_notes import packings

__all__ = ["architecture_warnings", "packed_extras"]

_GGUF = "gguf"
_ARCHITECTURE = "general.architecture"


def packed_extras(
    extras: Mapping[str, Any], plan: Plan, checkpoint: Checkpoint, template: str | Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the extras of an output, with the packed types of its tensors under the keys that they get.

    Args:
        extras: those that go along from the source.
        template: the key-value pairs in place of the source's, or the GGUF file that they come from.

    Raises:
        CheckpointError: the template cannot be opened, or has no key-value pairs; a value that GGUF cannot hold.
    """
    about: dict[str, Any] = dict(extras.get(_GGUF) or {})
    if isinstance(template, Mapping):
        about |= {"metadata": template, "kinds": {key: _kinds(key, value) for key, value in template.items()}}
    elif template is not None:
        with open_checkpoint(template) as opened:
            found = opened.extras.get(_GGUF)
        if not isinstance(found, Mapping):
            text = f"the template {template!r} is not a GGUF file"
            raise CheckpointError(
                Diagnostic("unsupported-format", text, template, help="name a GGUF file of such a model")
            )
        about |= {"metadata": found["metadata"], "kinds": found["kinds"]}
    if template is not None and not about["metadata"]:
        named = "" if isinstance(template, Mapping) else f" {template!r}"
        text = f"the template{named} has no key-value pairs"
        help = "name a GGUF file of such a model, with its architecture, sizes and tokenizer"
        raise CheckpointError(Diagnostic("empty-template", text, help=help))
    types = _types(plan, packings(checkpoint.extras))
    if not about and not types:
        return dict(extras)
    return {**extras, _GGUF: {"metadata": {}, "kinds": {}, **about, "tensor_types": types}}


def architecture_warnings(path: str | os.PathLike[str], extras: Mapping[str, Any]) -> tuple[Diagnostic, ...]:
    """Return the warning that a GGUF output does not name its architecture, without which no program loads it.

    >>> [d.code for d in architecture_warnings("x.gguf", {})], architecture_warnings("x.safetensors", {})
    (['no-architecture'], ())

    Args:
        extras: of the output.
    """
    about = extras.get(_GGUF)
    pairs = about.get("metadata", {}) if isinstance(about, Mapping) else {}
    if not os.fspath(path).endswith(".gguf") or pairs.get(_ARCHITECTURE):
        return ()
    text = f"the output has no {_ARCHITECTURE}, so programs that run GGUF models refuse it"
    taken = Remedy("template", None, "takes the key-value pairs of a GGUF file of such a model")
    return (Diagnostic("no-architecture", text, os.fspath(path), severity="warning", remedies=(taken,)),)


_ARRAY = 9
_OF_TYPE = {bool: 7, str: 8, float: 6}
_INTEGERS = {4: (0, 1 << 32), 5: (-(1 << 31), 1 << 31), 10: (0, 1 << 64), 11: (-(1 << 63), 1 << 63)}
"""Number of an integer type of GGUF -> its values, from the first to before the last; the first that fits is taken."""


def _kinds(key: str, value: Any) -> list[int]:
    """The number of a value's type; of an array, those from the outermost to the innermost."""
    if type(value) in _OF_TYPE:
        return [_OF_TYPE[type(value)]]
    if type(value) is int:
        value = [value]
        array = []
    else:
        array = [_ARRAY]
    if isinstance(value, (list, tuple)) and value:
        if all(type(item) is int for item in value):
            fitting = [kind for kind, (low, high) in _INTEGERS.items() if low <= min(value) and max(value) < high]
            if fitting:
                return [*array, fitting[0]]
        else:
            inner = [_kinds(key, item) for item in value]
            if all(kinds == inner[0] for kinds in inner):
                return [*array, *inner[0]]
    text = f"the key {key!r} has a value that GGUF does not hold: {str(value)[:60]}"
    help = "give texts, numbers, booleans, and lists of these"
    raise CheckpointError(Diagnostic("unsupported-format", text, key, help=help))


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
