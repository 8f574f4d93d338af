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
    from .catalog import list_recipes, load_recipe, route
    from .comparing.diffing import Diff, diff
    from .dcp.reader import StorageReader
    from .dcp.writer import StorageWriter
    from .diagnosing.doctor import Diagnosis, doctor
    from .errors import CheckpointError, CkptSurgeryError, Diagnostic, LoadError, PlanError, RecipeError, Remedy
    from .exchange import recipes
    from .inference.parity import Parity, verify
    from .inference.suggesting import suggest
    from .inference.suggestion import Suggestion
    from .language.recipe import Recipe, Scope
    from .language.rules import Rule
    from .low_rank import adapters
    from .modeling.groups import param_groups
    from .modeling.init_checks import check_init
    from .modeling.selection import Selection, select
    from .modeling.skeletons import skeleton
    from .modeling.ties import tie, untie
    from .ops.base import Op
    from .ops.registry import op
    from .planning.plan import Plan
    from .planning.report import Report
    from .reporting.overview import summary, ties
    from .resharding.resharder import reshard
    from .running.runner import inverse, plan, save
    from .specs import TensorSpec
    from .storage.checkpoint import Checkpoint
    from .storage.places.opening import open
    from .transfer.fitting import match_recipes
    from .transfer.loading import load_into
    from .witness.loaded import check_loaded
    from .witness.watching import watch_load

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CkptSurgeryError",
    "Diagnosis",
    "Diagnostic",
    "Diff",
    "LoadError",
    "Op",
    "Parity",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Remedy",
    "Report",
    "Rule",
    "Scope",
    "Selection",
    "StorageReader",
    "StorageWriter",
    "Suggestion",
    "TensorSpec",
    "__version__",
    "adapters",
    "check_init",
    "check_loaded",
    "diff",
    "doctor",
    "inverse",
    "list_recipes",
    "load_into",
    "load_recipe",
    "match_recipes",
    "op",
    "open",
    "param_groups",
    "plan",
    "recipes",
    "reshard",
    "route",
    "save",
    "select",
    "skeleton",
    "suggest",
    "summary",
    "tie",
    "ties",
    "untie",
    "verify",
    "watch_load",
]

_HOMES: dict[str, tuple[str, ...]] = {
    "catalog": ("list_recipes", "load_recipe", "route"),
    "comparing.diffing": ("Diff", "diff"),
    "dcp.reader": ("StorageReader",),
    "dcp.writer": ("StorageWriter",),
    "diagnosing.doctor": ("Diagnosis", "doctor"),
    "errors": ("CheckpointError", "CkptSurgeryError", "Diagnostic", "LoadError", "PlanError", "RecipeError", "Remedy"),
    "inference.suggesting": ("suggest",),
    "inference.suggestion": ("Suggestion",),
    "inference.parity": ("Parity", "verify"),
    "language.recipe": ("Recipe", "Scope"),
    "language.rules": ("Rule",),
    "modeling.init_checks": ("check_init",),
    "modeling.groups": ("param_groups",),
    "modeling.selection": ("Selection", "select"),
    "modeling.skeletons": ("skeleton",),
    "modeling.ties": ("tie", "untie"),
    "ops.base": ("Op",),
    "ops.registry": ("op",),
    "reporting.overview": ("summary", "ties"),
    "planning.plan": ("Plan",),
    "planning.report": ("Report",),
    "resharding.resharder": ("reshard",),
    "running.runner": ("inverse", "plan", "save"),
    "specs": ("TensorSpec",),
    "storage.checkpoint": ("Checkpoint",),
    "storage.places.opening": ("open",),
    "transfer.loading": ("load_into",),
    "transfer.fitting": ("match_recipes",),
    "witness.loaded": ("check_loaded",),
    "witness.watching": ("watch_load",),
}
_PLACES = {name: module for module, names in _HOMES.items() for name in names}


_ROOMS = {"recipes": ".exchange.recipes", "adapters": ".low_rank.adapters"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(_ROOMS[name], __name__)
    if name not in _PLACES:
        raise AttributeError(f"module 'ckptsurgery' has no attribute {name!r}")
    value = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
