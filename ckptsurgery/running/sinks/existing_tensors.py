"""Sinks that fill tensors which exist: the parameters of a model, the shards of a rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...modeling.assigning import set_tensor
from ...modeling.places import named_tensors, place_of
from ...modeling.shared_memory import Memory
from ...planning.steps import Step
from ...sharding.shards import LocalShard
from ...specs import TensorSpec
from ...storage.checkpoint import Checkpoint
from ...storage.plain_memory import oddity
from ...storage.sources.links import Link, link_to
from .new_tensors import TensorSink

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CopySink", "ShardSink", "apart_from"]


class _ExistingSink(TensorSink):
    """Fills tensors in their own memory where that is plain, and copies into them where it is not.

    Args:
        steps, skipped: as for `TensorSink`.
        existing: called with each key, returns the tensor to fill.
    """

    def __init__(self, steps: Sequence[Step], skipped: Collection[str], existing: Callable[[str], Tensor]) -> None:
        super().__init__(steps, skipped)
        self._inside: dict[str, Tensor] = {}
        self._fetching: dict[str, tuple[Tensor, Link]] = {}
        links: dict[str, Link | None] = {}  # one for all devices of a type, so that they share its buffers
        for key, spec in self._specs.items():
            tensor = existing(key)
            if not _is_plain_memory(tensor, spec):
                continue
            kind = tensor.device.type
            if kind not in links:
                links[kind] = link_to(tensor.device)
            if (link := links[kind]) is not None:
                self._fetching[key] = tensor, link
            elif kind == "cpu":
                self._inside[key] = tensor

    def _copy(self, key: str, tensor: Tensor) -> None:
        """Copy a tensor into the one that exists."""
        raise NotImplementedError

    def _own(self, key: str) -> Tensor | None:
        return self._inside.get(key)

    def _ring(self, key: str, spec: TensorSpec) -> tuple[Tensor, Link] | None:
        return self._fetching.get(key)

    def _maps(self, key: str) -> bool:
        return key not in self._inside

    def _whole(self, key: str, tensor: Tensor) -> None:
        there = self._inside.get(key)
        if tensor is not there and not (key in self._rings and tensor is self._rings[key][0]):
            self._copy(key, tensor)
        self.written.append(key)

    def put(self, key: str, tensor: Tensor, borrowed: bool) -> None:
        """Copy a tensor into the one that exists."""
        self._copy(key, tensor)
        with self._lock:
            self.written.append(key)


class CopySink(_ExistingSink):
    """Fills the parameters and buffers that a model has."""

    keeps_tensors = False

    def __init__(self, steps: Sequence[Step], skipped: Collection[str], model: nn.Module) -> None:
        super().__init__(steps, skipped, lambda key: place_of(model, key).tensor)
        self._model = model

    def _copy(self, key: str, tensor: Tensor) -> None:
        set_tensor(self._model, key, tensor)


class ShardSink(_ExistingSink):
    """Fills the shards of this rank: its box of each tensor.

    Args:
        steps: make the boxes of the shards, under the keys of the whole tensors.
        shards: key -> the part of the tensor that is held here.
    """

    def __init__(self, steps: Sequence[Step], shards: Mapping[str, LocalShard]) -> None:
        super().__init__(steps, (), lambda key: shards[key].memory)
        self._shards = shards

    def _copy(self, key: str, tensor: Tensor) -> None:
        self._shards[key].memory.copy_(tensor)


def _is_plain_memory(tensor: Tensor, spec: TensorSpec) -> bool:
    """Return whether a tensor's memory is elements of this shape and dtype, in C order, and nothing else shows them."""
    import torch

    from ...storage.tensors import spec_of

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or oddity(tensor) is not None:
        return False
    if tensor.is_inference() or not tensor.is_contiguous():
        return False
    return spec_of(tensor) == spec and not tensor.is_conj() and not tensor.is_neg()


def apart_from(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with copies of those of its tensors whose memory a load into the model would overwrite.

    A model may be the source of its own tensors: then each is read before any is written.
    """
    in_memory = {
        key: entry.tensor
        for key, entry in checkpoint.entries.items()
        if entry.tensor is not None and not callable(entry.tensor)
    }
    if not in_memory:
        return checkpoint
    own = Memory(named_tensors(model).values())
    shared = {key: tensor for key, tensor in in_memory.items() if own.meets(tensor)}
    if not shared:
        return checkpoint
    copies: dict[int, Any] = {}
    entries = dict(checkpoint.entries)
    for key, tensor in shared.items():
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
        entries[key] = entries[key]._replace(tensor=copies[id(tensor)])
    return Checkpoint(replace(checkpoint.contents, entries=entries), checkpoint.source)
