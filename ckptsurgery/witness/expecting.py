"""What a source says that each tensor of a model should hold, planned from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..catalog import load_recipe
from ..errors import Diagnostic, PlanError
from ..exchange.layouts import layout_on_disk
from ..language.dims import DimValue
from ..language.recipe import Recipe
from ..modeling.saved_names import saved_names
from ..planning.expanding import Stage
from ..planning.naming import below
from ..planning.options import PlanOptions
from ..planning.plan import Plan
from ..planning.planner import draft_plan, fitted
from ..planning.record import Target
from ..planning.stages import chained
from ..planning.steps import cut
from ..planning.unread import Unreadable
from ..planning.wrapping import draft_unwrapped
from ..running.model_loading import model_target
from ..running.source_notes import notes_of
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..transfer.aligning import own_names
from ..transfer.load_arguments import own_config, unused_dims

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Expectation", "expectation"]

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Expectation:
    """What a source says of a model.

    Args:
        plan: makes what can be compared, in the model's dtypes; `plan.casts` has the changes of dtype.
        made: model key -> what the source makes for it, before any cast.
        origins: model key -> the source keys behind it.
        misshapen: model key -> the shape that the source makes, where it is another.
        missing: model keys for which the source has nothing.
        tied: model key -> the key whose tensor it must be, as the recipe says.
        kept: model keys that are not looked at.
        unused: source keys that come to nothing in the model.
        counters: missing keys that old files leave out.
        notes: how the source's names were read.
    """

    plan: Plan
    made: Mapping[str, TensorSpec]
    origins: Mapping[str, tuple[str, ...]]
    misshapen: Mapping[str, tuple[int, ...]]
    missing: tuple[str, ...]
    tied: Mapping[str, str]
    kept: tuple[str, ...]
    unused: tuple[str, ...]
    counters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def target(self) -> Target:
        """The model, as the target of the plan."""
        return self.plan.target or Target({})


def expectation(
    model: nn.Module,
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    *,
    keep: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    dims: Mapping[str, DimValue] | None = None,
) -> Expectation:
    """Plan what a source says that a model should hold.

    Args:
        keep: module paths or keys that are not looked at.
        config: what `config.` means; the source's own by default, else the model's.

    Raises:
        RecipeError, PlanError, LoadError: the recipe does not fit the source, or the names can be read in two ways.
    """
    target = model_target(model)
    if config is None:
        config = checkpoint.config if checkpoint.config is not None else own_config(model)
    drafted, stage, notes = _drafted(model, checkpoint, recipe, target, config, dims)
    made = {key: spec for key, spec in drafted.specs.items() if key in target.specs}
    kept = {key for path in keep for key in below(path, target.specs)}
    kept |= {key for key in target.specs if any(init.pattern.match(key) is not None for init in stage.inits)}
    misshapen = {k: s.shape for k, s in made.items() if s.shape != target.specs[k].shape and k not in kept}
    wanted = {k: target.specs[k] for k in made if k not in kept and k not in misshapen}
    steps = [part for step in drafted.steps for part in cut(step, wanted)]
    # without the source's headers, no scale beside a code stands against its cast: the comparison tells of it
    draft = replace(drafted, steps=tuple(steps), specs={k: made[k] for k in wanted}, inits={}, ties={}, source={})
    plan = replace(fitted(draft, Stage(), Target(wanted), "model"), target=target, source=drafted.source)
    used = {source for step in drafted.steps for source in step.sources if any(k in made for k in step.targets)}
    proved = {key for pair in drafted.proofs for key in pair}
    tied = _recipe_ties(stage, made, target)
    shared = {n for names in target.ties if any(n in made for n in names) for n in names}
    missing = [k for k in target.specs if k not in made and k not in kept and k not in shared and k not in tied]
    counters = () if any(k.endswith(_COUNTER) for k in checkpoint) else [k for k in missing if k.endswith(_COUNTER)]
    return Expectation(
        plan,
        made,
        {k: step.sources for step in drafted.steps for k in step.targets if k in made},
        misshapen,
        tuple(k for k in missing if k not in set(counters)),
        tied,
        tuple(k for k in target.specs if k in kept),
        tuple(k for k in checkpoint if k not in used and k not in proved and k not in drafted.dropped),
        tuple(counters),
        tuple(notes),
    )


def _drafted(
    model: nn.Module,
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    target: Target,
    config: Mapping[str, Any] | None,
    dims: Mapping[str, DimValue] | None,
) -> tuple[Plan, Stage, list[str]]:
    unreadable = Unreadable(checkpoint.unreadable, refused=False)
    options = PlanOptions(config, dims or {}, ties=[tie.names for tie in checkpoint.ties])
    if recipe is not None:
        plan, stage = draft_unwrapped(
            checkpoint.specs, recipe, load_recipe, target, options, unreadable=unreadable, told_of=notes_of(checkpoint)
        )
        return plan, stage, []
    saved = saved_names(model)
    wanted = {saved.get(k, k): spec for k, spec in target.specs.items()}
    back = {name: key for key, name in saved.items()}
    first, notes = layout_on_disk(model, checkpoint.specs, wanted)
    problems: list[Diagnostic] = []
    if first is None:
        found = own_names(checkpoint.specs, wanted)
        plan = found.plan
        problems += unused_dims(dims)
    else:
        before, _ = draft_plan(checkpoint.specs, first, load_recipe, options=options, unreadable=unreadable)
        found = own_names(before.specs, wanted)
        plan = replace(chained(before, found.plan, problems), source=checkpoint.specs)
    problems += found.problems
    if problems:
        raise PlanError(problems)
    if back:
        plan = _renamed(plan, back)
    return plan, Stage(), [*notes, *found.notes]


def _renamed(plan: Plan, names: Mapping[str, str]) -> Plan:
    """The plan with other names for some of its targets: modules that save a tensor under another name."""
    steps = tuple(step._replace(targets=tuple(names.get(k, k) for k in step.targets)) for step in plan.steps)
    return replace(plan, steps=steps, specs={names.get(k, k): s for k, s in plan.specs.items()})


def _recipe_ties(stage: Stage, made: Mapping[str, TensorSpec], target: Target) -> dict[str, str]:
    found: dict[str, str] = {}
    for tie in stage.ties:
        for key in made:
            values = tie.value.match(key)
            alias = tie.pattern.spell_match(tie.value, values) if values is not None else None
            if alias is not None and alias in target.specs and alias not in made:
                found[alias] = key
    return found
