"""Making a block of a target of the same block of several sources: ops that join element by element.

An op may survey whole tensors first. Then each pass has a task for each block too, and the tasks of the next pass wait
for the last one of the pass before, which has begun by then, since tasks begin in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Condition
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, Diagnostic
from ...ops.base import BlockFacts, Op, OpError, Tensors
from ...ops.keyed import At, run_at
from ...planning.costing import block_limit, held_by_block
from ...planning.cutting import Cut, blocks_of, row_region, surveys_of
from ...planning.steps import Step
from ...specs import DTYPES
from ...storage.contents import Extent
from .gathering import GatheredRegion, Gatherer, batches_of
from .programs import run_step
from .sinks import Sink
from .tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["blends"]


def blends(step: Step, cut: Cut, sink: Sink, gatherer: Gatherer, region: int) -> Iterator[Task]:
    """A task for each block of a target that an op makes of several rows, after those that survey its sources."""
    program = step.program
    for output, (row, spec) in enumerate(zip(cut.rows, program.outputs)):
        place = sink.places.get(step.targets[output])
        if place is None:
            continue
        held = held_by_block(program, cut, len(row))
        blocks = list(blocks_of(spec.numel, block_limit(program, region)))
        joined = _JoinedTarget(step, cut, output, place, gatherer, sink)
        surveyed = _Surveyed(cut.chains[output][0], len(blocks))
        passes = surveys_of(program, cut, output)
        for number in range(passes):
            for block, (start, stop) in enumerate(blocks):
                yield Task(held, _Survey(joined, surveyed, number, block, start, stop))
        for start, stop in blocks:
            yield Task(held, _Blend(joined, surveyed, passes, start, stop))


@dataclass
class _Surveyed:
    """An op that surveys whole tensors, as tasks of several threads find their facts.

    Args:
        op: with the facts of the passes that are over.
        blocks: how many a pass has.
    """

    op: Op
    blocks: int
    over: int = 0
    failed: bool = False
    _total: BlockFacts | None = None
    _added: int = 0
    _early: dict[int, BlockFacts] = field(default_factory=dict)
    _changed: Condition = field(default_factory=Condition)

    def after(self, passes: int) -> Op | None:
        """The op as soon as so many passes are over; None where a task has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self.failed or self.over >= passes)
            return None if self.failed else self.op

    def add(self, block: int, facts: BlockFacts) -> None:
        """Add the facts of a block to those of the blocks before it, as soon as these are there."""
        with self._changed:
            self._early[block] = facts
            while self._added in self._early:
                next_one = self._early.pop(self._added)
                self._total = next_one if self._total is None else self._total + next_one
                self._added += 1
            if self._added == self.blocks and self._total is not None:
                self.op, self.over = self.op.after(self._total), self.over + 1
                self._total, self._added = None, 0
                self._changed.notify_all()

    def fail(self) -> None:
        """Let nobody wait for a pass that will not be over."""
        with self._changed:
            self.failed = True
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _JoinedTarget:
    """A target of a step that an op makes of several rows."""

    step: Step
    cut: Cut
    output: int
    place: Extent
    gatherer: Gatherer
    sink: Sink

    @property
    def key(self) -> str:
        return self.step.targets[self.output]

    def rows(self, start: int, stop: int) -> Tensors:
        """Elements `[start, stop)` of each row, in this thread's memory; of an axis that is reduced, as one tensor."""

        rows, inputs = self.cut.rows[self.output], self.step.program.inputs
        count, layout = stop - start, self.cut.layout
        regions = [row_region(layout, target, first + start, first + stop) for target, first in rows]
        dtypes = [inputs[region.pieces[0].source].dtype for region in regions]
        sizes = [count * DTYPES[dtype].itemsize for dtype in dtypes]
        buffer: Any = self.gatherer.buffers.take("rows", sum(map(_aligned, sizes)), 1)
        found: list[Tensor] = []
        at = 0
        for region, dtype, nbytes in zip(regions, dtypes, sizes):
            room = buffer[at : at + nbytes]
            part = GatheredRegion(self.step, region, batches_of(region))
            self.gatherer.gathered([part], nbytes // count, room.data)
            found.append(_tensor(room, dtype))
            at += nbytes if self.reduces else _aligned(nbytes)
        return (_tensor(buffer[:at], dtypes[0]).reshape(len(rows), count),) if self.reduces else tuple(found)

    @property
    def reduces(self) -> bool:
        """Whether the rows are the entries of one axis, all of one dtype, and the op takes them as one tensor."""
        return self.cut.chains[self.output][0].axis_role == "reduce"

    def failed(self, error: OpError) -> CheckpointError:
        """The error of an op, which is raised with the whole tensor's numbers where it fails there too."""
        run_step(self.step, self.gatherer.checkpoint.load)
        return CheckpointError(Diagnostic("op-failed", str(error), place=self.key))


@dataclass(frozen=True, slots=True)
class _Survey:
    """Finds the facts of elements `[start, stop)` for one pass; it writes nothing."""

    joined: _JoinedTarget
    surveyed: _Surveyed
    number: int
    block: int
    start: int
    stop: int

    def __call__(self) -> int:
        joined, surveyed, done = self.joined, self.surveyed, False
        try:
            op = surveyed.after(self.number)
            if op is not None and not joined.sink.has(*joined.place):
                surveyed.add(self.block, op.survey(joined.rows(self.start, self.stop)))
            done = True
        except OpError as error:
            raise joined.failed(error) from error
        finally:
            if not done:
                surveyed.fail()
        return 0


@dataclass(frozen=True, slots=True)
class _Blend:
    """Makes elements `[start, stop)` of a target; returns the bytes that it wrote."""

    joined: _JoinedTarget
    surveyed: _Surveyed
    passes: int
    start: int
    stop: int

    def __call__(self) -> int:
        from ...storage.tensors import dense_bytes

        joined, sink, file = self.joined, self.joined.sink, self.joined.place.file
        size = DTYPES[joined.step.program.outputs[joined.output].dtype].itemsize
        offset, nbytes = joined.place.offset + self.start * size, (self.stop - self.start) * size
        if sink.has(file, offset, nbytes):
            sink.skip(nbytes)
            return nbytes
        op = self.surveyed.after(self.passes)
        if op is None:
            return 0
        sink.write(file, offset, dense_bytes(self._made(op), joined.key))
        return nbytes

    def _made(self, op: Op) -> Tensor:
        joined = self.joined
        at = At(joined.key, start=self.start)
        try:
            (made,) = run_at(op, joined.rows(self.start, self.stop), at)
            for later in joined.cut.chains[joined.output][1:]:
                (made,) = run_at(later, (made,), at)
        except OpError as error:
            raise joined.failed(error) from error
        return made


def _tensor(room: Any, dtype: str) -> Tensor:
    import torch

    from ...ops.numerics import torch_dtype

    return torch.frombuffer(room, dtype=torch_dtype(dtype))


def _aligned(nbytes: int) -> int:
    """Bytes up to the next multiple of a cache line, so that each row's elements lie at multiples of their size."""
    return -(-nbytes // 64) * 64
