"""Tensors in memory as a checkpoint: a state_dict, however nested, or a live module."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, Diagnostic
from .contents import Contents, Entry

if TYPE_CHECKING:
    import torch

__all__ = ["is_module", "read_mapping", "read_module"]


def is_module(source: object) -> bool:
    """Whether an object is an `nn.Module`; imports nothing, since a module cannot be there before torch is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def read_mapping(source: Mapping[Any, Any], subtree: str | None = None) -> Contents:
    """A state_dict, or a training checkpoint around one: nested paths are joined by dots, the rest goes to extras."""
    from .subtree import enter

    contents = Contents({})
    _walk(source, "", contents, set())
    metadata = getattr(source, "_metadata", None)
    if metadata is not None:
        contents.extras["_metadata"] = metadata
    return enter(contents, subtree, "state_dict") if subtree else contents


def read_module(module: torch.nn.Module) -> Contents:
    """A module's state_dict; parameters that are one object stay one tensor, `config.to_dict()` becomes the config."""
    state = module.state_dict(keep_vars=True)
    contents = Contents({})
    for key, value in state.items():
        if _is_tensor(value) and not key.endswith("_extra_state"):
            contents.entries[key] = _entry(value.detach(), key)
        else:
            contents.extras[key] = value
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        contents.extras["_metadata"] = metadata
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    config = to_dict() if callable(to_dict) else None
    contents.config = config if isinstance(config, dict) else None
    return contents


def _walk(source: Mapping[Any, Any], prefix: str, contents: Contents, within: set[int]) -> None:
    if id(source) in within:
        raise CheckpointError(Diagnostic("bad-source", f"the mapping at {prefix or 'the top'!r} contains itself"))
    for name, value in source.items():
        key = f"{prefix}{name}"
        if _is_tensor(value):
            if key in contents.entries:
                raise CheckpointError(
                    Diagnostic(
                        "duplicate-key", f"two tensors are both called {key!r} once their paths are joined by dots"
                    )
                )
            contents.entries[key] = _entry(value.detach(), key)
        elif isinstance(value, Mapping) and value:
            _walk(value, key + ".", contents, within | {id(source)})
        else:
            contents.extras[key] = value


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _entry(tensor: torch.Tensor, key: str) -> Entry:
    from .tensors import spec_of

    try:
        return Entry(spec_of(tensor), tensor=tensor)
    except CheckpointError as error:
        problem = error.diagnostics[0]
        raise CheckpointError(
            Diagnostic(problem.code, f"{key!r}: {problem.headline}", key, help="dequantise or convert it first")
        ) from None
