"""Tensors in memory as a checkpoint: a state_dict, a training checkpoint around one, or a live module."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Diagnostic
from .contents import Contents, Entry
from .inert import Ordered, Storage, Tensor
from .nesting import find_model, settle

if TYPE_CHECKING:
    import torch

__all__ = ["is_module", "read_mapping", "read_module"]


def is_module(source: object) -> bool:
    """Whether an object is an `nn.Module`; imports nothing, since a module cannot be there before torch is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def read_mapping(source: Mapping[Any, Any], subtree: str | None = None) -> Contents:
    """A state_dict, or a training checkpoint around one; `nesting` finds the model's tensors, the rest goes to extras.

    Raises:
        CheckpointError: no tensors, several state_dicts side by side, or a tensor of a dtype that no file format holds.
    """
    if not source and not subtree:
        return Contents({})
    tensors: list[torch.Tensor] = []
    found = find_model(_mirror(source, tensors, (), ""), subtree, "state_dict")

    def tensor_of(leaf: Any) -> torch.Tensor:
        return tensors[int(leaf.storage.key)]

    entries = {key: _entry(tensor_of(leaf), key) for key, leaf in found.leaves.items()}
    return Contents(entries, extras=settle(found.extras, tensor_of), frame=found.frame)


def read_module(module: torch.nn.Module) -> Contents:
    """A module's state_dict; parameters that are one object stay one tensor, `config.to_dict()` becomes the config."""
    state = module.state_dict(keep_vars=True)
    contents = Contents({})
    for key, value in state.items():
        if _is_tensor(value) and not key.endswith("_extra_state"):
            contents.entries[key] = _entry(value, key)
        else:
            contents.extras[key] = value
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        contents.extras["_metadata"] = metadata
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else None
    contents.config = config if isinstance(config, dict) else None
    return contents


def _mirror(value: Any, tensors: list[torch.Tensor], above: tuple[int, ...], path: str) -> Any:
    """The same tree with a record in the place of each tensor, as the readers of files make it."""
    if _is_tensor(value):
        tensors.append(value)
        spec = _entry(value, path or "the tensor").spec
        return Tensor(Storage(str(len(tensors) - 1), spec.dtype, spec.numel), 0, spec.shape, (), spec.dtype)
    if not isinstance(value, Mapping | list | tuple) or path == "_extra_state" or path.endswith("._extra_state"):
        return value  # the extra state of a module is handed back to one as the caller's own object
    if id(value) in above:
        raise CheckpointError(Diagnostic("nested-too-deep", "the state_dict contains itself"))
    inner = (*above, id(value))
    start = f"{path}." if path else ""
    if not isinstance(value, Mapping):
        items = [_mirror(item, tensors, inner, f"{start}{n}") for n, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    mirrored: dict[Any, Any] = Ordered() if isinstance(value, OrderedDict) else {}
    mirrored.update((key, _mirror(item, tensors, inner, f"{start}{key}")) for key, item in value.items())
    metadata = getattr(value, "_metadata", None)
    if metadata is not None and isinstance(mirrored, Ordered):
        mirrored.attributes = {"_metadata": metadata}
    return mirrored


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _entry(tensor: torch.Tensor, key: str) -> Entry:
    from .tensors import spec_of

    try:
        return Entry(spec_of(tensor), tensor=tensor.detach())
    except CheckpointError as error:
        problem = error.diagnostics[0]
        text = f"{key!r}: {problem.headline}"
        raise CheckpointError(Diagnostic(problem.code, text, help="dequantise or convert it first")) from None
