"""The names that the texts of a recipe speak of."""

from __future__ import annotations

import re

from ..language.keys import KeyPattern
from ..language.recipe import Recipe
from ..language.rules import parse_made, parse_pattern

__all__ = ["captured_by", "sizes_asked", "words_of_ops"]

_WORD = re.compile(r"[^\W\d]\w*")
_BRACKETS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)")


def sizes_asked(recipe: Recipe) -> set[str]:
    """Names that may stand for sizes: within the brackets of rules and patterns, and in the recipe's own dims."""
    texts = [str(r) for r in (*recipe.rules, *((recipe.fallback,) if recipe.fallback else ()))]
    texts += [*recipe.drop, *recipe.init, *recipe.tie, *recipe.tie.values(), *recipe.same, *recipe.same.values()]
    texts += [text for scope in recipe.scopes for text in (scope.source, scope.target)]
    inside = [found for text in texts for found in _BRACKETS.findall(text)]
    inside += [str(call) for rule in recipe.rules for call in (*rule.before, *rule.after)]
    inside += [value for value in recipe.init.values() if isinstance(value, str)]
    inside += map(str, recipe.config.set.values())
    return {*recipe.dims} | set(_WORD.findall(" ".join([*inside, *map(str, recipe.dims.values())])))


def words_of_ops(recipe: Recipe) -> set[str]:
    """All words among the arguments of ops; those of the scopes too."""
    calls = (call for rule in recipe.rules for call in (*rule.before, *rule.after))
    found = set(_WORD.findall(" ".join(map(str, calls))))
    for scope in recipe.scopes:
        found |= words_of_ops(scope.recipe)
    return found


def captured_by(recipe: Recipe) -> set[str]:
    """All names that the patterns of a recipe bind; those of its scopes too."""
    texts = (*recipe.drop, *recipe.tie, *recipe.tie.values(), *recipe.same, *recipe.same.values())
    rules = (*recipe.rules, *((recipe.fallback,) if recipe.fallback else ()))
    found = {n for rule in rules for n in rule.names} | {n for text in texts for n in parse_pattern(text)[1].names}
    found |= {n for text in recipe.init for n in parse_made(text)[1].pattern.names}
    for scope in recipe.scopes:
        prefixes = (p for p in (scope.source, scope.target) if p)
        found |= captured_by(scope.recipe) | {n for p in prefixes for n in KeyPattern.parse(p).names}
    return found
