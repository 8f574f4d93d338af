"""Computing what is more than moving bytes, in bounded tasks that are spread over the cores.

A step that can be cut (`planning/cutting.py`) becomes runs of a megabyte or so, each of which reads only what it needs;
neighbours that are smaller are one run. Any other step is one task. Tasks run side by side as long as what they hold
together stays within a budget. torch is imported only where values change, and uses one intra-op thread a task: threads
over chunks are faster than one op over threads, and steadier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import CheckpointError, Diagnostic
from ...many_objects import gc_pause
from ...narrowing import present
from ...ops.base import Op, OpError
from ...ops.keyed import At, asks_at, run_at
from ...planning.costing import BUDGET, JOINED, REGION, held_by, region_limit, workers
from ...planning.cutting import Cut, Region, cut_of, regions_of
from ...planning.row_parts import RowParts, row_parts_of
from ...planning.steps import Program, Step
from ...specs import DTYPES
from ...storage.checkpoint import Checkpoint
from ...storage.contents import Entry
from .gathering import Batch, GatheredRegion, Gatherer, batches_of
from .joining_blocks import blends
from .making_rows import row_tasks
from .programs import Loads, run_step
from .sinks import Sink
from .strided_views import Elements, has_views
from .tasks import Moved, Task, run_tasks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["compute", "one_thread_each"]


def compute(
    steps: Sequence[Step], checkpoint: Checkpoint, sink: Sink, moved: Moved, budget: int = BUDGET, region: int = REGION
) -> None:
    """Make what steps make, over the cores; torch is imported where values change.

    Args:
        moved: called with bytes as they arrive.
        budget: bytes that tasks may hold together; a single larger one runs alone.
        region: bytes that a region of a step that can be cut should have.
    """
    programs = {id(step.program): step.program for step in steps}
    cuts = {number: cut_of(program) for number, program in programs.items()}
    rows = {number: row_parts_of(program) for number, program in programs.items() if cuts[number] is None}
    turned = {number: program.copies is None and has_views(program) for number, program in programs.items()}
    entries = checkpoint.entries
    handed = Loads(checkpoint.load, ())
    viewed = Loads(partial(Elements.of, checkpoint), ())
    gatherer = Gatherer(checkpoint)
    whole: dict[int, Task] = {}
    for step in steps:
        number, lie = id(step.program), list(map(entries.__getitem__, step.sources))
        cut = cuts[number] and step.program.copies is None
        # A tensor at an address is fetched by one request, and not by one for each of its rows.
        parted = rows.get(number) and not any(entry.file and checkpoint.is_remote(entry.file) for entry in lie)
        if (cut or parted) and all(entry.is_contiguous for entry in lie):
            continue  # only what is one run of a file can be read in parts
        work: _Views | _Handed
        if turned[number] and all(map(_on_host, lie)):
            viewed.expect(step)
            work = _Views(step, sink, viewed, gatherer)
        else:
            handed.expect(step)
            work = _Handed(step, sink, handed, any(entry.tensor is not None for entry in lie))
        whole[id(step)] = Task(held_by(step.program, None, None), work)
    checkpoint.read_in_order(checkpoint.files)
    runs = _joined(
        _runs_of(steps, whole, cuts, rows, sink, region, gatherer), min(JOINED * region, budget // workers())
    )
    tasks = (one if isinstance(one, Task) else Task(one.held, _Making(one, gatherer, sink)) for one in runs)
    by_torch = (
        any(rows.values())
        or any(any(cut.chains) for cut in cuts.values() if cut)
        or any(isinstance(task.run, _Handed) and task.run.step.kind == "compute" for task in whole.values())
    )
    with one_thread_each() if by_torch else nullcontext():
        run_tasks(tasks, moved, budget)


def _on_host(entry: Entry) -> bool:
    """Whether a tensor is in a file or in this process's memory; one that is built when asked for is built there."""
    tensor = entry.tensor
    return tensor is None or callable(tensor) or bool(tensor.device.type == "cpu")


class _Way(NamedTuple):
    """How elements are made: ops on them one by one, the dtype that they are read in, the bytes that one becomes."""

    ops: tuple[Op, ...]
    dtype: str
    size: int


@dataclass(slots=True)
class _MadeRun:
    """Bytes `[start, stop)` of a file, made in one way of parts one after another."""

    file: str
    start: int
    stop: int
    way: _Way
    held: int
    parts: list[GatheredRegion]


def _runs_of(
    steps: Sequence[Step],
    whole: Mapping[int, Task],
    cuts: Mapping[int, Cut | None],
    rows: Mapping[int, RowParts | None],
    sink: Sink,
    region: int,
    gatherer: Gatherer,
) -> Iterator[_MadeRun | Task]:
    """What steps make, in their order, a region at a time; those that are not cut are tasks already."""
    regions: dict[int, list[tuple[Region, list[Batch], _Way, int]]] = {}
    places = sink.places
    for step in steps:
        program = step.program
        cut = cuts[id(program)]
        if id(step) in whole:
            yield whole[id(step)]
            continue
        if cut is None:
            yield from row_tasks(step, present(rows[id(program)], "rows"), gatherer.checkpoint, sink, region, gatherer)
            continue
        if cut.joins is not None:
            yield from blends(step, cut, sink, gatherer, region)
            continue
        if id(program) not in regions:
            found = regions_of(cut.layout, region_limit(program, region))
            regions[id(program)] = [
                (one, batches_of(one), _way(program, cut, one), held_by(program, cut, one)) for one in found
            ]
        for one, batches, way, held in regions[id(program)]:
            place = places.get(step.targets[one.target])
            if place is not None:
                start, stop = place.offset + one.start * way.size, place.offset + one.stop * way.size
                yield _MadeRun(place.file, start, stop, way, held, [GatheredRegion(step, one, batches)])


def _way(program: Program, cut: Cut, region: Region) -> _Way:
    size = DTYPES[program.outputs[region.target].dtype].itemsize
    return _Way(cut.chains[region.target], program.inputs[region.pieces[0].source].dtype, size)


def _joined(runs: Iterable[_MadeRun | Task], limit: int) -> Iterator[_MadeRun | Task]:
    """Neighbours in the target that are made in one way, as one: small tensors are many.

    Args:
        limit: bytes that what is joined may hold.
    """
    last: _MadeRun | None = None
    for run in runs:
        if isinstance(run, Task):
            if last is not None:
                yield last
            last = None
            yield run
        elif (
            last is not None
            and not any(map(asks_at, run.way.ops))  # each key has its own numbers
            and last.stop == run.start
            and last.held + run.held <= limit
            and last.file == run.file
            and (last.way is run.way or last.way == run.way)
        ):
            last.stop, last.held = run.stop, last.held + run.held
            last.parts += run.parts
        else:
            if last is not None:
                yield last
            last = run
    if last is not None:
        yield last


_threads = Lock()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """torch's thread count is the process's own, so only one run at a time may have it, and gives it back."""
    with gc_pause():
        import torch

    with _threads:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class _Handed:
    """A step on whole tensors, which are handed on as they come out; copies are the source's own tensors."""

    step: Step
    sink: Sink
    loads: Loads[Tensor]
    borrowed: bool

    def __call__(self) -> int:
        step, sink = self.step, self.sink
        places = {key: sink.places[key] for key in step.targets if key in sink.places}
        total = sum(place.nbytes for place in places.values())
        if places and all(sink.has(*place) for place in places.values()):
            sink.skip(total)
        elif places:
            for key, tensor in zip(step.targets, run_step(step, self.loads)):
                if key in places:
                    sink.put(key, tensor, self.borrowed)
        self.loads.done(step)
        return total


@dataclass(frozen=True, slots=True)
class _Views:
    """A step that only rearranges, one target after another, through views of its sources."""

    step: Step
    sink: Sink
    loads: Loads[Elements]
    gatherer: Gatherer

    def __call__(self) -> int:
        step, sink, layout, total = self.step, self.sink, self.step.program.moves, 0
        rows: dict[int, Any] = {}
        for target, key in enumerate(step.targets):
            place = sink.places.get(key)
            if layout is None or place is None:
                continue
            total += place.nbytes
            if sink.has(*place):
                sink.skip(place.nbytes)
                continue
            for number in {piece.source for piece in layout.into(target)} - rows.keys():
                rows[number] = self.loads(step.sources[number]).row
            # Without room of the sink it is made in a buffer of this thread, which the next target overwrites.
            made = self.gatherer.turned(layout, target, rows, sink.room(*place))
            sink.write(place.file, place.offset, made.view("u1").data)
        self.loads.done(step)
        return total


@dataclass(frozen=True, slots=True)
class _Making:
    """Making one run of a file."""

    made: _MadeRun
    gatherer: Gatherer
    sink: Sink

    def __call__(self) -> int:
        run, way = self.made, self.made.way
        nbytes = run.stop - run.start
        if self.sink.has(run.file, run.start, nbytes):
            self.sink.skip(nbytes)
            return nbytes
        room = None if way.ops else self.sink.room(run.file, run.start, nbytes)
        flat = self.gatherer.gathered(run.parts, DTYPES[way.dtype].itemsize, room)
        self.sink.write(run.file, run.start, self._applied(flat) if way.ops else flat.view("u1").data)
        return nbytes

    def _applied(self, flat: Any) -> memoryview:
        import torch

        from ...ops.numerics import torch_dtype
        from ...storage.tensors import dense_bytes

        run = self.made
        key = run.parts[0].step.targets[run.parts[0].region.target]
        made = torch.frombuffer(flat, dtype=torch_dtype(run.way.dtype))
        part = run.parts[0]
        at = At(key, start=part.region.start)
        try:
            for op in run.way.ops:
                (made,) = run_at(op, (made,), at)
        except OpError as error:
            for part in run.parts:
                run_step(part.step, self.gatherer.checkpoint.load)  # says it of the whole tensor
            raise CheckpointError(Diagnostic("op-failed", str(error), place=key)) from error
        return dense_bytes(made, key)
