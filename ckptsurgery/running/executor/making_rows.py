"""Making the results of a step run by run, with an op that works on runs of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, Diagnostic
from ...ops.base import ElementRun, OpError, OpPart
from ...ops.keyed import At, asks_at, run_at
from ...planning.costing import region_limit
from ...planning.row_parts import RowParts
from ...planning.steps import Step
from ...specs import DTYPES, TensorSpec
from ...storage.checkpoint import Checkpoint
from ...storage.contents import Extent
from .gathering import Gatherer
from .programs import run_step
from .sinks import Sink
from .tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["row_tasks"]


def row_tasks(
    step: Step, rows: RowParts, checkpoint: Checkpoint, sink: Sink, region: int, gatherer: Gatherer
) -> Iterator[Task]:
    """Yield the tasks that make a step's targets, each some rows of them.

    Args:
        checkpoint: has the step's sources as runs of bytes, of files or of memory.
        region: bytes of a target that a task should make.
    """
    if any(key in sink.places for key in step.targets):
        for part in rows.parts(region_limit(step.program, region)):
            yield Task(rows.held(part), _MadeRows(step, rows, part, checkpoint, sink, gatherer))


@dataclass(frozen=True, slots=True)
class _MadeRows:
    """Makes one part; returns the bytes that it wrote."""

    step: Step
    rows: RowParts
    part: OpPart
    checkpoint: Checkpoint
    sink: Sink
    gatherer: Gatherer

    def __call__(self) -> int:
        from ...storage.tensors import dense_bytes

        sink, wanted = self.sink, dict[int, Extent]()
        for number, (key, run) in enumerate(zip(self.step.targets, self.part.results)):
            place = sink.places.get(key)
            if place is not None:
                size = DTYPES[self.step.program.outputs[number].dtype].itemsize
                wanted[number] = Extent(place.file, place.offset + run.start * size, run.spec.numel * size)
        total = sum(nbytes for _, _, nbytes in wanted.values())
        if all(sink.has(*place) for place in wanted.values()):
            sink.skip(total)
            return total
        made = self._made(wanted)
        for number, (file, offset, _) in wanted.items():
            sink.write(file, offset, dense_bytes(made[number], self.step.targets[number]))
        return total

    def _made(self, wanted: Mapping[int, Extent]) -> list[Tensor]:
        step, op = self.step, self.part.op
        made: list[Tensor] = []
        tensors = tuple(self._read(number, run) for number, run in enumerate(self.part.sources))
        try:
            if asks_at(op):
                found = run_at(op, tensors, At(step.targets[0]))
            else:
                places = map(wanted.get, range(len(self.part.results)))
                rooms = [self._room(n, run.spec, at) for n, (run, at) in enumerate(zip(self.part.results, places))]
                found = op.run_into(tensors, rooms)
            for key, result, run in zip(step.targets, found, self.part.results):
                for later in self.rows.chain:
                    (result,) = run_at(later, (result.reshape(-1),), At(key, start=run.start))
                made.append(result)
        except OpError as error:
            run_step(step, self.checkpoint.load)  # reports it for the whole tensor
            raise CheckpointError(Diagnostic("op-failed", str(error), place=step.targets[0])) from error
        return made

    def _read(self, number: int, run: ElementRun) -> Tensor:
        """A run of a source: the memory where it is, or a buffer of this thread, which the next task overwrites."""
        entry = self.checkpoint.entries[self.step.sources[self.rows.order[number]]]
        room = None
        if entry.file is not None and run.spec.nbytes:
            offset = entry.offset + run.start * DTYPES[run.spec.dtype].itemsize
            room = self.checkpoint.view(entry.file, offset, run.spec.nbytes)
            if room is None:
                room = self.gatherer.buffers.take(f"source {number}", run.spec.nbytes, 1).data
                self.checkpoint.read_file_into(entry.file, offset, room)
        return _tensor(room, run.spec)

    def _room(self, number: int, spec: TensorSpec, place: Extent | None) -> Tensor:
        """Memory to make a run of a result in: where it stays, or a buffer of this thread."""
        room = self.sink.room(*place) if place is not None and not self.rows.chain else None
        return _tensor(room or self.gatherer.buffers.take(f"result {number}", spec.nbytes, 1).data, spec)


def _tensor(room: Any, spec: TensorSpec) -> Tensor:
    """A tensor in a buffer; an empty one has none."""
    import torch

    from ...ops.numerics import torch_dtype

    dtype = torch_dtype(spec.dtype)
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(room, dtype=dtype).view(spec.shape)
