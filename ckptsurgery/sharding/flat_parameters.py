"""Models of FSDP1 (`FullyShardedDataParallel`), whose ranks hold slices of flat parameters.

A slice of a flat parameter is not a box of a tensor. While such a model is loaded, torch gathers its parameters whole
on each rank, and cuts them again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["has_flat_parameters", "whole_parameters"]


def has_flat_parameters(model: nn.Module) -> bool:
    """Whether a module of FSDP1 is in a model."""
    return bool(_wrappers(model))


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Gather all parameters of a model of FSDP1 on each rank, unless the caller has; what is written to them stays.

    The memory of a rank is that of the whole model meanwhile.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if all(module.training_state.name == "SUMMON_FULL_PARAMS" for module in _wrappers(model)):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(model, writeback=True):
        yield


def _wrappers(model: nn.Module) -> list[Any]:
    modules = list(model.modules())
    kinds = {kind for kind in {type(module) for module in modules} if _is_wrapper(kind)}
    return [module for module in modules if type(module) in kinds] if kinds else []


def _is_wrapper(kind: type) -> bool:
    return any(
        base.__name__ == "FullyShardedDataParallel" and base.__module__.startswith("torch.") for base in kind.__mro__
    )
