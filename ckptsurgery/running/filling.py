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

__all__ = ["Load", "Progress", "fill_gathered", "is_plain_memory", "read_straight"]


@dataclass
class Progress:
    """How far a load came: keys that hold new values, and keys left between old and new ones."""

    written: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """A load that is under way.

    Args:
        skipped: keys that get their values otherwise.
        bar: hears of bytes as they arrive.
    """

    checkpoint: Checkpoint
    model: nn.Module
    skipped: Collection[str]
    bar: ByteBar
    progress: Progress = field(default_factory=Progress)


class _Straight(NamedTuple):
    """A run of a file that is a tensor of the model, byte for byte."""

    lies: Extent
    key: str
    tensor: Tensor


def read_straight(steps: Iterable[Step], load: Load) -> list[Step]:
    """Fill the tensors that are runs of files, several at a time, in disk order; the steps for which more is needed.

    Raises:
        CheckpointError: a read failed; nothing is being read any more when it is raised.
    """
    straight: list[_Straight] = []
    others: list[Step] = []
    for step in steps:
        found = list(_found(step, load))
        if len(found) == sum(key not in load.skipped for key in step.targets):
            straight += found
        else:
            others.append(step)
    straight.sort(key=lambda one: one.lies)
    load.checkpoint.read_in_order({one.lies.file for one in straight})
    run_tasks((Task(0, partial(_read, one, load)) for one in straight), load.bar)
    return others


def _found(step: Step, load: Load) -> Iterator[_Straight]:
    copies = step.program.copies
    if copies is None:
        return
    for key, number, spec in zip(step.targets, copies, step.program.outputs):
        if key in load.skipped:
            continue
        lies, tensor = load.checkpoint.extent(step.sources[number]), place_of(load.model, key).tensor
        if lies is not None and tensor.device.type == "cpu" and is_plain_memory(tensor, spec.shape, spec.dtype):
            yield _Straight(lies, key, tensor)


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


def _read(one: _Straight, load: Load) -> int:
    import torch

    from ..storage.tensors import dense_bytes

    # autograd must see that the values changed, as after `copy_`
    torch.autograd.graph.increment_version(one.tensor)
    whole = False
    try:
        load.checkpoint.read_file_into(one.lies.file, one.lies.offset, dense_bytes(one.tensor, one.key))
        whole = True
    finally:
        (load.progress.written if whole else load.progress.torn).append(one.key)
    return one.lies.nbytes


def fill_gathered(steps: Sequence[Step], load: Load) -> list[Step]:
    """Make what is gathered from elements, in the model's own memory where it takes them; the steps that are left.

    Raises:
        CheckpointError: a read failed, or an op refused what it met; nothing is written any more when it is raised.
    """
    # What comes from memory may come from the model's own, which must not change before all of it is read.
    entries = load.checkpoint.entries
    found, _ = gathered_steps(steps, load.checkpoint)
    found = [step for step in found if all(entries[key].file is not None for key in step.sources)]
    gathered = set(map(id, found))
    inside: set[str] = set()

    def own(key: str, spec: TensorSpec) -> Tensor | None:
        import torch

        tensor = place_of(load.model, key).tensor
        if tensor.device.type != "cpu" or not is_plain_memory(tensor, spec.shape, spec.dtype):
            return None
        inside.add(key)
        torch.autograd.graph.increment_version(tensor)
        return tensor

    def whole(key: str, tensor: Tensor) -> None:
        if key not in inside:
            set_tensor(load.model, key, tensor)
        load.progress.written.append(key)

    receiver = Receiver(found, load.skipped, whole, own)
    try:
        receiver.receive(load.checkpoint, load.bar)
    finally:
        load.progress.torn += [key for key in receiver.torn if key in inside]
    return [step for step in steps if id(step) not in gathered]
