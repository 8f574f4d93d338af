"""Which recipes that ship turn a source into a model, by headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..catalog import list_recipes, load_recipe
from ..errors import CkptSurgeryError
from ..planning.planner import make_plan
from ..planning.targets import Target
from ..storage.checkpoint import Checkpoint

__all__ = ["fitting_recipes"]


def fitting_recipes(checkpoint: Checkpoint, target: Target, config: Mapping[str, Any] | None = None) -> list[str]:
    """Names of the recipes whose plan from the source to the target is free of problems.

    >>> from ckptsurgery.storage.opening import open_checkpoint
    >>> fitting_recipes(open_checkpoint({}), Target({}))
    []
    """
    found = []
    for name in list_recipes() if len(checkpoint) else ():
        for settings in (checkpoint.config, config):
            try:
                make_plan(
                    checkpoint.specs, load_recipe(name), load_recipe, target=target, config=settings, dtype="model"
                )
            except CkptSurgeryError:
                continue
            found.append(name)
            break
    return found
