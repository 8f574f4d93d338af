"""Tensors as a sink: new ones for a state dict or a model; `existing_tensors.py` fills those that are there.

What moves or is gathered is made in the memory where it stays. Tensors of accelerators are filled through a ring of
page-locked buffers (`storage/sending.py`), so that no copy of them is made on the host.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from ...modeling.assigning import set_tensor, shared_places
from ...planning.costing import CHUNK
from ...planning.steps import Step
from ...specs import TensorSpec
from ...storage.checkpoint import MAP_FROM, Checkpoint
from ...storage.contents import Extent
from ...storage.sending import BUFFER, TensorRun, send
from ...storage.sources.links import Link, empty_on, link_to, moved_to
from ..executor.copying import FETCHED_AT_ONCE, ByteRun, Move, batches_within, fetch_ranges, neighbours
from ..executor.execution import execute
from ..executor.tasks import Moved, Task, run_tasks

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["AssignSink", "StateDictSink", "TensorSink", "fill"]

_LONG_RUN = 64 << 10
"""Bytes of a run from which on a copy of its own to an accelerator is worth starting."""

_GAP = 1 << 10
"""Bytes between neighbours in a file that are read in vain, which costs less than another read."""

_WORTH_READING = 16 << 10
"""Bytes of a run from which on a read of its own costs less than gathering its elements with their neighbours."""


def fill(sink: TensorSink, steps: Sequence[Step], checkpoint: Checkpoint, moved: Moved) -> None:
    """Make every tensor that a sink wants.

    Raises:
        CheckpointError: a read or a device failed, or an op refused its input. All writing has ended by then, and
            `sink.written` and `sink.torn` list the keys that hold new values.
    """
    sink.take_empty()
    # Tasks hold no more than what stays: sources are pages of files or in memory anyway, targets are the result.
    execute(steps, checkpoint, sink, moved, budget=sys.maxsize)


@dataclass(slots=True)
class _Begun:
    """A tensor of which some bytes are there: its memory, and how many bytes are still to come."""

    tensor: Tensor
    memory: memoryview
    left: int


class TensorSink:
    """Takes what steps make into the memory of tensors, each of which is asked for when its first bytes come.

    Subclasses decide where a tensor is made and what becomes of it when it is whole.

    Args:
        steps: what will be carried out.
        skipped: targets that are not wanted.
    """

    def __init__(self, steps: Sequence[Step], skipped: Collection[str]) -> None:
        made = ((key, spec) for step in steps for key, spec in zip(step.targets, step.program.outputs))
        self._specs: dict[str, TensorSpec] = {key: spec for key, spec in made if key not in skipped}
        self._places = {key: Extent(key, 0, spec.nbytes) for key, spec in self._specs.items() if spec.nbytes}
        self._begun: dict[str, _Begun] = {}
        self._rings: dict[str, tuple[Tensor, Link]] = {}
        self._lock = Lock()
        self._memories: set[int] = set()
        self.written: list[str] = []
        self._torn: list[str] = []

    @property
    def places(self) -> Mapping[str, Extent]:
        """Key -> its bytes; the key stands for the name of a file."""
        return self._places

    @property
    def torn(self) -> list[str]:
        """Keys whose own memory has some of the new bytes, and not all."""
        return [*self._torn, *(key for key in self._begun if self._own(key) is not None)]

    keeps_tensors = True
    """Whether a tensor in memory that is copied as it is comes by `put`."""

    def _own(self, key: str) -> Tensor | None:
        """The tensor that is filled in place: contiguous, on the CPU. None where a new one is made."""
        return None

    def _ring(self, key: str, spec: TensorSpec) -> tuple[Tensor, Link] | None:
        """The tensor of an accelerator to fill, and the way to it; None for any other."""
        return None

    def _maps(self, key: str) -> bool:
        """Whether a tensor that is copied as it is may be a mapped part of its file."""
        return True

    def _whole(self, key: str, tensor: Tensor) -> None:
        """Take a tensor that has all of its bytes; called once per key, one at a time."""
        raise NotImplementedError

    def put(self, key: str, tensor: Tensor, borrowed: bool) -> None:
        """Take a whole tensor, of which two targets must not share the memory."""
        with self._lock:
            if tensor.numel() and tensor.device.type != "meta":
                memory = tensor.untyped_storage().data_ptr()
                if memory in self._memories or (borrowed and self._keeps_its_own):
                    tensor = tensor.clone()
                self._memories.add(memory)
            self._whole(key, tensor)

    _keeps_its_own = False
    """Whether a borrowed tensor must be cloned before it is kept."""

    def wants_runs(self, steps: Sequence[Step], moves: Mapping[int, Sequence[Move] | None]) -> Iterable[bool]:
        """Return for each step whether its runs are read straight into its tensors."""
        lengths = {number: _run_length(found) for number, found in moves.items() if found is not None}
        return [self._wants_runs(step, lengths.get(id(step.program), 0)) for step in steps]

    def _wants_runs(self, step: Step, length: float) -> bool:
        if length >= _LONG_RUN and self._goes_by_ring(step):
            return True
        if step.program.copies is not None:
            places = self._places
            return not any(places[key].nbytes >= MAP_FROM and self._maps(key) for key in step.targets if key in places)
        return length >= _WORTH_READING

    def _goes_by_ring(self, step: Step) -> bool:
        """Whether all of a step's targets are tensors of accelerators."""
        wanted = [(key, spec) for key, spec in zip(step.targets, step.program.outputs) if key in self._places]
        found = {key: ring for key, spec in wanted if (ring := self._ring(key, spec)) is not None}
        if not found or len(found) < len(wanted):
            return False
        self._rings |= found
        return True

    def take_empty(self) -> None:
        """Make the tensors for which no bytes will come."""
        for key in self._specs.keys() - self._places.keys():
            self._whole(key, self._tensor(key))

    def take_runs(self, runs: Sequence[ByteRun], checkpoint: Checkpoint, moved: Moved) -> None:
        """Read runs of bytes where they belong, several at a time, in disk order; accelerators fetch theirs."""
        checkpoint.read_in_order({run.source_file for run in runs})
        straight = sorted(
            (run for run in runs if run.target_file not in self._rings), key=lambda r: (r.source_file, r.source_offset)
        )
        remote = {file for file in {run.source_file for run in straight} if checkpoint.is_remote(file)}
        if remote:
            self._fetch([run for run in straight if run.source_file in remote], checkpoint, moved)
            straight = [run for run in straight if run.source_file not in remote]
        if straight:
            groups = neighbours(straight, _WORTH_READING, CHUNK, _GAP)
            run_tasks((Task(0, partial(self._read, group, checkpoint)) for group in groups), moved)
        cargoes: dict[int, list[ByteRun]] = {}
        for run in runs:
            if run.target_file in self._rings:
                cargoes.setdefault(id(self._rings[run.target_file][1]), []).append(run)
        for cargo in cargoes.values():
            self._send(cargo, checkpoint, moved)

    def _fetch(self, runs: Sequence[ByteRun], checkpoint: Checkpoint, moved: Moved) -> None:
        """Read runs of remote files straight to their places, many at once."""
        for batch in batches_within(runs, FETCHED_AT_ONCE):
            rooms = [self.room(run.target_file, run.target_offset, run.nbytes) for run in batch]
            fetch_ranges(checkpoint, batch, rooms)
            for run in batch:
                self._arrived(run.target_file, run.nbytes)
                moved(run.nbytes)

    def _read(self, runs: Sequence[ByteRun], checkpoint: Checkpoint) -> int:
        """Read neighbours in one file: one straight to its place, several through a buffer."""
        first, last = runs[0], runs[-1]
        if len(runs) == 1:
            room = self.room(first.target_file, first.target_offset, first.nbytes)
            checkpoint.read_file_into(first.source_file, first.source_offset, room)
            self._arrived(first.target_file, first.nbytes)
            return first.nbytes
        start = first.source_offset
        buffer = bytearray(last.source_offset + last.nbytes - start)
        checkpoint.read_file_into(first.source_file, start, memoryview(buffer))
        for key, at, nbytes, _, offset in runs:
            self._take_bytes(key, at, buffer[offset - start : offset - start + nbytes])
        return sum([run.nbytes for run in runs])

    def _take_bytes(self, key: str, at: int, data: bytearray) -> None:
        """Take bytes of a tensor; if they are all that a new one has, they become its memory."""
        if len(data) == self._places[key].nbytes and self._own(key) is None:
            from ...storage.tensors import tensor_from

            made = tensor_from(data, 0, self._specs[key], key)
            with self._lock:
                self._whole(key, made)
        else:
            self.write(key, at, data)

    def _send(self, runs: Sequence[ByteRun], checkpoint: Checkpoint, moved: Moved) -> None:
        """Fill tensors of accelerators by one link."""
        keys = list(dict.fromkeys(run.target_file for run in runs))
        numbers = {key: number for number, key in enumerate(keys)}
        tensors = [self._rings[key][0] for key in keys]
        parts = [
            TensorRun(r.source_file, r.source_offset, r.nbytes, numbers[r.target_file], r.target_offset) for r in runs
        ]
        begun: set[int] = set()

        def arrived(number: int) -> None:
            begun.remove(number)
            self._whole(keys[number], tensors[number])
            moved(self._places[keys[number]].nbytes)

        try:
            link = self._rings[keys[0]][1]
            send(parts, tensors, checkpoint.read_file_into, link, begun=begun.add, arrived=arrived, size=BUFFER)
        finally:
            self._torn += [keys[number] for number in sorted(begun)]

    def has(self, file: str, offset: int, nbytes: int) -> bool:
        """Return False: nothing is there beforehand."""
        return False

    def skip(self, nbytes: int) -> None:
        """Do nothing: no bytes are owed."""

    def room(self, file: str, offset: int, nbytes: int) -> memoryview:
        """Return the place of some bytes of a tensor."""
        with self._lock:
            begun = self._begun.get(file) or self._begin(file)
        return begun.memory[offset : offset + nbytes]

    def write(self, file: str, offset: int, data: Any) -> None:
        """Copy bytes to their place; those that were made there are there already."""
        import numpy as np

        made = np.frombuffer(data, "u1")
        # numpy sees where both are one memory, and copies nothing.
        np.frombuffer(self.room(file, offset, len(made)), "u1")[...] = made
        self._arrived(file, len(made))

    def _arrived(self, key: str, nbytes: int) -> None:
        with self._lock:
            begun = self._begun[key]
            begun.left -= nbytes
            if not begun.left:
                self._whole(key, begun.tensor)
                del self._begun[key]

    def _begin(self, key: str) -> _Begun:
        from ...storage.tensors import dense_bytes

        tensor = self._tensor(key)
        begun = self._begun[key] = _Begun(tensor, dense_bytes(tensor, key), self._places[key].nbytes)
        return begun

    def _tensor(self, key: str) -> Tensor:
        import torch

        from ...storage.tensors import torch_dtype, torch_shape

        own = self._own(key)
        if own is not None:
            # autograd must see that the values change, as after `copy_`
            torch.autograd.graph.increment_version(own)
            return own
        spec = self._specs[key]
        return torch.empty(torch_shape(spec, key), dtype=torch_dtype(spec.dtype, key), device="cpu")


class _OnDevice(TensorSink):
    """A sink that makes new tensors, on one device where it is given one."""

    def __init__(self, steps: Sequence[Step], skipped: Collection[str], device: torch.device | None) -> None:
        super().__init__(steps, skipped)
        self._device = device
        self._link = link_to(device) if device is not None else None

    def _ring(self, key: str, spec: TensorSpec) -> tuple[Tensor, Link] | None:
        from ...storage.tensors import torch_dtype, torch_shape

        if self._device is None or self._link is None:
            return None
        return empty_on(self._device, torch_shape(spec, key), torch_dtype(spec.dtype, key)), self._link


class StateDictSink(_OnDevice):
    """Collects new tensors in `made`; a tensor in memory that is copied as it is comes as it is."""

    def __init__(self, steps: Sequence[Step], skipped: Collection[str], device: torch.device | None = None) -> None:
        super().__init__(steps, skipped, device)
        self.made: dict[str, Tensor] = {}

    def _whole(self, key: str, tensor: Tensor) -> None:
        self.made[key] = moved_to(self._device, tensor)
        self.written.append(key)


class AssignSink(_OnDevice):
    """Puts new parameters and buffers into a model, each as soon as it is whole."""

    _keeps_its_own = True

    def __init__(
        self, steps: Sequence[Step], skipped: Collection[str], model: nn.Module, device: torch.device | None = None
    ) -> None:
        super().__init__(steps, skipped, device)
        self._model, self._shared = model, shared_places(model)

    def _whole(self, key: str, tensor: Tensor) -> None:
        there = moved_to(self._device, tensor)
        set_tensor(self._model, key, there, assign=True, partners=self._shared.get(key))
        self.written.append(key)


def _run_length(moves: Sequence[Move]) -> float:
    """Bytes of a run on average; without end where each target is one run, which can be no longer."""
    targets = {target for _, target, *_ in moves}
    return math.inf if len(moves) <= len(targets) else sum(nbytes for *_, nbytes in moves) / len(moves)
