"""Applies what a diagnostic offers, as data and without understanding it, and calls again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import ckptsurgery as cs

Arguments = dict[str, Any]
Recipes = ("recipe", "instead")


@dataclass(frozen=True)
class Case:
    """A call that fails with `code`, and what is right once each of the remedies is applied.

    Args:
        call: takes the arguments by name. arguments: makes them anew.
        right: holds of what the call returns, for each remedy in its order; of all, where it is one.
        blanks: the values that are left to the caller, by name.
    """

    code: str
    call: Callable[..., Any]
    arguments: Callable[..., Arguments]
    right: Callable[[Any], bool] | tuple[Callable[[Any], bool] | None, ...]
    blanks: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return f"{self.code} {self.note}".strip()


def plan(recipe: Any = None, **arguments: Any) -> dict[str, torch.Tensor]:
    """`cs.plan` and what it makes; a recipe by its parts."""
    made = cs.plan(recipe=cs.Recipe(**recipe) if isinstance(recipe, dict) else recipe, **arguments)
    if made.inits:
        return {**dict.fromkeys(made.inits), **{k: made.specs[k] for k in made.specs}}
    return made.state_dict()


def load(model: Any, recipe: Any = None, **arguments: Any) -> Any:
    """`cs.load_into`, and the model."""
    cs.load_into(model, recipe=cs.Recipe(**recipe) if isinstance(recipe, dict) else recipe, **arguments)
    return model


def filled(value: Any, blanks: Mapping[str, Any], name: str = "") -> Any:
    """A remedy's value with the blanks filled in."""
    if isinstance(value, Mapping):
        return {key: filled(one, blanks, key) for key, one in value.items()}
    return blanks[name] if value is None else value


def merged(old: Any, new: Any) -> Any:
    """An argument with what a remedy adds."""
    if isinstance(new, Mapping):
        old = {} if old is None else old if isinstance(old, Mapping) else dict.fromkeys(old, "default")
        return {**old, **new}
    if isinstance(new, list):
        old = [] if old is None else [old] if isinstance(old, str) else old
        return {**old, **dict.fromkeys(new, "default")} if isinstance(old, Mapping) else [*old, *new]
    return new


def replaced(tree: Any, wrong: str, right: str) -> Any:
    """The text exchanged wherever it is written."""
    if isinstance(tree, str):
        return right if tree == wrong else tree.replace(wrong, right)
    if isinstance(tree, Mapping):
        return {replaced(k, wrong, right): replaced(v, wrong, right) for k, v in tree.items()}
    return [replaced(v, wrong, right) for v in tree] if isinstance(tree, list | tuple) else tree


def applied(arguments: Arguments, remedy: cs.Remedy, blanks: Mapping[str, Any]) -> Arguments:
    """The arguments once a remedy was applied."""
    value, name = filled(remedy.value, blanks, remedy.argument), remedy.argument
    if remedy.kind == "before":
        eval(value, {"cs": cs, "model": arguments.get("model")})
        return arguments
    if remedy.kind == "instead":
        ((wrong, right),) = value.items()
        right = right if isinstance(right, str) else right[0]
        recipe = arguments.get("recipe")
        inside = isinstance(recipe, dict) and name in recipe
        home = recipe if inside else arguments
        assert name in home, f"{name} is no argument of the call: {sorted(home)}"
        home = {**home, name: replaced(home[name], wrong, right)}
        return {**arguments, "recipe": home} if inside else home
    if remedy.kind == "recipe" and name not in arguments:
        recipe = arguments["recipe"]
        recipe = recipe if isinstance(recipe, dict) else {"rules": recipe}
        return {**arguments, "recipe": {**recipe, name: merged(recipe.get(name), value)}}
    if name == "recipe" and isinstance(value, dict):
        return {**arguments, "recipe": value}
    return {**arguments, name: merged(arguments.get(name), value)}


def told(call: Callable[..., Any], arguments: Arguments) -> tuple[Any, tuple[cs.Diagnostic, ...]]:
    """What a call returns, or the diagnostics that it raises."""
    try:
        return call(**arguments), ()
    except cs.CkptSurgeryError as error:
        return None, error.diagnostics


def problem_of(case: Case, arguments: Arguments) -> cs.Diagnostic:
    """The diagnostic of a case's code."""
    _, found = told(case.call, arguments)
    with_remedies = [d for d in found if d.code == case.code and d.remedies]
    assert with_remedies, f"{case}: {[str(d) for d in found]}"
    return with_remedies[0]


def settled(case: Case, problem: cs.Diagnostic, number: int) -> Any:
    """The result once remedy `number` is applied, and the first one of whatever else comes up.

    Three rounds at most, and no diagnostic twice.
    """
    arguments = case.arguments()
    seen: set[str] = set()
    for _ in range(3):
        seen.add(str(problem))
        arguments = applied(arguments, problem.remedies[number], case.blanks)
        result, found = told(case.call, arguments)
        if not found:
            return result
        repeated = [str(d) for d in found if str(d) in seen]
        assert not repeated, repeated
        errors = [d for d in found if d.severity == "error" and d.remedies]
        assert errors, f"no remedy for {[str(d) for d in found]} after {problem.remedies[number]}"
        problem, number = errors[0], 0
    raise AssertionError(f"not settled in three rounds: {[str(d) for d in found]}")
