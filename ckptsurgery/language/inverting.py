"""The symbolic inverse of a recipe, made of texts alone: no key and no size is known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

from ..errors import Diagnostic, RecipeError
from ..ops.base import Op, OpError
from ..ops.registry import find_op, make_op, op_names, undone_by_name
from .calls import Call, Value, parse_call
from .recipe import Recipe, Scope
from .rules import OpAlgebra, Rule, parse_made

__all__ = ["inverse"]


class RegisteredOps:
    """The op algebra of the registry."""

    def undo(self, call: Call) -> Call | None:
        """The call that undoes `call` but for rounding, None where nothing does."""
        op = _made(call)
        if op is None:
            return _undone_by_name(call)
        undone = op.inverse(None)
        return None if undone is None else parse_call(str(undone))

    def joins(self, call: Call) -> bool:
        """Whether the op takes or gives several tensors at once."""
        op = _made(call)
        return find_op(call.name).joins if op is None else op.joins


def _made(call: Call) -> Op | None:
    """The op of a call; None where an argument may be a name or a formula, whose number is not known here.

    Raises:
        RecipeError: no such op, or arguments that it does not take.
    """
    try:
        return make_op(call.name, call.args, dict(call.keywords))
    except OpError as error:
        if call.name in op_names() and any(map(_named, (*call.args, *(value for _, value in call.keywords)))):
            return None
        raise RecipeError(Diagnostic("bad-op", str(error), notes=(str(call),))) from None


def _named(value: Value) -> bool:
    return isinstance(value, str) or (isinstance(value, tuple) and any(map(_named, value)))


def _undone_by_name(call: Call) -> Call | None:
    """The inverse of an op over a name or a formula, itself over a formula."""
    undone = undone_by_name(call.name, call.args, dict(call.keywords))
    if undone is not None:
        return Call(undone[0], (), tuple(undone[1].items()))
    given = [str(value) for value in (*call.args, *(value for _, value in call.keywords))]
    sign = find_op(call.name).undone_by
    if sign is None or len(given) != 1:
        return None
    rest = given[0].removeprefix(sign)
    if rest != given[0] and (rest.isidentifier() or _enclosed(rest)):  # an inverse itself
        return parse_call(f"{call.name}({rest[1:-1] if _enclosed(rest) else rest})")
    return parse_call(f"{call.name}({sign}{rest if rest.isidentifier() else f'({given[0]})'})")


def _enclosed(text: str) -> bool:
    """Whether one pair of parentheses encloses all of a formula."""
    inside = text[1:-1]
    depths = list(accumulate({"(": 1, ")": -1}.get(character, 0) for character in inside))
    return text[:1] == "(" and text[-1:] == ")" and min(depths, default=0) >= 0


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
        drop=tuple(map(_pattern, recipe.init)),
        tie=recipe.same,
        same=recipe.tie,
        dims=recipe.dims,
        data=recipe.data,
        names={name: _swapped(name, pairs) for name, pairs in recipe.names.items()},
        rest=str(fallback.inverse(algebra)) if fallback else "error" if recipe.rest == "drop" else recipe.rest,
        scopes=[_scope(s, algebra) for s in recipe.scopes],
        carry=[*recipe.carry],
        carry_lost=recipe.carry_lost,
        summary=f"inverse of: {recipe.summary}" if recipe.summary else "",
        place=recipe.place,
    )


def _pattern(init: str) -> str:
    """The pattern of an entry of `[init]`, without axes and dtype."""
    optional, term, _ = parse_made(init)
    return ("? " if optional else "") + str(term.pattern)


def _scope(scope: Scope, ops: OpAlgebra) -> Scope:
    inner = inverse(scope.recipe, ops)
    turned = not scope.inverse if scope.use else False
    return replace(scope, recipe=inner, source=scope.target, target=scope.source, inverse=turned)


def _swapped(name: str, pairs: Mapping[str, str]) -> dict[str, str]:
    swapped = {target: source for source, target in pairs.items()}
    if len(swapped) < len(pairs):
        raise RecipeError(Diagnostic("not-invertible", f"names.{name} spells two sources alike"))
    return swapped
