"""`execute`: carries steps out, from wherever their sources are to wherever a sink wants what they make.

Three things can happen to a step. What moves runs of bytes of files goes from there to the sink as it is. What can be
cut into regions, or seen through views, is gathered by numpy and computed a region at a time. Everything else is done
on whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress
from operator import add, attrgetter, itemgetter, not_
from typing import TypeVar

from ...many_objects import ById, gc_pause
from ...planning.costing import BUDGET, REGION
from ...planning.cutting import copies_bytes
from ...planning.steps import Program, Step
from ...storage.checkpoint import Checkpoint
from .chunking import over_chunks
from .copying import BareRun, Move, merged, moves_of, runs_of
from .sinks import Sink
from .tasks import Moved

__all__ = ["execute"]

T = TypeVar("T")
_PROGRAM = itemgetter(2)
_FROM = attrgetter("file", "offset")


def execute(
    steps: Sequence[Step],
    checkpoint: Checkpoint,
    sink: Sink,
    moved: Moved,
    *,
    budget: int = BUDGET,
    region: int = REGION,
) -> None:
    """Make what steps make: first what only moves, in the order of the output, then the rest, over the cores.

    Args:
        checkpoint: the source.
        sink: takes what is made, for the keys that it has places for.
        moved: called with bytes as they arrive.
        budget: bytes that tasks may hold together; a single larger one runs alone.
        region: bytes of a target that are made at a time where a step can be cut.

    Raises:
        CheckpointError: a source cannot be read, the sink cannot take something, or an op refused what it met.
    """
    computed: list[Step] = []
    with gc_pause():
        steps, checkpoint = over_chunks(steps, checkpoint)
        checkpoint = checkpoint if sink.keeps_tensors else checkpoint.placed()
        runs = merged(_byte_runs(steps, checkpoint, sink, computed))
    if runs:
        sink.take_runs(runs, checkpoint, moved)
    if computed:
        from .computing import compute

        compute(computed, checkpoint, sink, moved, budget, region)


def _byte_runs(steps: Sequence[Step], checkpoint: Checkpoint, sink: Sink, computed: list[Step]) -> Iterator[BareRun]:
    """The runs of bytes of all steps that only move them; the others are put on a list."""
    programs = ById(map(_PROGRAM, steps))
    moves = {number: _moves(program) for number, program in programs.objects.items()}
    places, entries = sink.places, checkpoint.entries
    plain = checkpoint.is_contiguous  # then none of its entries need be asked
    wanted = list(sink.wants_runs(steps, moves))
    single = programs.each(lambda p: moves[id(p)] is not None and p.copies == (0,) and len(p.inputs) == 1)
    alone = [one and run for one, run in zip(single, wanted)]
    if not plain:
        alone = [one and entries[step.sources[0]].is_contiguous for one, step in zip(alone, steps)]
    yield from _copies(list(compress(steps, alone)), checkpoint, places)
    others = map(not_, alone)
    for step, run in compress(zip(steps, wanted), others):
        sources, keys, program, _ = step
        targets = list(map(places.get, keys))
        if not any(targets):
            continue
        found, lie = moves[id(program)], list(map(entries.__getitem__, sources))
        if found is None or not run or not (plain or all(one.is_contiguous for one in lie)):
            computed.append(step)
        else:
            yield from runs_of(found, list(map(_FROM, lie)), targets)


def _moves(program: Program) -> list[Move] | None:
    """The runs of bytes that a program moves; None where it does more, or they are too short to go one by one."""
    return moves_of(program.moves, program.outputs) if program.moves is not None and copies_bytes(program) else None


def _copies(steps: Sequence[Step], checkpoint: Checkpoint, places: Mapping[str, object]) -> Iterator[BareRun]:
    """The runs of steps that copy one tensor each, by far the most, without a call of Python for each."""
    sources, keys = (list(chain.from_iterable(map(itemgetter(n), steps))) for n in (0, 1))
    written = list(map(places.__contains__, keys))
    to = _values(places, compress(keys, written))
    entries = _values(checkpoint.entries, compress(sources, written))
    return map(add, to, map(_FROM, entries))


def _values(table: Mapping[str, T], keys: Iterable[str]) -> Iterable[T]:
    # Walking along 100,000 is several times as fast as looking them up.
    found = list(keys)
    return table.values() if found == list(table) else map(table.__getitem__, found)
