"""Files whose names and shapes may fit a model while their layout does not: no shape tells, so it is never guessed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import Diagnostic
from ..language.folding import fold
from ..planning.plan import Plan
from ..planning.resizing import recipe_of_changes
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

__all__ = ["as_if_transposed", "foreign_layout"]

_MARK, _SUFFIX = "StructuredToParameterName@@", ".pdparams"


def foreign_layout(model: nn.Module, checkpoint: Checkpoint, plan: Plan, loaded: Collection[str]) -> list[Diagnostic]:
    """What stands against loading a file of Paddle's as it is: its Linear weights are [in, out], and a square one fits.

    Args:
        plan: the load without a rule. loaded: the model's keys that it would fill.
    """
    weights = _crossed_weights(model, checkpoint)
    crossed = [key for key in loaded if key in weights]
    if not crossed:
        return []
    return [
        Diagnostic(
            "paddle-layout",
            f"{len(crossed)} weights of Linear layers would load as they are, and Paddle keeps them as [in, out]",
            notes=tuple(text for text, _ in fold(crossed)),
            facts=(("as they are", 'recipe=cs.Recipe(rest="keep"), should the file hold [out, in] all the same'),),
            remedies=(recipe_of_changes(plan, dict.fromkeys(crossed, (" [i o]", " [o i]"))),),
        )
    ]


def as_if_transposed(
    model: nn.Module, checkpoint: Checkpoint, plan: Plan, target: Mapping[str, TensorSpec]
) -> dict[str, TensorSpec] | None:
    """The specs with those of crossed Linear weights as the model has them: their layout is told, not their shape."""
    weights, made = _crossed_weights(model, checkpoint), plan.specs
    if not weights:
        return None
    crossed = {k for k in weights & made.keys() & target.keys() if made[k].shape[::-1] == target[k].shape}
    return {k: replace(s, shape=target[k].shape) if k in crossed else s for k, s in made.items()}


def _crossed_weights(model: nn.Module, checkpoint: Checkpoint) -> set[str]:
    from torch import nn

    if _MARK not in checkpoint.extras and not checkpoint.source.endswith(_SUFFIX):
        return set()
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and (module.in_features, module.out_features) != (1, 1)
    }
