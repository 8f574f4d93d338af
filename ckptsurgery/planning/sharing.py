"""What an output repeats of its source: which of its names share a tensor, and what need not be read or moved."""

from __future__ import annotations

from typing import Any

from ..storage.checkpoint import Checkpoint
from .record import PlanRecord

__all__ = ["copied_from", "output_aliases", "scattered_keys", "unread_proofs"]

_SAMPLES = 4096


def output_aliases(plan: PlanRecord, checkpoint: Checkpoint) -> dict[str, str]:
    """Target keys that are one tensor with another: tied by the plan, or made alike from names tied in the source."""
    first = {name: tie.names[0] for tie in checkpoint.ties for name in tie.names}
    seen: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for step in plan.steps if first else ():
        if not any(key in first for key in step.sources):
            continue
        sources = tuple(first.get(k, k) for k in step.sources)
        for number, (key, spec) in enumerate(zip(step.targets, step.program.outputs)):
            way: object = "copy" if step.kind == "copy" else id(step.program)
            kept = seen.setdefault((way, number, sources, spec), key)
            if kept != key:
                aliases[key] = kept
    aliases.update({alias: aliases.get(base, base) for alias, base in plan.ties.items()})
    return aliases


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
