"""What a plan will cost, known before it runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ..specs import DTYPES
from ..wording import counted, shown_bytes
from .cutting import Cut, Region, copies_bytes, cut_of, extent_of, regions_of, surveys_of
from .record import PlanRecord
from .row_parts import row_parts_of
from .steps import Program, Step, programs_of

__all__ = [
    "BUDGET",
    "CHUNK",
    "JOINED",
    "REGION",
    "TOGETHER",
    "Cost",
    "block_limit",
    "cost_of",
    "held_by",
    "held_by_block",
    "largest_step",
    "region_limit",
    "workers",
]

CHUNK = 1 << 20
"""Bytes that a copy reads at a time."""

REGION = 1 << 20
"""Bytes of a target that are computed at a time where a step can be cut."""

JOINED = 2
"""Regions' worth of bytes that small neighbours may hold together when they are made as one."""

TOGETHER = 1 << 17
"""Elements of small pieces that are read together, before one copy puts them in their places."""

BUDGET = 256 << 20
"""Bytes that tasks side by side may hold together; a single larger one runs alone."""


def workers() -> int:
    """Tasks that run side by side."""
    return min(os.cpu_count() or 1, 8)


@dataclass(frozen=True)
class Cost:
    """What running a plan takes, in bytes.

    Args:
        bytes_read: read from the source, what must be proved equal included.
        bytes_written: written to a file; tied tensors once.
        peak_memory: held at once while streaming to a file, with tasks on every core, beside the interpreter and torch.
        least_memory: held by the largest task alone, so that no less will do.
        copies, moves, computes: steps by kind; copies and moves never change a value.
    """

    bytes_read: int
    bytes_written: int
    peak_memory: int
    least_memory: int
    copies: int
    moves: int
    computes: int

    def to_json(self) -> dict[str, Any]:
        """The cost as plain data."""
        return dict(vars(self))

    def __str__(self) -> str:
        return (
            f"reads {shown_bytes(self.bytes_read)}, writes {shown_bytes(self.bytes_written)}, "
            f"holds at most {shown_bytes(self.peak_memory)}; "
            f"{counted(self.copies, 'copy')}, {counted(self.moves, 'move')}, {self.computes:,} computed"
        )


def cost_of(
    plan: PlanRecord,
    aliases: Collection[str] | None = None,
    unread: Collection[tuple[str, str]] = (),
    scattered: Collection[str] = (),
) -> Cost:
    """The cost of streaming a plan to a file.

    Args:
        aliases: target keys that share the tensor of another, so that nothing is written for them; the plan's own
            ties where nothing more is known.
        unread: pairs of source keys that are one tensor, so that nothing need be read to prove them equal.
        scattered: source keys whose tensors are no run of bytes in their file, so that they are read whole.
    """
    tied, apart = frozenset(plan.ties if aliases is None else aliases), frozenset(scattered)
    runs = programs_of(plan.steps)
    programs = {id(program): program for program, _ in runs}
    kinds: Counter[str] = Counter()
    for program, times in runs:
        kinds[program.kind] += times
    ways = _ways(plan.steps, runs, tied, apart)
    known = {(n, plain): _taken(programs[n], plain) for n, plain in {(n, plain) for n, _, plain in ways}}
    read = written = total = buffer = largest = 0
    whole: set[_Way] = set()
    for (number, kept, plain), times in ways.items():
        taken, outputs = known[number, plain], programs[number].outputs
        wanted = range(len(outputs)) if kept is None else kept
        if not wanted:
            continue
        written += times * sum(outputs[n].nbytes for n in wanted)
        if taken.reads is None:
            whole.add((number, kept, plain))
        else:
            read += times * sum(taken.reads[n] for n in wanted)
        total, largest, buffer = total + times * taken.held, max(largest, taken.largest), max(buffer, taken.buffer)
    if whole:
        sources = {key for s in plan.steps if _way(s, tied, apart) in whole for key in s.sources}
        read += sum(plan.source[key].nbytes for key in sources if key in plan.source)
    read += sum(plan.source[k].nbytes for pair in plan.proofs if pair not in unread for k in pair)
    task = max(largest, JOINED * REGION)  # small neighbours are made as one
    peak = max(buffer, min(total, max(largest, min(BUDGET, workers() * task))))
    return Cost(read, written, peak, max(buffer, largest), kinds["copy"], kinds["move"], kinds["compute"])


_Way = tuple[int, tuple[int, ...] | None, bool]
"""What a step costs by: its program, which of its targets are written, whether all of its sources lie plainly."""


def _way(step: Step, tied: frozenset[str], apart: frozenset[str]) -> _Way:
    kept = None if tied.isdisjoint(step.targets) else tuple(n for n, key in enumerate(step.targets) if key not in tied)
    return id(step.program), kept, apart.isdisjoint(step.sources)


def _ways(
    steps: Sequence[Step], runs: Sequence[tuple[Program, int]], tied: frozenset[str], apart: frozenset[str]
) -> Counter[_Way]:
    """How many steps go each way; the most write all of their targets, from sources that lie plainly."""
    ways: Counter[_Way] = Counter({(id(program), None, True): times for program, times in runs})
    if tied or apart:
        odd = [s for s in steps if not (tied.isdisjoint(s.targets) and apart.isdisjoint(s.sources))]
        ways.subtract((id(step.program), None, True) for step in odd)
        ways.update(_way(step, tied, apart) for step in odd)
    return +ways


def largest_step(plan: PlanRecord, scattered: Collection[str] = ()) -> Step:
    """The step that holds most at once; `scattered` as for `cost_of`."""
    apart = frozenset(scattered)
    rows = [(id(step.program), apart.isdisjoint(step.sources)) for step in plan.steps]
    known: dict[tuple[int, bool], int] = {}
    for step, row in zip(plan.steps, rows):
        if row not in known:
            taken = _taken(step.program, row[1])
            known[row] = max(taken.largest, taken.buffer)
    return max(zip(plan.steps, rows), key=lambda pair: known[pair[1]])[0]


@dataclass(frozen=True, slots=True)
class _Taken:
    """What one program takes: bytes read for each target (None: each source whole), held by tasks, held to copy."""

    reads: tuple[int, ...] | None
    held: int = 0
    largest: int = 0
    buffer: int = 0


def _taken(program: Program, plain: bool) -> _Taken:
    """What a program takes where its sources lie plainly, each in one run of bytes, or where one does not."""
    outputs = program.outputs
    if plain and copies_bytes(program):
        sizes = tuple(s.nbytes for s in outputs)
        return _Taken(sizes, buffer=min(CHUNK, max(sizes, default=0)))
    cut = cut_of(program) if plain else None
    if cut is None:
        rows = row_parts_of(program) if plain else None
        if rows is not None:
            tasks = [rows.held(part) for part in rows.parts(region_limit(program, REGION))]
            return _Taken(None, sum(tasks), max(tasks, default=0))
        held = held_by(program, None, None)
        return _Taken(None, held, held)
    if cut.joins is not None:
        return _taken_joined(program, cut)
    reads = [0] * len(outputs)
    regions = list(regions_of(cut.layout, region_limit(program, REGION)))
    for piece in (piece for region in regions for piece in region.pieces):
        size = DTYPES[program.inputs[piece.source].dtype].itemsize
        reads[piece.target] += extent_of(piece.shape, piece.source_strides) * size
    tasks = [held_by(program, cut, region) for region in regions]
    return _Taken(tuple(reads), sum(tasks), max(tasks, default=0))


def _taken_joined(program: Program, cut: Cut) -> _Taken:
    """What a program takes whose ops get blocks of several tensors: its sources once, or more, and a block of each."""
    reads, held = [], []
    for number, (row, output) in enumerate(zip(cut.rows, program.outputs)):
        once = sum(row_bytes(program, cut, target, output.numel) for target, _ in row)
        reads.append(once * (1 + surveys_of(program, cut, number)))
        held.append(held_by_block(program, cut, len(row)))
    return _Taken(tuple(reads), sum(held), max(held, default=0))


def row_bytes(program: Program, cut: Cut, target: int, count: int) -> int:
    """Bytes that so many elements of a row are in its sources."""
    pieces = cut.layout.into(target)
    return count * DTYPES[program.inputs[pieces[0].source].dtype].itemsize if pieces else 0


def held_by_block(program: Program, cut: Cut, rows: int) -> int:
    """Bytes that a task holds which makes one block of a target: the rows as they are read and as float32, and more."""
    widest = max(DTYPES[s.dtype].itemsize for s in (*program.inputs, *program.outputs))
    largest = max((s.numel for s in program.outputs), default=0)
    return min(block_limit(program, REGION), largest) * (2 * rows + 3) * max(4, widest)


def block_limit(program: Program, nbytes: int) -> int:
    """Elements of a block of rows that an op joins: less than a region, since each row is held as float32 besides.

    Threads hand the interpreter over after each of torch's calls, so half as much took 1.3 times as long.
    """
    return max(1, region_limit(program, nbytes) * 3 // 4)


def region_limit(program: Program, nbytes: int) -> int:
    """Elements of a region of so many bytes, by the widest dtype of a program."""
    return max(1, nbytes // max(DTYPES[s.dtype].itemsize for s in (*program.inputs, *program.outputs)))


def held_by(program: Program, cut: Cut | None, region: Region | None) -> int:
    """Bytes that a task holds: sources and targets of a whole step; of a region what is read, made, and in between."""
    if cut is None or region is None:
        return sum(s.nbytes for s in program.inputs) + sum(s.nbytes for s in program.outputs)
    count = region.stop - region.start
    old = DTYPES[program.inputs[region.pieces[0].source].dtype].itemsize
    new = DTYPES[program.outputs[region.target].dtype].itemsize if cut.chains[region.target] else 0
    if all(p.contiguous for p in region.pieces):
        return count * (old + new)
    panel = max(extent_of(p.shape, p.source_strides) for p in region.pieces)
    # read as it lies, and once more with rows that are a little further apart
    return count * (old + new) + 2 * max(panel, min(count, TOGETHER)) * old
