"""State dicts with shards in them, seen as plain ones: a meta tensor of the whole shape stands for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .shards import is_sharded

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StandIns", "holds_shards"]


def holds_shards(source: Any) -> bool:
    """Whether a model, a state dict or a tree of them has tensors of which each rank holds a part."""
    return any(map(is_sharded, _tensors(source, 0)))


def _tensors(source: Any, depth: int) -> list[Tensor]:
    """The tensors in a tree, without the repeated ones of a module."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None or depth > 32:
        return []
    if isinstance(source, torch.nn.Module):
        return [*source.parameters(), *source.buffers()]
    if isinstance(source, torch.Tensor):
        return [source]
    if isinstance(source, Mapping):
        return [tensor for value in source.values() for tensor in _tensors(value, depth + 1)]
    if isinstance(source, list | tuple):
        return [tensor for value in source for tensor in _tensors(value, depth + 1)]
    return []


class StandIns:
    """A tree in which meta tensors stand for tensors; one object, or equal views of one memory, stay one.

    Args:
        source: a model or a state dict.
    """

    def __init__(self, source: Any) -> None:
        import torch

        self._originals: dict[int, Tensor] = {}
        self._by_memory: dict[object, Tensor] = {}
        state = source.state_dict(keep_vars=True) if isinstance(source, torch.nn.Module) else source
        self.tree: Any = self._of(state, 0)

    def original(self, stand_in: Tensor) -> Tensor:
        """The tensor that one stands for."""
        return self._originals[stand_in.untyped_storage()._cdata]

    def _of(self, value: Any, depth: int) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if depth > 32 or not isinstance(value, Mapping | list | tuple):
            return value
        if isinstance(value, Mapping):
            return {key: self._of(part, depth + 1) for key, part in value.items()}
        parts = [self._of(part, depth + 1) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts

    def _tensor(self, tensor: Tensor) -> Tensor:
        import torch

        memory = _memory(tensor)
        known = self._by_memory.get(memory)
        if known is None:
            known = self._by_memory[memory] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            self._originals[known.untyped_storage()._cdata] = tensor
        return known


def _memory(tensor: Tensor) -> object:
    """Equal for two tensors that are one object, or equal views of one memory."""
    held: Any = tensor.detach()
    local = held.to_local() if is_sharded(tensor) else held
    if not local.numel() or local.is_meta:
        return id(tensor)
    layout = local.storage_offset(), tuple(local.shape), local.stride(), tuple(tensor.shape), tensor.dtype
    return local.untyped_storage().data_ptr(), *layout
