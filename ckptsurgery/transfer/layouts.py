"""Files whose names and shapes may fit a model while their layout does not: no shape tells, so it is never guessed."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..errors import Diagnostic
from ..language.folding import fold
from ..storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

__all__ = ["foreign_layout"]

_MARK, _SUFFIX = "StructuredToParameterName@@", ".pdparams"


def foreign_layout(model: nn.Module, checkpoint: Checkpoint, loaded: Collection[str]) -> list[Diagnostic]:
    """What stands against loading a file of Paddle's as it is: its Linear weights are [in, out], and a square one fits.

    Args:
        loaded: the model's keys that would be filled without a rule.
    """
    from torch import nn

    if _MARK not in checkpoint.extras and not checkpoint.source.endswith(_SUFFIX):
        return []
    weights = {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and (module.in_features, module.out_features) != (1, 1)
    }
    crossed = [key for key in loaded if key in weights]
    if not crossed:
        return []
    rule = '[f"{n}.weight [i o] -> {n}.weight [o i]" for n, m in model.named_modules() if isinstance(m, nn.Linear)]'
    return [
        Diagnostic(
            "paddle-layout",
            f"{len(crossed)} weights of Linear layers would load as they are, and Paddle keeps them as [in, out]",
            notes=tuple(text for text, _ in fold(crossed)),
            facts=(("as they are", 'recipe=cs.Recipe(rest="keep"), should the file hold [out, in] all the same'),),
            help=f'recipe=cs.Recipe({rule}, rest="keep")',
        )
    ]
