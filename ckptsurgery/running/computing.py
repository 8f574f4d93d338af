"""Computing what is more than moving bytes, in bounded tasks that are spread over the cores.

A step that can be cut (`planning/cutting.py`) becomes tasks of a megabyte or so, each of which reads only what it needs
and writes one run of bytes; any other step is one task. Tasks run side by side as long as what they hold together stays
within a budget. Each uses one intra-op thread: threads over chunks are faster than one op over threads, and steadier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from threading import Condition, Lock
from typing import Any, Protocol

from ..collection import without_collection
from ..errors import CheckpointError, Diagnostic
from ..ops.base import Op, OpError
from ..planning.costing import BUDGET, REGION, held_by, region_limit, workers
from ..planning.cutting import Cut, Region, cut_of, regions_of
from ..planning.steps import Step
from ..specs import DTYPES
from ..storage.checkpoint import Checkpoint
from ..storage.contents import Extent
from .executing import Loads, run_step
from .gathering import Batch, Gatherer, batches_of
from .placing import Elements, has_views

__all__ = ["Sink", "Task", "compute", "one_thread_each", "run_tasks"]

Moved = Callable[[int], object]


class Sink(Protocol):
    """What takes the bytes that tasks make: a writer, or whoever wants to compare them."""

    places: dict[str, Extent]

    def has(self, file: str, offset: int, nbytes: int) -> bool:
        """Whether a run of bytes need not be made."""

    def skip(self, nbytes: int) -> None:
        """Count bytes that need not be made."""

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
    by_views = all(has_views(s.program) and all(entries[key].lies_plainly for key in s.sources) for s in wholes)
    by_torch = not by_views or any(any(cut.chains) for cut in cuts.values() if cut)
    maker = (_ByViews if by_views else _ByTorch)(checkpoint, wholes)
    whole = {id(step): Task(held_by(step.program, None, None), _Whole(step, writer, maker)) for step in wholes}
    checkpoint.read_in_order(checkpoint.files)
    with one_thread_each() if by_torch else nullcontext():
        run_tasks(_tasks_of(steps, whole, cuts, Gatherer(checkpoint), writer, region), moved, budget)


def _tasks_of(
    steps: Sequence[Step],
    whole: Mapping[int, Task],
    cuts: Mapping[int, Cut | None],
    gatherer: Gatherer,
    writer: Sink,
    region: int,
) -> Iterator[Task]:
    """The tasks of steps, in the order of the steps; those that are not cut are tasks already."""
    regions: dict[int, list[tuple[int, Region, list[Batch]]]] = {}
    for step in steps:
        program = step.program
        cut = cuts[id(program)]
        if cut is None or id(step) in whole:
            yield whole[id(step)]
            continue
        if id(program) not in regions:
            found = regions_of(cut.layout, region_limit(program, region))
            regions[id(program)] = [(held_by(program, cut, one), one, batches_of(one)) for one in found]
        for held, one, batches in regions[id(program)]:
            if step.targets[one.target] in writer.places:
                yield Task(held, _Regional(step, cut, one, batches, gatherer, writer))


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
            for key, made in zip(step.targets, self.maker.made(step)):
                if key in places:
                    writer.write(places[key].file, places[key].offset, made)
        self.maker.loads.done(step)
        return total


class _ByTorch:
    """Makes the targets of a step together, from tensors."""

    def __init__(self, checkpoint: Checkpoint, steps: Sequence[Step]) -> None:
        self.loads = Loads(checkpoint.load, steps)

    def made(self, step: Step) -> Iterator[memoryview]:
        """The bytes of each target."""
        from ..storage.tensors import dense_bytes

        return map(dense_bytes, run_step(step, self.loads), step.targets)


class _ByViews:
    """Makes one target after another of a step that only rearranges, through views of the files."""

    def __init__(self, checkpoint: Checkpoint, steps: Sequence[Step]) -> None:
        self.loads = Loads(partial(Elements.of, checkpoint), steps)
        self._gatherer = Gatherer(checkpoint)

    def made(self, step: Step) -> Iterator[memoryview]:
        """The bytes of each target; they are overwritten by those of the next."""
        layout = step.program.moves
        assert layout is not None
        rows = {n: self.loads(step.sources[n]).row for n in {piece.source for piece in layout.pieces}}
        for target in range(len(step.targets)):
            yield self._gatherer.turned(layout, target, rows).view("u1").data


@dataclass(frozen=True, slots=True)
class _Regional:
    """One region of one target."""

    step: Step
    cut: Cut
    region: Region
    batches: Sequence[Batch]
    gatherer: Gatherer
    writer: Sink

    def __call__(self) -> int:
        step, region, key = self.step, self.region, self.step.targets[self.region.target]
        size = DTYPES[step.program.outputs[region.target].dtype].itemsize
        place, count = self.writer.places[key], region.stop - region.start
        if self.writer.has(place.file, place.offset + region.start * size, count * size):
            self.writer.skip(count * size)
            return count * size
        dtype = step.program.inputs[region.pieces[0].source].dtype
        flat = self.gatherer.gathered(region, self.batches, step.sources, DTYPES[dtype].itemsize)
        ops = self.cut.chains[region.target]
        made = self._applied(ops, flat, dtype) if ops else flat.view("u1").data
        self.writer.write(place.file, place.offset + region.start * size, made)
        return count * size

    def _applied(self, ops: Sequence[Op], flat: Any, dtype: str) -> memoryview:
        import torch

        from ..ops.numerics import torch_dtype
        from ..storage.tensors import dense_bytes

        key = self.step.targets[self.region.target]
        made = torch.frombuffer(flat, dtype=torch_dtype(dtype))
        try:
            for op in ops:
                (made,) = op.run((made,))
        except OpError as error:
            run_step(self.step, self.gatherer.checkpoint.load)  # says it of the whole tensor
            raise CheckpointError(Diagnostic("op-failed", str(error), place=key)) from error
        return dense_bytes(made, key)
