"""The recipe of last resort: rules key by key, of which those stay that plan together; the rest of the source dropped.

It always plans, whatever was found: a recipe without a rule, which drops everything, is its end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CkptSurgeryError, Diagnostic
from ..language.recipe import Recipe
from ..narrowing import present
from ..planning.plan import Plan
from ..planning.planner import make_plan
from ..specs import TensorSpec
from .atoms import atoms, escaped
from .drafts import unmerged
from .moves import TensorMove

__all__ = ["planned", "says", "surviving"]

_OPEN = "open: what is dropped found no place that the rules agree on"


def planned(
    source: Mapping[str, TensorSpec], parts: Mapping[str, Any]
) -> tuple[Recipe, Plan | None, tuple[Diagnostic, ...]]:
    """A recipe of these parts and its plan, or why it does not plan."""
    recipe = Recipe()
    try:
        recipe = Recipe(**parts)
        return recipe, make_plan(source, recipe, lambda name: recipe), ()
    except CkptSurgeryError as error:
        return recipe, None, tuple(error.diagnostics)


def says(plan: Plan, target: Mapping[str, TensorSpec], moves: Sequence[TensorMove], whole: bool = True) -> bool:
    """Whether a plan makes each tensor of what was found for it, and nothing that the target does not have.

    Args:
        whole: whether it has to make all that was found.
    """
    if any(k not in target or spec.shape != target[k].shape for k, spec in plan.specs.items()):
        return False
    made = {k: set(step.sources) for step in plan.steps for k in step.targets}
    if whole:
        return all(made.get(k) == set(move.sources) for move in moves for k in move.targets)
    found: dict[str, list[set[str]]] = defaultdict(list)
    for move in moves:
        for key in move.targets:
            found[key].append(set(move.sources))
    return all(sources in found[k] for k, sources in made.items())


def surviving(
    source: Mapping[str, TensorSpec],
    target: Mapping[str, TensorSpec],
    moves: Sequence[TensorMove],
    ties: Mapping[str, str],
) -> tuple[Recipe, Plan]:
    """A recipe that plans, with as many of the moves as go together, and with the rest of the source dropped."""
    never = lambda prefix: False  # noqa: E731
    draft = unmerged(atoms(moves, list(source), (never, never), lambda prefix, seen: tuple(seen)))

    def tried(rules: Sequence[str], **more: Any) -> tuple[Recipe, Plan | None]:
        parts: dict[str, Any] = {"rules": rules, "dims": draft.dims, "rest": "drop", "summary": _OPEN, **more}
        recipe, plan, _ = planned(source, parts)
        return recipe, plan if plan is not None and says(plan, target, moves, whole=False) else None

    def kept(rules: Sequence[str]) -> Sequence[str]:
        if tried(rules)[1] is not None:
            return rules
        if len(rules) < 2:
            return ()
        one, two = kept(rules[: len(rules) // 2]), kept(rules[len(rules) // 2 :])
        return (*one, *two) if tried((*one, *two))[1] is not None else max(one, two, key=len)

    rules = kept(draft.rules)
    recipe, found = tried(rules)
    plan = present(found, "the plan of surviving rules")  # without a rule, everything is dropped
    made = plan.specs
    tie = {escaped(k): escaped(v) for k, v in ties.items() if v in made and k not in made}
    dropped = [escaped(k) for k in plan.dropped]
    for more in ({"drop": dropped, "rest": "error", "tie": tie}, {"tie": tie}):
        spelled, again = tried(rules, **more)
        if again is not None:
            return spelled, again
    return recipe, plan
