"""A sink that compares what a plan makes with the memory of a model's tensors; nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..planning.costing import CHUNK
from ..running.executor.copying import ByteRun
from ..running.executor.tasks import Moved, Task, run_tasks
from ..running.sinks.comparing import ComparingSink
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.contents import Extent

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Numbers = np.ndarray[Any, np.dtype[np.uint8]]

__all__ = ["ModelSink"]

_GAP = 64 << 10
"""Bytes between two runs that are read along rather than by a call of their own."""


class ModelSink(ComparingSink):
    """Compares the bytes that come with the tensors of a model; keys that differ are collected in `wrong`.

    Args:
        tensors: model key -> the tensor that is there.
        specs: model key -> what the plan makes for it, of the same shape and dtype.
    """

    keeps_tensors = True

    def __init__(self, tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
        super().__init__({key: Extent(key, 0, spec.nbytes) for key, spec in specs.items()})
        self._tensors = tensors
        self._views: dict[str, Numbers] = {}
        self._left = {key: place.nbytes for key, place in self.places.items()}
        self._idle: list[Numbers] = []

    def take_runs(self, runs: Sequence[ByteRun], checkpoint: Checkpoint, moved: Moved) -> None:
        """Read runs of the source's files and compare them, several at a time, in disk order."""
        checkpoint.read_in_order({run.source_file for run in runs})
        inorder = sorted(runs, key=lambda run: (run.source_file, run.source_offset))
        run_tasks((Task(CHUNK, partial(self._compare, group, checkpoint)) for group in _groups(inorder)), moved)

    def _compare(self, runs: Sequence[ByteRun], checkpoint: Checkpoint) -> int:
        import numpy as np

        start = runs[0].source_offset
        size = max(run.source_offset + run.nbytes for run in runs) - start
        # A fresh buffer costs as much as the comparison: the kernel clears each of its pages.
        buffer = self._idle.pop() if self._idle else np.empty(CHUNK, np.uint8)
        checkpoint.read_file_into(runs[0].source_file, start, buffer.data[:size])
        for run in runs:
            at = run.source_offset - start
            self._look(run.target_file, run.target_offset, buffer[at : at + run.nbytes])
        self._idle.append(buffer)
        return sum(run.nbytes for run in runs)

    def put(self, key: str, tensor: Tensor, borrowed: bool) -> None:
        """Compare a whole tensor."""
        from ..storage.tensors import dense_bytes

        self.write(key, 0, dense_bytes(tensor, key))

    def write(self, file: str, offset: int, data: Any) -> None:
        """Compare a run of bytes, which may be of one tensor only."""
        made = _numbers(data)
        for start in range(0, len(made), CHUNK):
            self._look(file, offset + start, made[start : start + CHUNK])

    def _look(self, key: str, offset: int, made: Numbers) -> None:
        same = _equal(made, self._view(key)[offset : offset + len(made)])
        with self._lock:
            if not same:
                self.wrong.add(key)
            self._left[key] -= len(made)
            if not self._left[key]:
                self._views.pop(key, None)

    def _view(self, key: str) -> Numbers:
        """The bytes of the model's tensor: its own memory, or a copy that lasts as long as bytes are to come."""
        from ..storage.tensors import dense_bytes

        with self._lock:
            found = self._views.get(key)
            if found is None:
                found = self._views[key] = _numbers(dense_bytes(self._tensors[key].detach(), key))
            return found


def _numbers(data: Any) -> Numbers:
    """The bytes of a buffer as numbers, without a copy."""
    import numpy as np

    return np.frombuffer(data, np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)


def _equal(a: Numbers, b: Numbers) -> bool:
    """Whether two runs of bytes are equal. numpy lets other threads run meanwhile, which `==` of buffers does not."""
    import numpy as np

    words = len(a) & ~7
    return np.array_equal(a[:words].view(np.uint64), b[:words].view(np.uint64)) and np.array_equal(a[words:], b[words:])


def _groups(runs: Iterable[ByteRun]) -> Iterator[list[ByteRun]]:
    """Runs that are read by one call each: long ones in pieces, short ones together with their neighbours."""
    group: list[ByteRun] = []
    for run in runs:
        if group and (
            run.source_file != group[0].source_file
            or run.source_offset + run.nbytes - group[0].source_offset > CHUNK
            or run.source_offset > group[-1].source_offset + group[-1].nbytes + _GAP
        ):
            yield group
            group = []
        if run.nbytes <= CHUNK:
            group.append(run)
            continue
        for start in range(0, run.nbytes, CHUNK):
            yield [
                run._replace(
                    target_offset=run.target_offset + start,
                    nbytes=min(CHUNK, run.nbytes - start),
                    source_offset=run.source_offset + start,
                )
            ]
    if group:
        yield group
