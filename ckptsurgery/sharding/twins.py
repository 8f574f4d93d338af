"""A plain twin of a sharded model: what decides on a load sees an ordinary model on the meta device.

The twin has the modules of the model, each of its own class, without the wrappers of activation checkpointing and FSDP1
and without the hooks of `torch.distributed`. Its tensors are meta tensors of the whole shapes, and tensors that are one
object in the model are one in the twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..storage.plain_memory import oddity
from .shards import is_sharded

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Owner", "Twin", "twin_of"]

_HOOKS = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
_WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True, slots=True)
class Owner:
    """A module of the sharded model, and the name under which it registers a tensor."""

    module: nn.Module
    leaf: str

    @property
    def tensor(self) -> Tensor:
        """The tensor that is registered."""
        found = self.module._parameters.get(self.leaf)
        held = found if found is not None else self.module._buffers[self.leaf]
        if held is None:
            raise AttributeError(self.leaf)
        return held

    def put(self, tensor: Tensor) -> None:
        """Register another tensor."""
        setattr(self.module, self.leaf, tensor)


@dataclass(frozen=True, slots=True)
class Twin:
    """A plain twin.

    Args:
        model: the sharded model. module: the twin.
        owners: name in the twin -> where the model registers the tensor.
    """

    model: nn.Module
    module: nn.Module
    owners: dict[str, Owner]

    def places(self, name: str) -> list[Owner]:
        """Every place where the model registers the very tensor that a name means."""
        tensor = self.owners[name].tensor
        return [owner for owner in self.owners.values() if owner.tensor is tensor]


def twin_of(model: nn.Module) -> Twin:
    """The twin of a model."""
    copier = _Copier({}, {}, {})
    module = copier.module(model)
    return Twin(model, module, dict(copier.owners("", module, set())))


@dataclass(slots=True)
class _Copier:
    copies: dict[int, nn.Module]
    tensors: dict[int, Tensor]
    originals: dict[int, nn.Module]

    def module(self, module: nn.Module) -> nn.Module:
        """The copy of a module, one for each object."""
        inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if inner is not None:
            return self.module(inner)
        known = self.copies.get(id(module))
        if known is not None:
            return known
        kind = _own_class(type(module))
        made: nn.Module = object.__new__(kind)
        made.__dict__.update(module.__dict__)
        self.copies[id(module)], self.originals[id(made)] = made, module
        fields = made.__dict__
        for name in _HOOKS:
            fields[name] = type(fields[name])(
                (n, hook) for n, hook in fields[name].items() if not _is_distributed(hook)
            )
        fields["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        fields["_parameters"] = {n: t if t is None else self.tensor(t, True) for n, t in module._parameters.items()}
        fields["_buffers"] = {
            n: t
            if t is None or (n in module._non_persistent_buffers_set and not (t.is_meta and is_sharded(t)))
            else self.tensor(t, False)
            for n, t in module._buffers.items()
        }
        fields["_modules"] = {n: m if m is None else self.module(m) for n, m in module._modules.items()}
        return made

    def tensor(self, tensor: Tensor, parameter: bool) -> Tensor:
        """The meta tensor of a tensor, one for each object."""
        import torch
        from torch import nn
        from torch.nn.parameter import is_lazy

        known = self.tensors.get(id(tensor))
        if known is None:
            if is_lazy(tensor) or not (is_sharded(tensor) or oddity(tensor) is None):
                known = tensor  # what decides on the load refuses it by name
            else:
                known = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                known = nn.Parameter(known, requires_grad=tensor.requires_grad) if parameter else known
            self.tensors[id(tensor)] = known
        return known

    def owners(self, prefix: str, module: nn.Module, above: set[int]) -> Iterator[tuple[str, Owner]]:
        """Each name of the twin, and where the model registers the tensor."""
        if id(module) in above:
            return
        original = self.originals[id(module)]
        for leaf in (*module._parameters, *module._buffers):
            if getattr(module, leaf, None) is not None:
                yield prefix + leaf, Owner(original, leaf)
        for name, inner in module._modules.items():
            if inner is not None:
                yield from self.owners(f"{prefix}{name}.", inner, above | {id(module)})


def _own_class(kind: type) -> Any:
    """The class of a module before it was sharded: `fully_shard` derives one from it."""
    bases = kind.__bases__
    if len(bases) == 2 and bases[0].__name__ == "FSDPModule" and bases[0].__module__.startswith("torch."):
        return bases[1]
    return kind


def _is_distributed(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith("torch.distributed")
