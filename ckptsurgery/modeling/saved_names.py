"""Modules whose loading is their own affair, and the names under which they save their tensors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from .assigning import hooked_modules, parameter_like
from .places import places

if TYPE_CHECKING:
    from torch import nn

__all__ = ["loads_its_own", "own_loaders", "saved_names", "trial_copy"]


def own_loaders(model: nn.Module) -> tuple[str, ...]:
    """The outermost modules that load in their own way.

    The hook of torch's weight_norm parametrisation only reads old spellings, which `spelling` does too: it is plain.
    """
    paths = [p for p in hooked_modules(model) if not _only_respells(model.get_submodule(p))]
    return tuple(p for p in paths if not any(p != q and (q == "" or p.startswith(q + ".")) for q in paths))


def loads_its_own(module: nn.Module) -> bool:
    """Whether the loading of a module's own tensors is code of its own; torch's norms only forgive old files."""
    from torch import nn
    from torch.nn.modules import batchnorm, instancenorm

    owners = (nn.Module, batchnorm._NormBase, instancenorm._InstanceNorm)
    known = {o._load_from_state_dict for o in owners}
    return "_load_from_state_dict" in vars(module) or type(module)._load_from_state_dict not in known


def _only_respells(module: nn.Module) -> bool:
    hooks = [getattr(h, "hook", h) for h in module._load_state_dict_pre_hooks.values()]
    compat = all(getattr(h, "__module__", "") == "torch.nn.utils.parametrizations" for h in hooks)
    return not loads_its_own(module) and compat and not module._load_state_dict_post_hooks


def saved_names(model: nn.Module) -> dict[str, str]:
    """How modules that load in their own way spell their tensors when they are saved, where that is another name.

    torch's activation checkpointing, for one, leaves its wrapper out of a state_dict, and a hook puts it in again.
    """
    found: dict[str, str] = {}
    for path in own_loaders(model):
        try:
            twin = trial_copy(model.get_submodule(path), real=False)
            state = twin.state_dict(keep_vars=True)
        except Exception:  # a module's own code may raise anything: then its names are taken as they are
            continue
        before = f"{path}." if path else ""
        names: dict[int, list[str]] = {}
        for name, tensor in state.items():
            names.setdefault(id(tensor), []).append(name)
        for place in places(twin):
            others = names.get(id(place.tensor), [])
            if place.name not in state and len(others) == 1:
                found[before + place.name] = before + others[0]
    return found


def trial_copy(module: nn.Module, real: bool) -> nn.Module:
    """A copy to try on: with values of its own, or on the meta device."""
    import torch

    memo: dict[int, Any] = {}
    for place in () if real else places(module):
        empty = torch.empty_like(place.tensor.detach(), device="meta")
        # without gradients, so that tensors of any dtype may be assigned: dtypes are judged afterwards
        memo[id(place.tensor)] = empty if place.is_buffer else parameter_like(place.tensor, empty).requires_grad_(False)
    return copy.deepcopy(module, memo)
