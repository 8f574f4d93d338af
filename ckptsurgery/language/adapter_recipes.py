"""The recipe for low-rank pairs that belongs to a recipe for weights, rule by rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from ..errors import Diagnostic, RecipeError
from .adapter_rules import PairRules, pair_rules
from .rules import Rule

__all__ = ["adapters_of"]


class _RuleSet(Protocol):
    """The parts of a recipe that are read here; a recipe imports this module."""

    @property
    def rules(self) -> Sequence[Rule]: ...
    @property
    def fallback(self) -> Rule | None: ...
    @property
    def names(self) -> Mapping[str, Mapping[str, str]]: ...
    @property
    def rest(self) -> str | None: ...
    @property
    def scopes(self) -> Sequence[Any]: ...
    @property
    def stages(self) -> Sequence[Any]: ...
    @property
    def summary(self) -> str: ...
    def replace(self, **changes: Any) -> Any: ...


R = TypeVar("R", bound=_RuleSet)


def adapters_of(recipe: R, turned: str | None, prefix: str) -> R:
    """Return the recipe for pairs, as `Recipe.adapters` describes it.

    Raises:
        RecipeError: every rule that has none.
    """
    made = _AdapterRecipe(turned)
    stages = [stage for one in (recipe.replace(stages=()), *recipe.stages) for stage in made.stages(one)]
    if made.problems:
        raise RecipeError(made.problems)
    grown = [f"{target} {count} x" for target, count in made.growth.items()]
    told = f"; ranks and alpha grow: {', '.join(grown)}" if grown else ""
    whole = stages[0].replace(stages=tuple(stages[1:]), summary=f"low-rank pairs of: {recipe.summary}{told}")
    found: R = whole.scoped(source=prefix, target=prefix).replace(summary=whole.summary) if prefix else whole
    return found


@dataclass
class _AdapterRecipe:
    """Makes the recipe, and collects the rules that have none."""

    turned: str | None
    problems: list[Diagnostic] = field(default_factory=list)
    growth: dict[str, int] = field(default_factory=dict)

    def stages(self, recipe: Any) -> Iterator[Any]:
        """One recipe without stages as one or two for pairs: the second regroups the results of the first."""
        first, later = self.both(recipe)
        yield first
        if later.rules or later.scopes:
            yield later

    def both(self, recipe: Any) -> tuple[Any, Any]:
        """The rules that read the source's names, and those that go on from the names that these make."""
        found = [self.of_rule(rule, recipe) for rule in recipe.rules]
        inner = [(scope, *self.of_scope(scope)) for scope in recipe.scopes]
        bare = recipe.replace(drop=(), init={}, tie={}, same={}, data={}, carry={}, config=None, stages=(), summary="")
        first = bare.replace(
            rules=[text for one in found for text in one.rules],
            rest=self.rest(recipe),
            scopes=tuple(replace(scope, recipe=one) for scope, one, _ in inner),
        )
        after = [(scope, later.replace(rest=None)) for scope, _, later in inner if later.rules or later.scopes]
        later = bare.replace(
            rules=[text for one in found for text in one.later],
            names={},
            rest="keep",
            scopes=tuple(replace(scope, recipe=one, source=scope.target) for scope, one in after),
        )
        return first, later

    def of_rule(self, rule: Rule, recipe: _RuleSet) -> PairRules:
        """The rules for the pairs of one rule."""
        try:
            found = pair_rules(rule, recipe.names, self.turned)
        except RecipeError as error:
            self.problems += error.diagnostics
            return PairRules()
        self.growth |= found.growth
        return found

    def of_scope(self, scope: Any) -> tuple[Any, Any]:
        """The rules of a scope, likewise."""
        if scope.use is not None:
            text = f"the scope uses {scope.use!r} by name, which is read only when it is planned"
            self.problems.append(Diagnostic("no-adapter-rule", text, help="write its rules into the scope"))
        return self.both(scope.recipe)

    def rest(self, recipe: _RuleSet) -> str | None:
        """The fate of pairs that no rule names, which are never dropped."""
        if recipe.fallback is None:
            return "error" if recipe.rest == "drop" else recipe.rest
        rules = self.of_rule(recipe.fallback, recipe).rules
        return rules[0].removeprefix("? ") if len(rules) == 1 else "error"
