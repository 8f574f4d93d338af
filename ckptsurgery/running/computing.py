"""Computing what is more than moving bytes, in bounded tasks that are spread over the cores.

A step that can be cut (`planning/cutting.py`) becomes runs of a megabyte or so, each of which reads only what it needs;
neighbours that are smaller are one run. Any other step is one task. Tasks run side by side as long as what they hold
together stays within a budget. torch is imported only where values change, and uses one intra-op thread a task: threads
over chunks are faster than one op over threads, and steadier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from threading import Condition, Lock
from typing import Any, NamedTuple, Protocol

from ..collection import without_collection
from ..errors import CheckpointError, Diagnostic
from ..ops.base import Op, OpError
from ..planning.costing import BUDGET, JOINED, REGION, held_by, region_limit, workers
from ..planning.cutting import Cut, Region, cut_of, regions_of
from ..planning.steps import Program, Step
from ..specs import DTYPES
from ..storage.checkpoint import Checkpoint
from ..storage.contents import Extent
from .executing import Loads, run_step
from .gathering import Batch, Gatherer, Part, batches_of
from .placing import Elements, has_views

__all__ = ["Sink", "Task", "compute", "one_thread_each", "run_tasks"]

Moved = Callable[[int], object]


class Sink(Protocol):
    """What takes the bytes that tasks make: a writer, the memory of tensors, or whoever wants to compare them."""

    places: dict[str, Extent]

    def has(self, file: str, offset: int, nbytes: int) -> bool:
        """Whether a run of bytes need not be made."""

    def skip(self, nbytes: int) -> None:
        """Count bytes that need not be made."""

    def room(self, file: str, offset: int, nbytes: int) -> memoryview | None:
        """Memory that a run of bytes is to be made in before it is written; None where it may lie anywhere."""

    def write(self, file: str, offset: int, data: Any) -> None:
        """Take a run of bytes."""


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work: the bytes that it holds while it runs, and what it does; it returns the bytes it wrote."""

    held: int
    run: Callable[[], int]


def compute(
    steps: Sequence[Step],
    checkpoint: Checkpoint,
    writer: Sink,
    moved: Moved,
    budget: int = BUDGET,
    region: int = REGION,
) -> None:
    """Make what steps make, over the cores; torch is imported where values change.

    Args:
        moved: hears of bytes as they are written.
        budget: bytes that tasks may hold together; a single larger one runs alone.
        region: bytes that a region of a step that can be cut should have.
    """
    programs = {id(step.program): step.program for step in steps}
    cuts = {number: cut_of(program) for number, program in programs.items()}
    # Only what lies in one run of a file can be read in parts.
    plain, entries = attrgetter("lies_plainly"), checkpoint.entries
    parts = [s for s in steps if cuts[id(s.program)] and all(map(plain, map(entries.__getitem__, s.sources)))]
    cut_up = set(map(id, parts))
    wholes = [s for s in steps if id(s) not in cut_up]
    by_views = all(has_views(s.program) for s in wholes)
    by_torch = not by_views or any(any(cut.chains) for cut in cuts.values() if cut)
    maker = (_ByViews if by_views else _ByTorch)(checkpoint, wholes)
    whole = {id(step): Task(held_by(step.program, None, None), _Whole(step, writer, maker)) for step in wholes}
    checkpoint.read_in_order(checkpoint.files)
    runs = _joined(_runs_of(steps, whole, cuts, writer, region), min(JOINED * region, budget // workers()))
    gatherer = Gatherer(checkpoint)
    tasks = (one if isinstance(one, Task) else Task(one.held, _Making(one, gatherer, writer)) for one in runs)
    with one_thread_each() if by_torch else nullcontext():
        run_tasks(tasks, moved, budget)


class _Way(NamedTuple):
    """How elements are made: ops on them one by one, the dtype that they are read in, the bytes that one becomes."""

    ops: tuple[Op, ...]
    dtype: str
    size: int


@dataclass(slots=True)
class _Run:
    """Bytes `[start, stop)` of a file, made in one way of parts one after another."""

    file: str
    start: int
    stop: int
    way: _Way
    held: int
    parts: list[Part]


def _runs_of(
    steps: Sequence[Step], whole: Mapping[int, Task], cuts: Mapping[int, Cut | None], writer: Sink, region: int
) -> Iterator[_Run | Task]:
    """What steps make, in their order, a region at a time; those that are not cut are tasks already."""
    regions: dict[int, list[tuple[Region, list[Batch], _Way, int]]] = {}
    places = writer.places
    for step in steps:
        program = step.program
        cut = cuts[id(program)]
        if cut is None or id(step) in whole:
            yield whole[id(step)]
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
                yield _Run(place.file, start, stop, way, held, [Part(step, one, batches)])


def _way(program: Program, cut: Cut, region: Region) -> _Way:
    size = DTYPES[program.outputs[region.target].dtype].itemsize
    return _Way(cut.chains[region.target], program.inputs[region.pieces[0].source].dtype, size)


def _joined(runs: Iterable[_Run | Task], limit: int) -> Iterator[_Run | Task]:
    """Neighbours in the target that are made in one way, as one: small tensors are many.

    Args:
        limit: bytes that what is joined may hold.
    """
    last: _Run | None = None
    for run in runs:
        if isinstance(run, Task):
            if last is not None:
                yield last
            last = None
            yield run
        elif (
            last is not None
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


def run_tasks(tasks: Iterable[Task], moved: Moved, budget: int = BUDGET) -> None:
    """Run tasks over the cores; the first failure stops the rest, and is raised when nothing runs any more.

    Args:
        moved: hears of what each task returns, from any thread, but from one at a time.
        budget: bytes that tasks may hold together; a single larger one runs alone.
    """
    queue = _Queue(tasks, moved, budget)
    with ThreadPoolExecutor(workers(), thread_name_prefix="ckptsurgery") as pool:
        try:
            for thread in as_completed([pool.submit(queue.work) for _ in range(workers())]):
                thread.result()
        finally:
            queue.stop()


class _Queue:
    """Tasks for threads of which each takes the next one as soon as it is done with the last."""

    def __init__(self, tasks: Iterable[Task], moved: Moved, budget: int) -> None:
        self._tasks, self._moved, self._budget = iter(tasks), moved, budget
        self._next: Task | None = None
        self._held = 0
        self._stopped = False
        self._changed = Condition()

    def work(self) -> None:
        """Run tasks until there are no more, or one of them fails."""
        try:
            while (task := self._taken()) is not None:
                nbytes = task.run()
                with self._changed:
                    self._held -= task.held
                    self._changed.notify_all()
                    self._moved(nbytes)
        finally:
            self.stop()  # a task failed, or there are no more

    def stop(self) -> None:
        """Let nothing begin any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _taken(self) -> Task | None:
        """The next task, as soon as there is room for what it holds."""
        with self._changed:
            while not self._stopped:
                self._next = task = self._next or next(self._tasks, None)
                if task is None:
                    return None
                if not self._held or self._held + task.held <= self._budget:
                    self._next = None
                    self._held += task.held
                    return task
                self._changed.wait()
            return None


_threads = Lock()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """torch's thread count is the process's own, so only one run at a time may have it, and gives it back."""
    with without_collection():
        import torch

    with _threads:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class _Whole:
    """A step on whole tensors."""

    step: Step
    writer: Sink
    maker: _ByTorch | _ByViews

    def __call__(self) -> int:
        step, writer = self.step, self.writer
        places = {key: writer.places[key] for key in step.targets if key in writer.places}
        total = sum(place.nbytes for place in places.values())
        if all(writer.has(*place) for place in places.values()):
            writer.skip(total)
        else:
            for key, made in zip(step.targets, self.maker.made(step, writer)):
                if key in places:
                    writer.write(places[key].file, places[key].offset, made)
        self.maker.loads.done(step)
        return total


class _ByTorch:
    """Makes the targets of a step together, from tensors."""

    def __init__(self, checkpoint: Checkpoint, steps: Sequence[Step]) -> None:
        self.loads = Loads(checkpoint.load, steps)

    def made(self, step: Step, writer: Sink) -> Iterator[memoryview]:
        """The bytes of each target."""
        from ..storage.tensors import dense_bytes

        return map(dense_bytes, run_step(step, self.loads), step.targets)


class _ByViews:
    """Makes one target after another of a step that only rearranges, through views of the files."""

    def __init__(self, checkpoint: Checkpoint, steps: Sequence[Step]) -> None:
        self.loads = Loads(partial(Elements.of, checkpoint), steps)
        self._gatherer = Gatherer(checkpoint)

    def made(self, step: Step, writer: Sink) -> Iterator[memoryview]:
        """The bytes of each target; without room of the writer for them, they are overwritten by those of the next."""
        layout = step.program.moves
        assert layout is not None
        rows = {n: self.loads(step.sources[n]).row for n in {piece.source for piece in layout.pieces}}
        for target, key in enumerate(step.targets):
            place = writer.places.get(key)
            room = writer.room(*place) if place is not None else None
            yield self._gatherer.turned(layout, target, rows, room).view("u1").data


@dataclass(frozen=True, slots=True)
class _Making:
    """Making one run of a file."""

    made: _Run
    gatherer: Gatherer
    writer: Sink

    def __call__(self) -> int:
        run, way = self.made, self.made.way
        nbytes = run.stop - run.start
        if self.writer.has(run.file, run.start, nbytes):
            self.writer.skip(nbytes)
            return nbytes
        room = None if way.ops else self.writer.room(run.file, run.start, nbytes)
        flat = self.gatherer.gathered(run.parts, DTYPES[way.dtype].itemsize, room)
        self.writer.write(run.file, run.start, self._applied(flat) if way.ops else flat.view("u1").data)
        return nbytes

    def _applied(self, flat: Any) -> memoryview:
        import torch

        from ..ops.numerics import torch_dtype
        from ..storage.tensors import dense_bytes

        run = self.made
        key = run.parts[0].step.targets[run.parts[0].region.target]
        made = torch.frombuffer(flat, dtype=torch_dtype(run.way.dtype))
        try:
            for op in run.way.ops:
                (made,) = op.run((made,))
        except OpError as error:
            for part in run.parts:
                run_step(part.step, self.gatherer.checkpoint.load)  # says it of the whole tensor
            raise CheckpointError(Diagnostic("op-failed", str(error), place=key)) from error
        return dense_bytes(made, key)
