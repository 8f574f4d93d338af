"""Computing what is more than moving bytes, in bounded tasks that are spread over the cores.

A step that can be cut (`planning/cutting.py`) becomes tasks of a megabyte or so, each of which reads only what it needs
and writes one run of bytes; any other step is one task. Tasks run side by side as long as what they hold together stays
within a budget. Each uses one intra-op thread: threads over chunks are faster than one op over threads, and steadier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from threading import Lock, local
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError, Diagnostic
from ..ops.base import Op, OpError
from ..planning.costing import BUDGET, REGION, held_by, region_limit, workers
from ..planning.cutting import Cut, Region, cut_of, extent_of, regions_of
from ..planning.layout import Piece
from ..planning.steps import Step
from ..specs import DTYPES
from ..storage.checkpoint import Checkpoint
from ..storage.contents import Extent
from .executing import Loads, move_box, run_step

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Sink", "Task", "run_tasks", "tasks_of"]

_LARGE_BOX = 1 << 16
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


def tasks_of(steps: Sequence[Step], checkpoint: Checkpoint, writer: Sink, region: int = REGION) -> Iterator[Task]:
    """The tasks of steps, in the order of the steps.

    Args:
        region: bytes that a region of a step that can be cut should have.
    """
    programs = {id(step.program): step.program for step in steps}
    cuts = {number: cut_of(program) for number, program in programs.items()}
    regions: dict[int, list[tuple[int, Region]]] = {}
    # Only what lies in one run of a file can be read in parts.
    plain, entries = attrgetter("lies_plainly"), checkpoint.entries
    parts = [s for s in steps if cuts[id(s.program)] and all(map(plain, map(entries.__getitem__, s.sources)))]
    cut_up = set(map(id, parts))
    checkpoint.read_in_order({str(entries[key].file) for s in parts for key in s.sources})
    buffers = _Buffers()
    loads = Loads(checkpoint, [s for s in steps if id(s) not in cut_up])
    for step in steps:
        program = step.program
        cut = cuts[id(program)] if id(step) in cut_up else None
        if cut is None:
            yield Task(held_by(program, None, None), _Whole(step, writer, loads))
            continue
        if id(program) not in regions:
            found = regions_of(cut.layout, region_limit(program, region))
            regions[id(program)] = [(held_by(program, cut, one), one) for one in found]
        for held, one in regions[id(program)]:
            if step.targets[one.target] in writer.places:
                yield Task(held, _Regional(step, cut, one, checkpoint, writer, buffers))


def run_tasks(tasks: Iterable[Task], moved: Moved, budget: int = BUDGET) -> None:
    """Run tasks over the cores; the first failure stops the rest, and is raised when nothing runs any more.

    Args:
        budget: bytes that tasks may hold together; a single larger one runs alone.
    """
    count = workers()
    running: dict[Future[int], int] = {}
    with _one_thread_each(), ThreadPoolExecutor(count, thread_name_prefix="ckptsurgery") as pool:
        try:
            for task in tasks:
                while running and (len(running) >= 2 * count or sum(running.values()) + task.held > budget):
                    _reap(running, moved)
                running[pool.submit(task.run)] = task.held
            while running:
                _reap(running, moved)
        finally:
            # nothing is left here but for a failure: what has not begun shall not
            for future in running:
                future.cancel()


def _reap(running: dict[Future[int], int], moved: Moved) -> None:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        del running[future]
        moved(future.result())


_threads = Lock()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch's thread count is the process's own, so only one run at a time may have it, and gives it back."""
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
    loads: Loads

    def __call__(self) -> int:
        from ..storage.tensors import dense_bytes

        writer = self.writer
        places = {key: writer.places[key] for key in self.step.targets if key in writer.places}
        total = sum(place.nbytes for place in places.values())
        if all(writer.has(*place) for place in places.values()):
            writer.skip(total)
        else:
            for key, tensor in zip(self.step.targets, run_step(self.step, self.loads)):
                if key in places:
                    writer.write(places[key].file, places[key].offset, dense_bytes(tensor, key))
        self.loads.done(self.step)
        return total


class _Buffers(local):
    """Memory of each thread that its tasks use again: fresh memory costs as much as what is done with it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor of so many elements; what the name gave before is used again."""
        import torch

        nbytes = count * dtype.itemsize
        kept = self._kept.get(name)
        if kept is None or kept.numel() < nbytes:
            self._kept[name] = kept = torch.empty(nbytes, dtype=torch.uint8)
        return kept[:nbytes].view(dtype)


@dataclass(frozen=True, slots=True)
class _Regional:
    """One region of one target."""

    step: Step
    cut: Cut
    region: Region
    checkpoint: Checkpoint
    writer: Sink
    buffers: _Buffers

    def __call__(self) -> int:
        from ..storage.tensors import dense_bytes

        step, region, key = self.step, self.region, self.step.targets[self.region.target]
        size = DTYPES[step.program.outputs[region.target].dtype].itemsize
        place, count = self.writer.places[key], region.stop - region.start
        if self.writer.has(place.file, place.offset + region.start * size, count * size):
            self.writer.skip(count * size)
            return count * size
        made = self._applied(self._gathered())
        self.writer.write(place.file, place.offset + region.start * size, dense_bytes(made, key))
        return count * size

    def _gathered(self) -> Tensor:
        """The region's elements, before ops."""
        from ..ops.numerics import torch_dtype

        region = self.region
        dtype = torch_dtype(self.step.program.inputs[region.pieces[0].source].dtype)
        flat = self.buffers.take("made", region.stop - region.start, dtype)
        for pieces in _alike(region.pieces):
            self._fill(flat, pieces)
        return flat

    def _fill(self, flat: Tensor, pieces: Sequence[Piece]) -> None:
        """Pieces of one geometry at even distances in the target: read one after another, rearranged by one op."""
        from ..storage.tensors import dense_bytes

        first, count, size = pieces[0], len(pieces), flat.element_size()
        span, at = extent_of(first.shape, first.source_strides), first.target_offset - self.region.start
        step = pieces[1].target_offset - first.target_offset if count > 1 else 0
        if first.source_strides == first.target_strides and first.numel == span and (count == 1 or step == span):
            self._read(pieces, dense_bytes(flat[at : at + count * span], ""), span * size)
            return
        scratch = self.buffers.take("read", count * span, flat.dtype)
        self._read(pieces, dense_bytes(scratch, ""), span * size)
        if count == 1 or first.numel >= _LARGE_BOX:
            for number in range(count):
                box = scratch.as_strided(first.shape, first.source_strides, number * span)
                move_box(box, flat.as_strided(first.shape, first.target_strides, at + number * step))
            return
        box = scratch.as_strided((count, *first.shape), (span, *first.source_strides))
        flat.as_strided((count, *first.shape), (step, *first.target_strides), at).copy_(box)

    def _read(self, pieces: Sequence[Piece], buffer: memoryview, nbytes: int) -> None:
        size = DTYPES[self.step.program.inputs[pieces[0].source].dtype].itemsize
        sources, entries, read = self.step.sources, self.checkpoint.entries, self.checkpoint.read_file_into
        for at, piece in zip(range(0, len(buffer), nbytes), pieces):
            entry = entries[sources[piece.source]]
            read(str(entry.file), entry.offset + piece.source_offset * size, buffer[at : at + nbytes])

    def _applied(self, flat: Tensor) -> Tensor:
        ops: tuple[Op, ...] = self.cut.chains[self.region.target]
        try:
            for op in ops:
                (flat,) = op.run((flat,))
        except OpError as error:
            run_step(self.step, self.checkpoint.load)  # says it of the whole tensor
            raise CheckpointError(
                Diagnostic("op-failed", str(error), place=self.step.targets[self.region.target])
            ) from error
        return flat


def _alike(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    """Neighbours of one geometry at even distances."""
    start = 0
    for at in range(1, len(pieces) + 1):
        if at < len(pieces) and _continues(pieces, start, at):
            continue
        yield pieces[start:at]
        start = at


def _continues(pieces: Sequence[Piece], start: int, at: int) -> bool:
    first, last, piece = pieces[start], pieces[at - 1], pieces[at]
    if (piece.shape, piece.source_strides, piece.target_strides) != (
        first.shape,
        first.source_strides,
        first.target_strides,
    ):
        return False
    distance = pieces[start + 1].target_offset - first.target_offset
    return piece.target_offset - last.target_offset == distance
