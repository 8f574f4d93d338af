"""Making the results of a step run by run, with an op that works on runs of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, Diagnostic
from ...ops.base import ElementRun, OpError, OpPart
from ...ops.keyed import At, run_at
from ...planning.costing import region_limit
from ...planning.row_parts import RowParts
from ...planning.steps import Step
from ...specs import DTYPES
from ...storage.checkpoint import Checkpoint
from .programs import run_step
from .sinks import Sink
from .tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["row_tasks"]


def row_tasks(step: Step, rows: RowParts, checkpoint: Checkpoint, sink: Sink, region: int) -> Iterator[Task]:
    """Yield the tasks that make a step's targets, each some rows of them.

    Args:
        region: bytes of a target that a task should make.
    """
    if any(key in sink.places for key in step.targets):
        for part in rows.parts(region_limit(step.program, region)):
            yield Task(rows.held(part), _MadeRows(step, rows, part, checkpoint, sink))


@dataclass(frozen=True, slots=True)
class _MadeRows:
    """Makes one part; returns the bytes that it wrote."""

    step: Step
    rows: RowParts
    part: OpPart
    checkpoint: Checkpoint
    sink: Sink

    def __call__(self) -> int:
        from ...storage.tensors import dense_bytes

        sink, wanted = self.sink, dict[int, tuple[str, int, int]]()
        for number, (key, run) in enumerate(zip(self.step.targets, self.part.results)):
            place = sink.places.get(key)
            if place is not None:
                size = DTYPES[self.step.program.outputs[number].dtype].itemsize
                wanted[number] = place.file, place.offset + run.start * size, run.spec.numel * size
        total = sum(nbytes for _, _, nbytes in wanted.values())
        if all(sink.has(*place) for place in wanted.values()):
            sink.skip(total)
            return total
        made = self._made()
        for number, (file, offset, _) in wanted.items():
            sink.write(file, offset, dense_bytes(made[number], self.step.targets[number]))
        return total

    def _made(self) -> list[Tensor]:
        step = self.step
        made: list[Tensor] = []
        tensors = tuple(self._read(number, run) for number, run in zip(self.rows.order, self.part.sources))
        try:
            found = run_at(self.part.op, tensors, At(step.targets[0]))
            for key, result, run in zip(step.targets, found, self.part.results):
                for op in self.rows.chain:
                    (result,) = run_at(op, (result.reshape(-1),), At(key, start=run.start))
                made.append(result)
        except OpError as error:
            run_step(step, self.checkpoint.load)  # reports it for the whole tensor
            raise CheckpointError(Diagnostic("op-failed", str(error), place=step.targets[0])) from error
        return made

    def _read(self, number: int, run: ElementRun) -> Tensor:
        """A run of a source, in memory of its own."""
        import numpy as np
        import torch

        from ...ops.numerics import torch_dtype

        entry = self.checkpoint.entries[self.step.sources[number]]
        room: Any = np.empty(run.spec.nbytes, "u1")
        if entry.file is not None and run.spec.nbytes:
            offset = entry.offset + run.start * DTYPES[run.spec.dtype].itemsize
            self.checkpoint.read_file_into(entry.file, offset, room.data)
        return torch.from_numpy(room).view(torch_dtype(run.spec.dtype)).view(run.spec.shape)
