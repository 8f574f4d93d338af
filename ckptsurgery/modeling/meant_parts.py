"""The tensors of a layer that an initialiser means: matrices for a formula of fans, no bias where there is none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from .initialising import Whats, read_initialiser

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["absent_parts", "meant_of"]


def meant_of(tensors: Mapping[str, Tensor], what: Whats) -> tuple[str, ...]:
    """Return the names of the tensors that an initialiser means.

    >>> from torch import nn
    >>> tensors = dict(nn.Linear(2, 3).named_parameters())
    >>> meant_of(tensors, "xavier_uniform"), meant_of(tensors, "zeros")
    (('weight',), ('weight', 'bias'))

    A formula of fans (`xavier_uniform`, `kaiming_normal`) means the matrices and kernels, where there are any. Every
    other initialiser means all tensors.
    """
    if isinstance(what, Mapping) or read_initialiser(what).least_dimensions < 2:
        return tuple(tensors)
    return tuple(name for name, tensor in tensors.items() if tensor.ndim > 1) or tuple(tensors)


def absent_parts(model: nn.Module, names: Collection[str]) -> set[str]:
    """Return the parameters that the layers of `names` declare and do not have, such as a `bias` of `bias=False`.

    >>> from torch import nn
    >>> absent_parts(nn.Linear(2, 3, bias=False), ["weight"])
    {'bias'}

    Parts that another of the layers has are left out.
    """
    ends = {name.rpartition(".")[2] for name in names}
    layers = {name.rpartition(".")[0] for name in names}
    modules = (model.get_submodule(path) for path in layers)
    return {leaf for module in modules for leaf, p in module._parameters.items() if p is None} - ends
