"""Filling the memory of a model's tensors: what is copied or rearranged has no second copy anywhere."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ..modeling.assigning import set_tensor
from ..modeling.places import place_of
from ..planning.steps import Step
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.contents import Extent
from .computing import Task, run_tasks
from .progress import ByteBar
from .receiving import Receiver, gathered_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Progress", "Straight", "fill_gathered", "is_plain_memory", "read_straight", "straight_reads"]


class Straight(NamedTuple):
    """A run of a file that is a tensor of the model, byte for byte."""

    lies: Extent
    key: str
    tensor: Tensor


def straight_reads(
    steps: Iterable[Step], checkpoint: Checkpoint, model: nn.Module, skipped: Collection[str]
) -> tuple[list[Straight], list[Step]]:
    """What can be read straight into the model, in the order of the files, and the steps for which more is needed."""
    straight: list[Straight] = []
    others: list[Step] = []
    for step in steps:
        found = list(_found(step, checkpoint, model, skipped))
        if len(found) == sum(key not in skipped for key in step.targets):
            straight += found
        else:
            others.append(step)
    return sorted(straight, key=lambda s: s.lies), others


def _found(step: Step, checkpoint: Checkpoint, model: nn.Module, skipped: Collection[str]) -> Iterator[Straight]:
    copies = step.program.copies
    if copies is None:
        return
    for key, number, spec in zip(step.targets, copies, step.program.outputs):
        if key in skipped:
            continue
        lies, tensor = checkpoint.extent(step.sources[number]), place_of(model, key).tensor
        if lies is not None and tensor.device.type == "cpu" and is_plain_memory(tensor, spec.shape, spec.dtype):
            yield Straight(lies, key, tensor)


def is_plain_memory(tensor: Tensor, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether the tensor's memory is those elements, in C order, and nothing else has a say in it."""
    import torch
    from torch.nn.parameter import is_lazy

    from ..storage.tensors import spec_of

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not is_lazy(tensor)
    if not plain or tensor.layout != torch.strided or not tensor.is_contiguous():
        return False
    said = spec_of(tensor)
    return (said.shape, said.dtype) == (shape, dtype) and not tensor.is_conj() and not tensor.is_neg()


@dataclass
class Progress:
    """How far a load came: keys that hold new values, and keys left between old and new ones."""

    written: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)


def read_straight(reads: list[Straight], checkpoint: Checkpoint, progress: Progress, bar: ByteBar) -> None:
    """Fill the tensors, several at a time, and note each key when its tensor is whole.

    Raises:
        CheckpointError: a read failed; nothing is being read any more when it is raised.
    """
    checkpoint.read_in_order({one.lies.file for one in reads})
    run_tasks((Task(0, partial(_read, one, checkpoint, progress)) for one in reads), bar)


def _read(one: Straight, checkpoint: Checkpoint, progress: Progress) -> int:
    import torch

    from ..storage.tensors import dense_bytes

    # autograd must see that the values changed, as after `copy_`
    torch.autograd.graph.increment_version(one.tensor)
    whole = False
    try:
        checkpoint.read_file_into(one.lies.file, one.lies.offset, dense_bytes(one.tensor, one.key))
        whole = True
    finally:
        (progress.written if whole else progress.torn).append(one.key)
    return one.lies.nbytes


def fill_gathered(
    steps: Sequence[Step],
    checkpoint: Checkpoint,
    model: nn.Module,
    skipped: Collection[str],
    progress: Progress,
    bar: ByteBar,
) -> list[Step]:
    """Make what is gathered from elements, in the model's own memory where it takes them; the steps that are left.

    Raises:
        CheckpointError: a read failed, or an op refused what it met; nothing is written any more when it is raised.
    """
    # What comes from memory may come from the model's own, which must not change before all of it is read.
    entries = checkpoint.entries
    found = [s for s in gathered_steps(steps, checkpoint)[0] if all(entries[key].file is not None for key in s.sources)]
    gathered = set(map(id, found))
    inside: set[str] = set()

    def own(key: str, spec: TensorSpec) -> Tensor | None:
        import torch

        tensor = place_of(model, key).tensor
        if tensor.device.type != "cpu" or not is_plain_memory(tensor, spec.shape, spec.dtype):
            return None
        inside.add(key)
        torch.autograd.graph.increment_version(tensor)
        return tensor

    def whole(key: str, tensor: Tensor) -> None:
        if key not in inside:
            set_tensor(model, key, tensor)
        progress.written.append(key)

    receiver = Receiver(found, skipped, whole, own)
    try:
        receiver.receive(checkpoint, bar)
    finally:
        progress.torn += [key for key in receiver.torn if key in inside]
    return [step for step in steps if id(step) not in gathered]
