"""`suggest`: the recipe that turns one side into the other, by what the caller has of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import Diagnostic, RecipeError, Remedy
from ..specs import TensorSpec
from ..storage.places.opening import open as open_checkpoint
from .by_inputs import by_inputs
from .by_names import by_names
from .by_values import by_values
from .suggestion import Suggestion

__all__ = ["specs_of", "suggest"]


def suggest(source: Any, target: Any, *, by: str = "names", inputs: Any = None) -> Suggestion:
    """Infer the recipe that turns `source` into `target`.

    >>> specs = [TensorSpec((4,), "F32"), TensorSpec((4,), "F32"), TensorSpec((8, 4), "F32")]
    >>> ours = {f"blocks.{i}.{k}": s for i in range(3) for k, s in zip(("ln.gamma", "ln.beta", "fc.w"), specs)}
    >>> theirs = {f"h.{i}.{k}": s for i in range(3) for k, s in zip(("norm.weight", "norm.bias", "up"), specs)}
    >>> for rule in suggest(ours, theirs).recipe.rules:
    ...     print(rule)
    blocks.{i}.ln.{l:gamma,beta} -> h.{i}.norm.{l:weight,bias}
    blocks.{i}.fc.w -> h.{i}.up

    Args:
        source, target: whatever `open` takes, or `{key: TensorSpec}`.
        by: "names" looks at names and shapes alone; "values" at the data, where both sides hold the same weights.
        inputs: for two live models: what both are called with, so that the order of use decides what names leave open.

    Raises:
        CheckpointError: a side cannot be read. RecipeError: there is no such kind of evidence.
        LoadError: a model fails on the inputs, or is none.
    """
    if by not in ("names", "values"):
        ways = (Remedy("by", "names"), Remedy("by", "values"))
        raise RecipeError(Diagnostic("bad-argument", f"by={by!r} is neither", remedies=ways))
    if by == "values":
        return by_values(source, target)
    specs, wanted = specs_of(source), specs_of(target)
    return by_names(specs, wanted) if inputs is None else by_inputs(source, target, inputs, specs, wanted)


def specs_of(side: Any) -> Mapping[str, TensorSpec]:
    """The specs of a side."""
    if isinstance(side, Mapping) and side and all(isinstance(v, TensorSpec) for v in side.values()):
        return side
    return open_checkpoint(side).specs
