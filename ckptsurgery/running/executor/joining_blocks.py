"""Making a block of a target of the same block of several sources: ops that join element by element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, Diagnostic
from ...ops.base import OpError
from ...ops.keyed import At, run_at
from ...planning.cutting import Cut, row_region
from ...planning.steps import Step
from ...specs import DTYPES
from .gathering import GatheredRegion, Gatherer, batches_of
from .programs import run_step
from .sinks import Sink

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Blend"]


@dataclass(frozen=True, slots=True)
class Blend:
    """Makes elements `[start, stop)` of one target of a step; returns the bytes that it wrote."""

    step: Step
    cut: Cut
    output: int
    start: int
    stop: int
    gatherer: Gatherer
    sink: Sink

    def __call__(self) -> int:
        from ...storage.tensors import dense_bytes

        step, key = self.step, self.step.targets[self.output]
        place, size = self.sink.places[key], DTYPES[step.program.outputs[self.output].dtype].itemsize
        offset, nbytes = place.offset + self.start * size, (self.stop - self.start) * size
        if self.sink.has(place.file, offset, nbytes):
            self.sink.skip(nbytes)
            return nbytes
        self.sink.write(place.file, offset, dense_bytes(self._made(key), key))
        return nbytes

    def _made(self, key: str) -> Tensor:
        rows = tuple(self._row(target, first) for target, first in self.cut.rows[self.output])
        first, *others = self.cut.chains[self.output]
        at = At(key, start=self.start)
        try:
            if first.axis_role == "reduce":
                import torch

                rows = (torch.stack(rows),)
            (made,) = run_at(first, rows, at)
            for op in others:
                (made,) = run_at(op, (made,), at)
        except OpError as error:
            run_step(self.step, self.gatherer.checkpoint.load)  # says it of the whole tensor
            raise CheckpointError(Diagnostic("op-failed", str(error), place=key)) from error
        return made

    def _row(self, target: int, first: int) -> Tensor:
        """The elements of one row, in memory of its own."""
        import numpy as np
        import torch

        from ...ops.numerics import torch_dtype

        region = row_region(self.cut.layout, target, first + self.start, first + self.stop)
        dtype = self.step.program.inputs[region.pieces[0].source].dtype
        size = DTYPES[dtype].itemsize
        room: Any = np.empty((self.stop - self.start) * size, "u1")
        self.gatherer.gathered([GatheredRegion(self.step, region, batches_of(region))], size, room.data)
        return torch.frombuffer(room, dtype=torch_dtype(dtype))
