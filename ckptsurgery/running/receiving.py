"""The memory of tensors as a destination: what a plan makes is gathered where it will stay, over the cores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..planning.cutting import cut_of
from ..planning.steps import Program, Step, programs_of
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.contents import Entry, Extent
from .computing import Moved, compute
from .placing import has_views

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Receiver", "gathered_steps"]

_SMALL = 256 << 10  # bytes; for less, threads and their tasks cost more than what torch does in one


@dataclass(slots=True)
class _Begun:
    """A tensor of which some bytes may be there: its memory, and how many more are to come."""

    tensor: Tensor
    memory: memoryview
    left: int


class Receiver:
    """Takes what steps make into the memory of tensors, each of which is asked for when its first bytes come.

    Args:
        steps: those of `gathered_steps`.
        skipped: targets that are not wanted.
        whole: hears of each tensor that has all of its bytes, of one at a time, from any thread.
        own: gives the tensor that is to be filled, C-contiguous and on the CPU, or None for a new one.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        skipped: Collection[str],
        whole: Callable[[str, Tensor], object],
        own: Callable[[str, TensorSpec], Tensor | None] = lambda key, spec: None,
    ) -> None:
        made = ((key, spec) for step in steps for key, spec in zip(step.targets, step.program.outputs))
        self._steps, self._specs = steps, {key: spec for key, spec in made if key not in skipped}
        self.places = {key: Extent(key, 0, spec.nbytes) for key, spec in self._specs.items() if spec.nbytes}
        self._own, self._whole = own, whole
        self._begun: dict[str, _Begun] = {}
        self._lock = Lock()

    @property
    def torn(self) -> list[str]:
        """Keys whose tensors have some of their bytes, and not all."""
        return list(self._begun)

    def receive(self, checkpoint: Checkpoint, moved: Moved) -> None:
        """Have all steps made.

        Raises:
            CheckpointError: a read failed, or an op refused what it met; nothing is written any more.
        """
        for key in self._specs:
            if key not in self.places:  # nothing will come
                self._whole(key, self._tensor(key))
        # What tasks hold is no more than stays: sources are pages of files or in memory anyway, targets are the result.
        compute(self._steps, checkpoint, self, moved, budget=sys.maxsize)

    def has(self, file: str, offset: int, nbytes: int) -> bool:
        """Nothing is there beforehand."""
        return False

    def skip(self, nbytes: int) -> None:
        """Nothing is owed."""

    def room(self, file: str, offset: int, nbytes: int) -> memoryview:
        """The place of some bytes of a tensor; its key stands for a file's name."""
        with self._lock:
            begun = self._begun.get(file) or self._begin(file)
        return begun.memory[offset : offset + nbytes]

    def write(self, file: str, offset: int, data: Any) -> None:
        """Copy bytes to their place; those that were made there are there already."""
        import numpy as np

        made = np.frombuffer(data, "u1")
        # numpy sees where both are one memory, and copies nothing.
        np.frombuffer(self.room(file, offset, len(made)), "u1")[...] = made
        with self._lock:
            begun = self._begun[file]
            begun.left -= len(made)
            if not begun.left:
                self._whole(file, begun.tensor)
                del self._begun[file]

    def _begin(self, key: str) -> _Begun:
        from ..storage.tensors import dense_bytes

        tensor = self._tensor(key)
        begun = self._begun[key] = _Begun(tensor, dense_bytes(tensor, key), self.places[key].nbytes)
        return begun

    def _tensor(self, key: str) -> Tensor:
        import torch

        from ..storage.tensors import torch_dtype, torch_shape

        spec = self._specs[key]
        own = self._own(key, spec)
        if own is not None:
            return own
        return torch.empty(torch_shape(spec, key), dtype=torch_dtype(spec.dtype, key), device="cpu")


def gathered_steps(steps: Sequence[Step], checkpoint: Checkpoint) -> tuple[list[Step], list[Step]]:
    """The steps that make new tensors of elements in files or in the host's memory, and the others.

    The others hand on tensors that are there already, have an op that looks at more than one element, make little, or
    work on an accelerator.
    """
    large = [program for program, _ in programs_of(steps) if _makes_much(program)]
    anywhere = {id(program) for program in large if has_views(program)}
    in_files = {id(program) for program in large if cut_of(program)} - anywhere
    entries, gathered, others = checkpoint.entries, list[Step](), list[Step]()
    for step in steps:
        number, lie = id(step.program), (entries[key] for key in step.sources)
        found = (number in anywhere and all(map(_on_host, lie))) or (
            number in in_files and all(entry.lies_plainly for entry in lie)
        )
        (gathered if found else others).append(step)
    return gathered, others


def _on_host(entry: Entry) -> bool:
    tensor = entry.tensor  # one that is built when it is asked for is built on the host
    return tensor is None or callable(tensor) or bool(tensor.device.type == "cpu")


def _makes_much(program: Program) -> bool:
    return program.copies is None and sum(spec.nbytes for spec in program.outputs) >= _SMALL
