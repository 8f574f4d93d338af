"""Norms whose parameters are frozen, and whose running statistics change all the same."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["drifting_norms"]


def drifting_norms(model: nn.Module, frozen: Collection[str]) -> tuple[str, ...]:
    """Return the paths of norms in training mode that keep running statistics though they are frozen.

    A norm without parameters counts where the module that contains it has only frozen parameters.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)).requires_grad_(False)
    >>> drifting_norms(net, {"0.weight", "0.bias"})
    ('1',)

    Args:
        frozen: names of the parameters that were frozen.
    """
    from torch.nn.modules.batchnorm import _NormBase

    found = []
    for path, module in model.named_modules():
        if not isinstance(module, _NormBase) or not module.training or module.running_mean is None:
            continue
        at = path if module.affine else path.rpartition(".")[0]
        held = dict(model.get_submodule(at).named_parameters(prefix=at))
        if any(name in frozen for name in held) and not any(p.requires_grad for p in held.values()):
            found.append(path)
    return tuple(found)
