"""The shards of this rank as a sink: its box of each tensor, filled in its own memory where that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from ...planning.steps import Step
from ...sharding.shards import LocalShard
from ...specs import TensorSpec
from ...storage.sources.links import Link, link_to
from .tensors import TensorSink, is_plain_memory

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ShardSink"]


class ShardSink(TensorSink):
    """Fills shards; what cannot be made in their memory is copied into it.

    Args:
        steps: make the boxes of the shards, under the keys of the whole tensors.
        shards: key -> the part of the tensor that is held here.
    """

    def __init__(self, steps: Sequence[Step], shards: Mapping[str, LocalShard]) -> None:
        super().__init__(steps, ())
        self._shards = shards
        self._copying = Lock()
        self._inside: dict[str, Tensor] = {}
        self._fetching: dict[str, tuple[Tensor, Link]] = {}
        links: dict[str, Link | None] = {}
        for key, spec in self._specs.items():
            memory = shards[key].memory
            if not is_plain_memory(memory, spec):
                continue
            kind = memory.device.type
            if kind not in links:
                links[kind] = link_to(memory.device)
            if (link := links[kind]) is not None:
                self._fetching[key] = memory, link
            elif kind == "cpu":
                self._inside[key] = memory

    def _own(self, key: str) -> Tensor | None:
        return self._inside.get(key)

    def _ring(self, key: str, spec: TensorSpec) -> tuple[Tensor, Link] | None:
        return self._fetching.get(key)

    def _maps(self, key: str) -> bool:
        return key not in self._inside

    def _whole(self, key: str, tensor: Tensor) -> None:
        memory = self._shards[key].memory
        if tensor is not memory:
            memory.copy_(tensor)
        self.written.append(key)

    def put(self, key: str, tensor: Tensor, borrowed: bool) -> None:
        """Copy a tensor into the shard."""
        with self._copying:
            self._shards[key].memory.copy_(tensor)
            self.written.append(key)
