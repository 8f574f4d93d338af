"""Wrapper prefixes around the names that a recipe speaks of: taken off where its rules and the target show it.

A recipe for a model's own names meets files and models that have a prefix before them all, `model.` or `module.`. As
it stands such a recipe makes nothing that the target wants. Each prefix of whole segments is tried; the one under
which the recipe holds, and makes most of what the target wants, is taken. Two that do so equally well are an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import Diagnostic, PlanError, Remedy
from ..language.keys import escape
from ..language.recipe import Recipe, Scope
from ..specs import TensorSpec
from ..wording import counted
from .expanding import Resolve, Stage
from .options import DEFAULTS, PlanOptions
from .plan import Plan
from .planner import draft_plan
from .record import Target
from .unread import Unreadable

__all__ = ["draft_unwrapped"]

Specs = Mapping[str, TensorSpec]
_DEEPEST = 4  # segments of a prefix
_LEAST_SHARE = 0.1  # of one side's keys that a prefix stands before


def draft_unwrapped(
    specs: Specs,
    recipe: Recipe,
    resolve: Resolve,
    target: Target | None = None,
    options: PlanOptions = DEFAULTS,
    *,
    unreadable: Unreadable | None = None,
) -> tuple[Plan, Stage]:
    """Draft a plan as `draft_plan` does, and where that makes nothing of the target, without wrapper prefixes.

    >>> spec = TensorSpec([2], "F32")
    >>> source = {"model.a.weight": spec, "model.b.weight": spec}
    >>> wanted = Target({"x.weight": spec, "y.weight": spec})
    >>> plan, _ = draft_unwrapped(source, Recipe(["a.{l} -> x.{l}", "b.{l} -> y.{l}"]), Recipe, wanted)
    >>> list(plan.specs), plan.warnings[0].headline
    (['x.weight', 'y.weight'], "prefix 'model.' taken off: the recipe's rules match the names without it")

    Raises:
        RecipeError, PlanError: as for `draft_plan`; and two prefixes that fit equally well.
    """
    try:
        drafted = draft_plan(specs, recipe, resolve, target, options, unreadable=unreadable)
    except PlanError as error:
        if target is None:
            raise
        failed: PlanError | None = error
    else:
        if target is None or _wanted(drafted[0], target):
            return drafted
        failed = None
    found: list[_Trial] = []
    nearest = failed
    for prefixes in _candidates(specs, target.specs):
        try:
            inside = replace(unreadable, prefix=prefixes.source) if unreadable is not None else None
            plan, stage = draft_plan(specs, prefixes.around(recipe), resolve, target, options, unreadable=inside)
        except PlanError as error:
            if nearest is not None and _unused(error) < _unused(nearest):
                nearest = PlanError([*error.diagnostics, prefixes.note])
            continue
        if reached := _wanted(plan, target):
            found.append(_Trial(prefixes, plan, stage, reached))
    if found:
        return _best(found)
    if nearest is not None:
        raise nearest
    return drafted


def _best(found: Sequence[_Trial]) -> tuple[Plan, Stage]:
    """The trial that makes most of the target, under the shortest prefixes.

    Raises:
        PlanError: two make as much of it, of different keys.
    """
    best = max(found, key=lambda t: (t.reached, -len(t.prefixes.source) - len(t.prefixes.target)))
    rivals = [t for t in found if t.reached == best.reached and t.moves != best.moves]
    if rivals:
        raise PlanError(_ambiguous([best, *rivals]))
    return replace(best.plan, warnings=(*best.plan.warnings, best.prefixes.note)), best.stage


@dataclass(frozen=True)
class _Prefixes:
    """What stands before all names that a recipe speaks of, on either side."""

    source: str
    target: str

    def around(self, recipe: Recipe) -> Recipe:
        """The recipe for the names with the prefixes: first they are taken off, and put on where they are wanted."""
        inner = recipe.scoped(target=escape(self.target)) if self.target else recipe
        if not self.source:
            return inner
        bare = Scope(Recipe(rest="keep"), source=escape(self.source))
        return Recipe(rest="keep", scopes=[bare]).then(inner)

    @property
    def note(self) -> Diagnostic:
        """What was done, for people."""
        return Diagnostic("wrapper-prefix", str(self), severity="note")

    def __str__(self) -> str:
        if not self.target:
            return f"prefix {self.source!r} taken off: the recipe's rules match the names without it"
        put = f"prefix {self.target!r} put on what the recipe makes: the target shows it"
        return put if not self.source else f"prefix {self.source!r} taken off, and {put}"


@dataclass(frozen=True)
class _Trial:
    prefixes: _Prefixes
    plan: Plan
    stage: Stage
    reached: int

    @property
    def moves(self) -> dict[str, tuple[str, ...]]:
        """Which source keys make each target key."""
        return {key: step.sources for step in self.plan.steps for key in step.targets}


def _unused(error: PlanError) -> int:
    """How many patterns of the recipe match nothing."""
    return sum(problem.code.startswith("unused") for problem in error.diagnostics)


def _wanted(plan: Plan, target: Target) -> int:
    return sum(key in target.specs for key in plan.specs)


def _candidates(source: Specs, target: Specs) -> Iterator[_Prefixes]:
    before = ["", *_prefixes(source)]
    # a wrapper around the target stands before all of it
    around = ["", *(p for p in _prefixes(target) if all(k.startswith(p) for k in target))]
    for b in around:
        for a in before:
            if a or b:
                yield _Prefixes(a, b)


def _prefixes(keys: Iterable[str]) -> list[str]:
    """Prefixes of whole segments, none of them a number, that stand before a good part of the keys."""
    counts: Counter[str] = Counter()
    total = 0
    for key in keys:
        total += 1
        segments = key.split(".")[:-1]
        for n, segment in enumerate(segments[:_DEEPEST]):
            if segment.isdigit():
                break
            counts[".".join(segments[: n + 1]) + "."] += 1
    return [p for p, n in counts.items() if n >= _LEAST_SHARE * total]


def _ambiguous(found: Sequence[_Trial]) -> Diagnostic:
    notes = tuple(
        f"{t.prefixes.source or t.prefixes.target}  makes {counted(t.reached, 'key')} of the target" for t in found
    )
    named = next((t.prefixes.source for t in found if t.prefixes.source), "")
    return Diagnostic(
        "ambiguous-prefix",
        f"the recipe fits {len(found)} parts of the source equally well",
        notes=notes,
        remedies=(Remedy("subtree", named.rstrip(".")),) if named else (),
        advice=None if named else "name the keys in the recipe with their prefix",
    )
