"""What an output repeats of its source: which of its names share a tensor, and what need not be read or moved."""

from __future__ import annotations

from typing import Any

from ..errors import Diagnostic
from ..storage.checkpoint import Checkpoint
from ..wording import listed
from .record import PlanRecord
from .steps import Program

__all__ = ["copied_from", "output_aliases", "parted_ties", "scattered_keys", "unread_proofs"]

_SAMPLES = 4096


def output_aliases(plan: PlanRecord, checkpoint: Checkpoint) -> dict[str, str]:
    """Target keys that are one tensor with another: tied by the plan, or made alike from names tied in the source.

    Steps are alike where they read the same tensors by equal programs, of one rule or of two.
    """
    first = {name: tie.names[0] for tie in checkpoint.ties for name in tie.names}
    seen: dict[Any, list[tuple[Program, str]]] = {}
    aliases: dict[str, str] = {}
    for step in plan.steps if first else ():
        if not any(key in first for key in step.sources):
            continue
        sources = tuple(first.get(k, k) for k in step.sources)
        for number, (key, spec) in enumerate(zip(step.targets, step.program.outputs)):
            made = seen.setdefault((step.kind == "copy", number, sources, spec), [])
            kept = next((one for program, one in made if step.kind == "copy" or program == step.program), key)
            if kept != key:
                aliases[key] = kept
            else:
                made.append((step.program, key))
    aliases.update({alias: aliases.get(base, base) for alias, base in plan.ties.items()})
    return aliases


def parted_ties(plan: PlanRecord, checkpoint: Checkpoint) -> list[Diagnostic]:
    """A note for each tensor that has several names in the source, and becomes several tensors of the output."""
    if not checkpoint.ties:
        return []
    aliases = output_aliases(plan, checkpoint)
    tied = {name for tie in checkpoint.ties for name in tie.names}
    made: dict[str, list[str]] = {}
    for step in plan.steps:
        for key in step.sources if len(step.targets) == 1 else ():
            if key in tied:
                made.setdefault(key, []).append(step.targets[0])
    found = []
    for tie in checkpoint.ties:
        kept = {name: made[name][0] for name in tie.names if name in made}
        apart = {aliases.get(key, key): (name, key) for name, key in reversed(kept.items())}
        if len(apart) > 1:
            (_, first), *others = reversed(apart.values())
            drops, ties = [name for name, _ in others], {key: first for _, key in others}
            found.append(
                Diagnostic(
                    "ties-parted",
                    f"one tensor in the source, {len(apart)} in the output: {listed([first, *ties])}",
                    help=f"one rule for all of these names keeps them one; or drop={drops}, tie={ties}",
                    severity="note",
                )
            )
    return found


def unread_proofs(plan: PlanRecord, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Pairs that must be equal and are one run of bytes, so that nothing is read to prove it."""
    place = checkpoint.extent
    return [pair for pair in plan.proofs if place(pair[0]) is not None and place(pair[0]) == place(pair[1])]


def scattered_keys(checkpoint: Checkpoint) -> set[str]:
    """Keys whose tensors lie in a file, but in no run of bytes that could be copied."""
    if checkpoint.is_contiguous:
        return set()
    entries = checkpoint.entries.items()
    return {key for key, entry in entries if entry.file is not None and not entry.is_contiguous}


def copied_from(plan: PlanRecord, checkpoint: Checkpoint) -> dict[str, int]:
    """Where in a source file tensors lie that are copied as they are; of very many, some thousands spread over all."""
    found: dict[str, int] = {}
    for step in plan.steps[:: 1 + len(plan.steps) // _SAMPLES]:
        for key, number in zip(step.targets, step.program.copies or ()):
            entry = checkpoint.entries[step.sources[number]]
            if entry.is_contiguous:
                found[key] = entry.offset
    return found
