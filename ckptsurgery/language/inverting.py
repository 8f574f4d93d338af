"""The symbolic inverse of a recipe, made of texts alone: no key and no size is known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..errors import Diagnostic, RecipeError
from ..ops.registry import make_op
from .calls import Call, parse_call
from .recipe import Recipe, Scope
from .rules import OpAlgebra, Rule

__all__ = ["inverse"]


class RegisteredOps:
    """The op algebra of the registry."""

    def undo(self, call: Call) -> Call | None:
        """The call that undoes `call` but for rounding, None where nothing does."""
        undone = make_op(call.name, call.args, dict(call.keywords)).inverse(None)
        return None if undone is None else parse_call(str(undone))

    def joins(self, call: Call) -> bool:
        """Whether the op takes or gives several tensors at once."""
        return make_op(call.name, call.args, dict(call.keywords)).joins


def inverse(recipe: Recipe, ops: OpAlgebra | None = None) -> Recipe:
    """The recipe that leads back; see `Recipe.inverse`."""
    algebra = ops or RegisteredOps()
    if recipe.stages:
        first, *others = [inverse(r, algebra) for r in reversed((recipe.but(stages=()), *recipe.stages))]
        return first.but(stages=tuple(others))
    problems: list[Diagnostic] = []
    rules: list[Rule] = []
    for rule in recipe.rules:
        try:
            rules.append(rule.inverse(algebra))
        except RecipeError as error:
            problems.extend(error.diagnostics)
    if problems:
        raise RecipeError(problems)
    fallback = recipe.fallback
    return Recipe(
        rules=rules,
        drop=tuple(recipe.init),
        tie=recipe.same,
        same=recipe.tie,
        dims=recipe.dims,
        names={name: _swapped(name, pairs) for name, pairs in recipe.names.items()},
        rest=str(fallback.inverse(algebra)) if fallback else "error" if recipe.rest == "drop" else recipe.rest,
        scopes=[_scope(s, algebra) for s in recipe.scopes],
        summary=f"inverse of: {recipe.summary}" if recipe.summary else "",
        place=recipe.place,
    )


def _scope(scope: Scope, ops: OpAlgebra) -> Scope:
    inner = inverse(scope.recipe, ops)
    turned = not scope.inverse if scope.use else False
    return replace(scope, recipe=inner, source=scope.target, target=scope.source, inverse=turned)


def _swapped(name: str, pairs: Mapping[str, str]) -> dict[str, str]:
    swapped = {target: source for source, target in pairs.items()}
    if len(swapped) < len(pairs):
        raise RecipeError(Diagnostic("not-invertible", f"names.{name} spells two sources alike"))
    return swapped
