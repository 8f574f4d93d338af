"""Which of the recipes that ship fit a checkpoint, by its headers alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..catalog import RequiredRules, list_recipes, load_recipe
from ..errors import Diagnostic, PlanError, RecipeError, Remedy
from ..language.captures import Literal
from ..language.keys import KeyPattern
from ..language.recipe import Recipe
from ..language.rules import Rule
from ..planning.options import LoadOptions, PlanOptions
from ..planning.plan import Plan
from ..planning.planner import draft_plan, make_plan
from ..planning.record import Target
from ..planning.settlement import Offer
from ..planning.settling import settle
from ..planning.steps import Step
from ..running.dequantising import dequantising_recipes, packed_in
from ..running.runner import as_target
from ..running.source_notes import notes_of
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from .load_arguments import tolerated_keys

__all__ = ["FittingRecipe", "fitting_recipe", "match_recipes"]

_ENOUGH = 0.5


def match_recipes(source: Any, target: Any = None, config: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Return the names of the built-in recipes that fit a checkpoint, best first.

    >>> import torch
    >>> match_recipes({"nobody.calls.it.so": torch.ones(1)})
    ()

    First those that turn quantised weights into floats, then those that plan without an error, then those that do once
    the keys they do not name are dropped and that name at least half of them; among equals the one whose rules claim
    most keys. Where the config's `model_type` is the family of some of them, recipes of other families are left out:
    they fit in names and shapes, and may order rows in another way. Only headers are read.

    Args:
        source: whatever `open` takes.
        target: what is to be filled, where that is known: a model, a checkpoint, specs.
        config: what `config.` means in the recipes; the source's own by default.
    """
    checkpoint = open_checkpoint(source)
    wanted = as_target(target)
    found: list[tuple[bool, float, bool, str]] = []
    types = _types(config if config is not None else checkpoint.config)
    for name in _candidates(checkpoint.specs, types):
        recipe = load_recipe(name)
        for whole in (True, False):
            plan = _planned(checkpoint, recipe if whole else recipe.replace(rest="drop"), wanted, config)
            share = _share(plan) if plan is not None else 0.0
            if share > (0.0 if whole else _ENOUGH):
                found.append((not whole, -share, _family(name) not in types, name))
                break
    names = [name for *_, name in sorted(found)]
    own = [name for name in names if _family(name) in types]
    packed = dequantising_recipes(checkpoint, packed_in(checkpoint), config)
    return tuple(dict.fromkeys((*packed, *(own or names))))


class FittingRecipe(NamedTuple):
    """A recipe that fills more of a model than its source does without one.

    Args:
        name: of the recipe. loaded: the number of the model's tensors that it fills. whole: whether nothing is then
            against the load.
    """

    name: str
    loaded: int
    whole: bool

    def diagnostic(self, loaded: int, size: int) -> Diagnostic:
        """Return the note that names the recipe.

        Args:
            loaded: the number of tensors that are filled without it, of `size`.
        """
        text = "a recipe that ships turns this source into this model"
        if not self.whole:
            text = f"a recipe that ships fills {self.loaded} of the model's {size} tensors, {loaded} fit without it"
        return Diagnostic("recipe-fits", text, remedies=(Remedy("recipe", self.name),), severity="note")


def fitting_recipe(
    checkpoint: Checkpoint,
    target: Target,
    options: LoadOptions,
    loaded: int,
    config: Mapping[str, Any] | None = None,
) -> FittingRecipe | None:
    """Return the recipe that fills most of a model, whatever the dtypes; None where none fills more than `loaded`.

    >>> fitting_recipe(open_checkpoint({}), Target({}), LoadOptions(), 0) is None
    True

    Args:
        options: what else the caller of the load asks for.
        loaded: the number of the model's tensors that the source fills without a recipe.
        config: the target's own, tried where the source's does not do.
    """
    known: list[Mapping[str, Any] | None] = [c for c in (checkpoint.config, config) if c is not None]
    types = _types(*known)
    tolerated = tolerated_keys(checkpoint, target.specs)
    options = replace(options, dtype="model", partial=False)
    found: list[FittingRecipe] = []
    for name in _candidates(checkpoint.specs, types):
        for one in known or [None]:
            try:
                told_of, recipe = notes_of(checkpoint), load_recipe(name)
                plan, stage = draft_plan(
                    checkpoint.specs, recipe, load_recipe, target, PlanOptions(one), told_of=told_of
                )
            except (PlanError, RecipeError):
                continue
            settled = settle(Offer(plan, stage, tolerated=tolerated, by_call=True), target, options)
            if any(_is_named(settled.plan, step) for step in settled.plan.steps):  # else any prefix would do as well
                found.append(FittingRecipe(name, len(settled.load), not settled.problems))
    more = [one for one in found if one.loaded > loaded]
    order = lambda one: (not one.whole, -one.loaded, _family(one.name) not in types, one.name)  # noqa: E731
    return min(more, key=order, default=None)


def _types(*configs: Mapping[str, Any] | None) -> set[str]:
    """The model types that configs name, spelled as families are."""
    found = (config.get("model_type") for config in configs if config is not None)
    return {one.replace("-", "_") for one in found if isinstance(one, str)}


def _family(name: str) -> str:
    return name.partition("/")[0]


def _candidates(keys: Iterable[str], types: Collection[str]) -> Iterator[str]:
    """Names of the recipes whose required rules may all match a key; those that fit all, of these model types alone.

    Planning one that does not fit takes up to 0.2 s, for diagnostics that are thrown away. A search for the literal
    text of its patterns takes 1 ms, and most recipes fail at their first rule.
    """
    text = "\n".join(["", *keys, ""])
    if text == "\n":
        return
    for name in list_recipes():
        required = RequiredRules.of(name)
        if required.fits_all and _family(name) not in types:
            continue
        if all(_may_match(term.pattern, text) for rule in map(Rule.parse, required.texts) for term in rule.sources):
            yield name


def _may_match(pattern: KeyPattern, text: str) -> bool:
    """Whether a pattern's literal parts are in the text, which has a line for each key."""
    inner = (piece.text for piece in pattern.pieces if isinstance(piece, Literal))
    return f"\n{pattern.prefix}" in text and f"{pattern.suffix}\n" in text and all(part in text for part in inner)


def _planned(
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: Target | None,
    config: Mapping[str, Any] | None,
    dtype: str = "lossless",
) -> Plan | None:
    try:
        return make_plan(
            checkpoint.specs,
            recipe if target is not None else _without_inits(recipe),
            load_recipe,
            target,
            PlanOptions(config if config is not None else checkpoint.config, dtype=dtype),
        )
    except (PlanError, RecipeError):
        return None


def _without_inits(recipe: Recipe) -> Recipe:
    """The recipe for a question that no target is there to answer: what is to be initialised does not count."""
    scopes = [type(s)(_without_inits(s.recipe), s.source, s.target, s.use, s.inverse, s.config) for s in recipe.scopes]
    return recipe.replace(init={}, scopes=scopes, stages=[_without_inits(stage) for stage in recipe.stages])


def _share(plan: Plan) -> float:
    """The share of the source's keys that a rule names; what falls to a `rest` does not count."""
    named = {key for step in plan.steps if _is_named(plan, step) for key in step.sources}
    named |= {key for key, line in plan.dropped.items() if not line.startswith("rest")}
    named |= {key for key, _ in plan.proofs}
    return len(named & plan.source.keys()) / len(plan.source) if plan.source else 0.0


def _is_named(plan: Plan, step: Step) -> bool:
    """Whether a rule names the step's sources; else they fell to a `rest`."""
    return not plan.uses[step.rules[0]].is_rest
