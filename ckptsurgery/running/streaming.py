"""Writing a plan's result as it comes: bytes that only move are copied, the rest is computed one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress
from operator import add, attrgetter, itemgetter, not_
from typing import Any, TypeVar

from ..collection import without_collection
from ..distinct import Distinct
from ..planning.costing import BUDGET, REGION
from ..planning.cutting import copies_bytes
from ..planning.plan import Plan
from ..planning.steps import Step
from ..storage.checkpoint import Checkpoint
from ..storage.staging import Writer
from .copying import BareRun, Move, copy_runs, merged, moves_of, runs_of

__all__ = ["copied_from", "output_aliases", "scattered_keys", "stream", "unread_proofs"]

T = TypeVar("T")
_SAMPLES = 4096
_PROGRAM = itemgetter(2)
_FROM = attrgetter("file", "offset")


def output_aliases(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
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


def unread_proofs(plan: Plan, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Pairs that must be equal and are one run of bytes, so that nothing is read to prove it."""
    place = checkpoint.extent
    return [pair for pair in plan.proofs if place(pair[0]) is not None and place(pair[0]) == place(pair[1])]


def scattered_keys(checkpoint: Checkpoint) -> set[str]:
    """Keys whose tensors lie in a file, but in no run of bytes that could be copied."""
    if checkpoint.lies_plainly:
        return set()
    entries = checkpoint.entries.items()
    return {key for key, entry in entries if entry.file is not None and not entry.lies_plainly}


def copied_from(plan: Plan, checkpoint: Checkpoint) -> dict[str, int]:
    """Where in a source file tensors lie that are copied as they are; of very many, some thousands spread over all."""
    found: dict[str, int] = {}
    for step in plan.steps[:: 1 + len(plan.steps) // _SAMPLES]:
        for key, number in zip(step.targets, step.program.copies or ()):
            entry = checkpoint.entries[step.sources[number]]
            if entry.lies_plainly:
                found[key] = entry.offset
    return found


def stream(
    plan: Plan,
    checkpoint: Checkpoint,
    writer: Writer,
    moved: Callable[[int], object],
    *,
    budget: int = BUDGET,
    region: int = REGION,
) -> None:
    """Fill a writer: first what is copied, in the order of the output, then what is computed, over the cores.

    Args:
        budget: bytes that tasks may hold together.
        region: bytes of a target that are computed at a time where a step can be cut.
    """
    computed: list[Step] = []
    with without_collection():
        runs = merged(_byte_runs(plan, checkpoint, writer, computed))
    copy_runs(runs, checkpoint, writer, moved)
    if computed:
        from .computing import compute

        compute(computed, checkpoint, writer, moved, budget, region)


def _byte_runs(plan: Plan, checkpoint: Checkpoint, writer: Writer, computed: list[Step]) -> Iterator[BareRun]:
    """The runs of bytes of all steps that only move them; the others are put on a list."""
    steps = plan.steps
    programs = Distinct(map(_PROGRAM, steps))
    as_bytes = {number: copies_bytes(program) for number, program in programs.objects.items()}
    alone = programs.each(lambda p: as_bytes[id(p)] and p.copies == (0,) and len(p.inputs) == 1)
    places, entries = writer.places, checkpoint.entries
    plain = checkpoint.lies_plainly  # then none of its entries need be asked
    if not plain:
        alone = [one and entries[step.sources[0]].lies_plainly for one, step in zip(alone, steps)]
    yield from _copies(list(compress(steps, alone)), checkpoint, writer)
    moves: dict[int, list[Move]] = {}
    for step in compress(steps, map(not_, alone)):
        sources, keys, program, _ = step
        targets = [places.get(key) for key in keys]
        if not any(targets):
            continue
        lie = list(map(entries.__getitem__, sources))
        if not as_bytes[id(program)] or program.moves is None or not (plain or all(one.lies_plainly for one in lie)):
            computed.append(step)
            continue
        if id(program) not in moves:
            moves[id(program)] = moves_of(program.moves, program.outputs)
        yield from runs_of(moves[id(program)], list(map(_FROM, lie)), targets)


def _copies(steps: Sequence[Step], checkpoint: Checkpoint, writer: Writer) -> Iterator[BareRun]:
    """The runs of steps that copy one tensor each, by far the most, without a call of Python for each."""
    sources, keys = (list(chain.from_iterable(map(itemgetter(n), steps))) for n in (0, 1))
    written = list(map(writer.places.__contains__, keys))
    places = _values(writer.places, compress(keys, written))
    entries = _values(checkpoint.entries, compress(sources, written))
    return map(add, places, map(_FROM, entries))


def _values(table: Mapping[str, T], keys: Iterable[str]) -> Iterable[T]:
    # Walking along 100,000 is several times as fast as looking them up.
    found = list(keys)
    return table.values() if found == list(table) else map(table.__getitem__, found)
