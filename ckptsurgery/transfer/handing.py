"""Modules whose loading is their own affair: what the source holds for them goes through torch's own machinery.

A trial on a copy shows, before the model is touched, what the module takes, lacks or refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import Diagnostic
from ..modeling.assigning import hooked_modules

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Handing", "own_loaders"]


def own_loaders(model: nn.Module) -> tuple[str, ...]:
    """The outermost modules that load in their own way.

    The hook of torch's weight_norm parametrisation only reads old spellings, which `spelling` does too: it is plain.
    """
    paths = [p for p in hooked_modules(model) if not _only_respells(model.get_submodule(p))]
    return tuple(p for p in paths if not any(p != q and (q == "" or p.startswith(q + ".")) for q in paths))


def _only_respells(module: nn.Module) -> bool:
    from torch import nn
    from torch.nn.modules import batchnorm, instancenorm

    owners = (nn.Module, batchnorm._NormBase, instancenorm._InstanceNorm)
    plain = "_load_from_state_dict" not in vars(module) and type(module)._load_from_state_dict in {
        o._load_from_state_dict for o in owners
    }
    hooks = [getattr(h, "hook", h) for h in module._load_state_dict_pre_hooks.values()]
    compat = all(getattr(h, "__module__", "") == "torch.nn.utils.parametrizations" for h in hooks)
    return plain and compat and not module._load_state_dict_post_hooks


@dataclass
class Handing:
    """What one module is handed.

    Args:
        path: where it stands in the model.
        tensors: its part of the source, by its own names.
    """

    path: str
    tensors: Mapping[str, Tensor]
    missing: list[str] = field(default_factory=list)

    def key(self, name: str) -> str:
        """The name in the model."""
        return f"{self.path}.{name}" if self.path else name

    def trial(self, model: nn.Module) -> list[Diagnostic]:
        """Load into a copy, and say what stands against it."""
        twin = copy.deepcopy(model.get_submodule(self.path))
        assign = any(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
        try:
            found = twin.load_state_dict(dict(self.tensors), strict=False, assign=assign)
        except Exception as error:  # a module's own code may raise anything
            return [
                Diagnostic(
                    "own-loading-failed",
                    f"{self.key('')[:-1] or 'the model'} loads in its own way, and refuses: "
                    f"{str(error).splitlines()[0]}",
                    notes=tuple(str(error).splitlines()[1:8]),
                )
            ]
        self.missing = [self.key(k) for k in found.missing_keys]
        extra = [self.key(k) for k in found.unexpected_keys]
        if extra:
            return [
                Diagnostic(
                    "unexpected-keys",
                    f"{len(extra)} tensors of the source have no place in {self.path or 'the model'!r}, "
                    "which loads in its own way",
                    notes=tuple(extra[:8]),
                    help="drop=[…] leaves them out",
                )
            ]
        return []

    def load(self, model: nn.Module, assign: bool) -> None:
        """Load for good."""
        model.get_submodule(self.path).load_state_dict(dict(self.tensors), strict=False, assign=assign)
