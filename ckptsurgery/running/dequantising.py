"""Quantised weights of a checkpoint, and the recipes that turn them into floats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..catalog import RequiredRules, list_recipes, load_recipe
from ..errors import Diagnostic, PlanError, RecipeError, Remedy
from ..ops.base import SourceNote
from ..planning.options import PlanOptions
from ..planning.packed_weights import CODED, PackedWeight, packed_weights
from ..planning.plan import Plan
from ..planning.planner import make_plan
from ..planning.steps import outputs_of
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..wording import counted
from .source_notes import notes_of, packings

__all__ = ["dequantising_recipes", "kept_packed", "packed_in"]


def packed_in(checkpoint: Checkpoint, specs: Mapping[str, TensorSpec] | None = None) -> dict[str, PackedWeight]:
    """Return the quantised weights of a checkpoint: key of the codes -> the weight.

    Args:
        specs: those of the tensors to look at; all of the checkpoint's by default.
    """
    specs = checkpoint.specs if specs is None else specs
    if not any(spec.dtype.startswith(CODED) for spec in set(specs.values())):
        return {}
    remote = any(map(checkpoint.is_remote, checkpoint.files))  # there each small tensor is a request
    notes = (lambda key: SourceNote()) if remote else notes_of(checkpoint)
    return packed_weights(specs, notes, packings(checkpoint.extras))


def dequantising_recipes(
    checkpoint: Checkpoint, packed: Mapping[str, PackedWeight], config: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Return the names of the recipes that turn quantised weights into floats, those that serve most weights first.

    >>> import torch, ckptsurgery as cs
    >>> codes = {"fc.weight": torch.ones(4, 8).to(torch.int8), "fc.SCB": torch.ones(4)}
    >>> checkpoint = cs.open(codes)
    >>> dequantising_recipes(checkpoint, packed_in(checkpoint))
    ('quantised/bnb8_to_float',)

    Args:
        packed: the quantised weights of the checkpoint.
        config: shows which version of a format the tensors are; the checkpoint's own by default.
    """
    config = config if config is not None else checkpoint.config
    ops = {weight.op.partition("(")[0] for weight in packed.values()}
    found: list[tuple[int, str]] = []
    for name in list_recipes() if ops else ():
        texts = RequiredRules.of(name).every
        if not any(f"| {op}" in text for op in ops for text in texts):
            continue
        if _other_zero_points(texts, config):
            continue
        served = _served(checkpoint, name, packed, config)
        if served:
            found.append((-served, name))
    return tuple(name for _, name in sorted(found))


def _served(
    checkpoint: Checkpoint, name: str, packed: Mapping[str, PackedWeight], config: Mapping[str, Any] | None
) -> int:
    """The number of weights whose codes a recipe that plans without an error dequantises."""
    try:
        plan = make_plan(
            checkpoint.specs, load_recipe(name), load_recipe, None, PlanOptions(config), told_of=notes_of(checkpoint)
        )
    except (PlanError, RecipeError):
        return 0
    computed = {key for step in plan.steps if not plan.uses[step.rules[0]].is_rest for key in step.sources}
    return len(computed & packed.keys())


def _other_zero_points(texts: Iterable[str], config: Mapping[str, Any] | None) -> bool:
    """Whether a recipe for GPTQ takes zero points in another way than the config names; no tensor shows the way."""
    calls = [text for text in texts if "gptq_dequant" in text]
    about = (config or {}).get("quantization_config")
    as_they_are = isinstance(about, Mapping) and about.get("checkpoint_format") == "gptq_v2"
    return bool(calls) and as_they_are != any("v2=true" in text for text in calls)


def kept_packed(checkpoint: Checkpoint, plan: Plan) -> tuple[frozenset[str], tuple[Diagnostic, ...]]:
    """Return the targets that a cast leaves as they are, since quantised weights are read with them; and a warning.

    A scale that is cast is rounded, and codes that are cast are weights of another size.

    Args:
        plan: makes the targets; before any cast.
    """
    packed = packed_in(checkpoint)
    parts = {key for weight in packed.values() for key in weight.keys}
    if not parts:
        return frozenset(), ()
    keys, specs = outputs_of(plan.steps)
    made = dict(zip(keys, specs))
    source = checkpoint.specs
    kept = {
        target
        for step in plan.steps
        if len(step.sources) == 1 and step.sources[0] in parts
        for target in step.targets
        if made[target].dtype == source[step.sources[0]].dtype
    }
    behind = {key for step in plan.steps if not kept.isdisjoint(step.targets) for key in step.sources}
    left = {key: weight for key, weight in packed.items() if key in behind}
    if not left:
        return frozenset(), ()
    kinds = list(dict.fromkeys(weight.kind for weight in left.values()))
    text = f"{counted(len(left), 'quantised weight', 'stays')} packed ({', '.join(kinds[:3])}), with scales as they are"
    recipes = dequantising_recipes(checkpoint, left)
    remedies = tuple(Remedy("recipe", name, "makes floats of them") for name in recipes[:1])
    warning = Diagnostic("still-packed", text, notes=tuple(left)[:8], severity="warning", remedies=remedies)
    return frozenset(kept), (warning,)
