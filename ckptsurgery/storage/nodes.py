"""The nodes of a checkpoint's tree: what is a tensor, what has parts, and what the rest becomes as extras."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import CheckpointError
from .inert import Array, Blob, FileBytes, Joined, Opaque, Ordered, Tensor

__all__ = ["DEPTH", "children", "is_tensor", "settle"]

DEPTH = 64  # mappings within mappings; real checkpoints have a dozen
_LONGEST = 1 << 26  # bytes; a longer byte string among the extras is not read


def settle(extras: Mapping[str, Any], place: Callable[[Any], Any]) -> dict[str, Any]:
    """`extras` with every tensor replaced by what `place` makes of it, or by an opaque note where that fails."""
    known: dict[int, Any] = {}

    def settled(value: Any, depth: int) -> Any:
        if is_tensor(value):
            try:
                return place(value)
            except CheckpointError as error:
                return Opaque("torch", "Tensor", (), error.diagnostics[0].headline)
        if type(value) is Opaque and value.pairs:
            value = value.pairs  # an object of a class derived from dict
        if not isinstance(value, (dict, list, tuple)):
            return _plain(value)
        # shared parts stay shared: a graph of lists may have exponentially many paths
        if id(value) not in known:
            known[id(value)] = Opaque("builtins", type(value).__name__, (), "it contains itself")
            if depth >= DEPTH:
                return Opaque("builtins", type(value).__name__, (), "nested too deep")
            known[id(value)] = parts(value, depth + 1)
        return known[id(value)]

    def parts(value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            made: dict[Any, Any] = Ordered() if isinstance(value, Ordered) else {}
            made.update((k, settled(v, depth)) for k, v in value.items())
            if isinstance(made, Ordered) and isinstance(value, Ordered):
                made.attributes = settled(value.attributes, depth)
            return made
        items = [settled(v, depth) for v in value]
        return items if isinstance(value, list) else tuple(items)

    return {path: settled(value, 0) for path, value in extras.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, FileBytes):
        return bytes(value)
    if type(value) is Blob and value.nbytes <= _LONGEST:
        return value.read()
    if type(value) is Array:
        return Opaque("numpy", "ndarray", (), f"{value.type.code if value.type else '?'} {list(value.shape)}")
    return value


def is_tensor(value: Any) -> bool:
    """Whether `value` is a leaf with data: a tensor, or a numpy array of numbers."""
    kind = type(value)
    return kind is Tensor or kind is Joined or (kind is Array and value.dtype is not None)


def children(node: Any) -> Iterator[tuple[Any, Any]] | None:
    """The keyed parts of a mapping, list or pickled module; None for a leaf."""
    if isinstance(node, dict):
        return iter(node.items())
    if type(node) in (list, tuple):
        return enumerate(node)
    if type(node) is Opaque:
        return _module_parts(node)
    return None


def _module_parts(node: Opaque) -> Iterator[tuple[Any, Any]] | None:
    state = node.state[0] if type(node.state) is tuple and node.state else node.state
    if isinstance(state, dict):
        if isinstance(state.get("_modules"), dict) and isinstance(state.get("_parameters"), dict):
            hidden = state.get("_non_persistent_buffers_set") or ()
            buffers = state.get("_buffers")
            buffers = buffers if isinstance(buffers, dict) else {}
            return iter(
                [(k, v) for k, v in state["_parameters"].items() if v is not None]
                + [(k, v) for k, v in buffers.items() if v is not None and k not in hidden]
                + [(k, v) for k, v in state["_modules"].items() if v is not None]
            )
        if node.module.startswith("__torch__"):
            return ((k, v) for k, v in state.items() if is_tensor(v) or children(v) is not None)
    return iter(node.pairs.items()) if node.pairs else None
