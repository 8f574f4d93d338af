"""Checkpoint surgery for PyTorch: one-line rules, a plan that is checked from headers, an executor as fast as the disk.

>>> import torch, ckptsurgery as cs
>>> plan = cs.plan({"fc.weight": torch.ones(3, 2)}, "fc.weight [o i] -> dense.kernel [i o]")
>>> plan.state_dict()["dense.kernel"].shape
torch.Size([2, 3])

Names are loaded when first used, so `import ckptsurgery` is quick and brings no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalog import list_recipes as list_recipes
    from .catalog import load_recipe as load_recipe
    from .errors import CheckpointError as CheckpointError
    from .errors import CkptSurgeryError as CkptSurgeryError
    from .errors import Diagnostic as Diagnostic
    from .errors import LoadError as LoadError
    from .errors import PlanError as PlanError
    from .errors import RecipeError as RecipeError
    from .language.recipe import Recipe as Recipe
    from .language.recipe import Scope as Scope
    from .language.rules import Rule as Rule
    from .modeling.groups import param_groups as param_groups
    from .modeling.selection import Selection as Selection
    from .modeling.selection import select as select
    from .modeling.skeletons import skeleton as skeleton
    from .modeling.ties import tie as tie
    from .modeling.ties import untie as untie
    from .ops.base import Op as Op
    from .ops.registry import register as op
    from .running.plan import RunnablePlan as Plan
    from .running.plan import plan as plan
    from .running.report import Report as Report
    from .specs import TensorSpec as TensorSpec
    from .storage.checkpoint import Checkpoint as Checkpoint
    from .storage.opening import open_checkpoint as open
    from .transfer.loading import load_into as load_into

__version__ = "0.1.0"

_HOMES = {
    "catalog": ("list_recipes", "load_recipe"),
    "errors": ("CheckpointError", "CkptSurgeryError", "Diagnostic", "LoadError", "PlanError", "RecipeError"),
    "language.recipe": ("Recipe", "Scope"),
    "language.rules": ("Rule",),
    "modeling.groups": ("param_groups",),
    "modeling.selection": ("Selection", "select"),
    "modeling.ties": ("tie", "untie"),
    "ops.base": ("Op",),
    "ops.registry": (("register", "op"),),
    "running.plan": (("RunnablePlan", "Plan"), "plan"),
    "running.report": ("Report",),
    "specs": ("TensorSpec",),
    "storage.checkpoint": ("Checkpoint",),
    "storage.opening": (("open_checkpoint", "open"),),
    "transfer.loading": ("load_into",),
    "modeling.skeletons": ("skeleton",),
}
_PLACES = {
    (name if isinstance(name, str) else name[1]): (module, name if isinstance(name, str) else name[0])
    for module, names in _HOMES.items()
    for name in names
}

__all__ = sorted([*_PLACES, "__version__"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'ckptsurgery' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = getattr(import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
