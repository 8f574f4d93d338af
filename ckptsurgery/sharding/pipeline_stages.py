"""Stages of a pipeline: each rank has some of the layers, and a load sees the layers of all ranks as one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import Diagnostic, LoadError
from ..wording import counted
from .peers import Peers
from .twins import Twin

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["tie_groups", "united"]


class _StageTensor(NamedTuple):
    """A tensor of a rank's stage.

    Args:
        name: in the model.
        shape, dtype: of the whole tensor.
        trains: whether it takes a gradient; None for a buffer.
        first: the first name of the same tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool | None
    first: str


def united(twin: Twin, ranks: Peers) -> Twin:
    """Return the twin of all stages: this rank's own modules, and bare modules for the tensors of the others.

    Names, shapes and ties are equal on all ranks, and in one order: that of the first rank, then what the next adds.

    Raises:
        LoadError: a name means tensors of another shape or dtype on another rank.
    """
    stages = ranks.shared(_rows(twin))
    known: dict[str, _StageTensor] = {}
    differ = {}
    for rank, rows in enumerate(stages):
        for row in rows:
            before = known.setdefault(row.name, row)
            if (before.shape, before.dtype) != (row.shape, row.dtype):
                differ[row.name] = f"{row.name}  {list(before.shape)}, and {list(row.shape)} on rank {rank}"
    if differ:
        text = f"{counted(len(differ), 'tensor', 'has')} another shape or dtype on another rank"
        help = "build the stages from one config"
        raise LoadError(Diagnostic("stages-differ", text, notes=tuple(differ.values())[:12], help=help))
    _add(twin, known, tie_groups((row.name, row.first) for rows in stages for row in rows))
    _sort(twin.module, "", {name: number for number, name in enumerate(known)})
    return twin


def _rows(twin: Twin) -> list[_StageTensor]:
    """The tensors of a state dict of the stage."""
    first: dict[int, str] = {}
    return [
        _StageTensor(
            name,
            tuple(owner.tensor.shape),
            owner.tensor.dtype,
            owner.tensor.requires_grad if owner.leaf in owner.module._parameters else None,
            first.setdefault(id(owner.tensor), name),
        )
        for name, owner in twin.owners.items()
        if owner.leaf not in owner.module._non_persistent_buffers_set
    ]


def tie_groups(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Each name -> one name for all that are one tensor on some rank.

    >>> tie_groups([("a", "a"), ("b", "a"), ("c", "b"), ("d", "d")])
    {'a': 'a', 'b': 'a', 'c': 'a', 'd': 'd'}

    Args:
        pairs: a name, and another of the same tensor.
    """
    found: dict[str, str] = {}

    def root(name: str) -> str:
        while found.setdefault(name, name) != name:
            name = found[name]
        return name

    for name, other in pairs:
        found[root(name)] = root(other)
    return {name: root(name) for name in list(found)}


def _add(twin: Twin, rows: Mapping[str, _StageTensor], groups: Mapping[str, str]) -> None:
    """Register a meta tensor under each name that a twin does not have."""
    import torch
    from torch import nn

    tensors: dict[str, Any] = {}
    for name in rows:
        if name in twin.owners:
            owner, leaf = _place(twin.module, name)
            tensors[groups[name]] = (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf]
    for name, row in rows.items():
        if name in twin.owners:
            continue
        tensor = tensors.get(groups[name])
        if tensor is None:
            tensor = torch.empty(row.shape, dtype=row.dtype, device="meta")
            tensor = tensor if row.trains is None else nn.Parameter(tensor, requires_grad=row.trains)
            tensors[groups[name]] = tensor
        owner, leaf = _place(twin.module, name)
        registered: dict[str, Any] = owner._buffers if row.trains is None else owner._parameters
        registered[leaf] = tensor


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that registers a name, made where it is missing, and the name there."""
    from torch import nn

    *path, leaf = name.split(".")
    for part in path:
        inner = module._modules.get(part)
        if inner is None:
            inner = module._modules[part] = nn.Module()
        module = inner
    return module, leaf


def _sort(module: nn.Module, prefix: str, order: Mapping[str, int]) -> int:
    """Put a module's tensors and parts in order, and return the place of the first of them."""
    last = len(order)
    first = {name: order.get(prefix + name, last) for name in (*module._parameters, *module._buffers)}
    for name, inner in module._modules.items():
        first[name] = last if inner is None else _sort(inner, f"{prefix}{name}.", order)
    every: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    for registered in every:
        entries = sorted(registered.items(), key=lambda entry: first[entry[0]])
        registered.clear()
        registered.update(entries)
    return min(first.values(), default=last)
