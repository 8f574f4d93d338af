"""Checks of a recipe's texts when it is made; they need no checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from ..errors import Diagnostic, RecipeError, Remedy
from ..wording import clipped
from .dims import DimValue
from .law import normalise, signature
from .rules import Rule, parse_pattern

__all__ = [
    "bad_dim",
    "bad_rest",
    "check_text",
    "law_breaks",
    "parsed_rule",
    "unbound_captures",
    "wrong_entries",
    "wrong_values",
]


def wrong_entries(name: str, value: object, kinds: type | tuple[type, ...], called: str) -> list[str]:
    """Return what is wrong with an argument that is a list, or a single entry.

    >>> wrong_entries("drop", ["a", 1], str, "key patterns")
    ['drop[1] = 1: drop is a list of key patterns']
    """
    told = f"{name} is a list of {called}"
    if isinstance(value, kinds):
        return []
    if isinstance(value, Mapping | str | bytes) or not isinstance(value, Iterable):
        return [f"{name} = {clipped(repr(value))}: {told}"]
    wrong = [(n, entry) for n, entry in enumerate(value) if not isinstance(entry, kinds)]
    return [f"{name}[{n}] = {clipped(repr(entry))}: {told}" for n, entry in wrong]


def wrong_values(name: str, value: object, kind: type, called: str) -> list[str]:
    """Return what is wrong with an argument that is a table by names, or None.

    >>> wrong_values("tie", {"a": 1}, str, "target key -> target key")
    ["tie['a'] = 1: tie is a table, target key -> target key"]
    """
    told = f"{name} is a table, {called}"
    if value is None:
        return []
    if not isinstance(value, Mapping):
        return [f"{name} = {clipped(repr(value))}: {told}"]
    wrong = [(key, one) for key, one in value.items() if not isinstance(key, str) or not isinstance(one, kind)]
    return [f"{name}[{clipped(repr(key))}] = {clipped(repr(one))}: {told}" for key, one in wrong]


def parsed_rule(rule: str | Rule, place: str | None, problems: list[Diagnostic]) -> Rule | None:
    """Return the rule that a text is, or None with its problems added."""
    if isinstance(rule, Rule):
        return rule
    try:
        return Rule.parse(rule, place)
    except RecipeError as error:
        problems.extend(error.diagnostics)
        return None


def check_text(
    text: str,
    place: str | None,
    problems: list[Diagnostic],
    parse: Callable[[str, str | None], object] = parse_pattern,
) -> None:
    """Add the problems of a text that does not parse."""
    try:
        parse(text, place)
    except RecipeError as error:
        problems.extend(error.diagnostics)


def unbound_captures(pairs: Mapping[str, str], place: str | None, table: str) -> list[Diagnostic]:
    """Captures of a [tie] or [same] that the key which is looked for does not bind."""
    found = []
    for alias, base in pairs.items():
        looked_for, spelled = (base, alias) if table == "tie" else (alias, base)
        names = [parse_pattern(text, place)[1].names for text in (looked_for, spelled)]
        for name in names[1]:
            if name not in names[0]:
                found.append(
                    Diagnostic(
                        "unbound-capture",
                        f"[{table}] '{alias}' = '{base}': nothing binds {{{name}}}",
                        place=place,
                        help=f"the captures of {spelled!r} stand in {looked_for!r} too",
                    )
                )
    return found


def bad_rest(rest: str | None, place: str | None) -> Diagnostic:
    """Return the diagnostic of a `rest` that is neither a word nor a fallback rule."""
    near = get_close_matches(str(rest), ("error", "keep", "drop"), 1)
    meant = (Remedy("rest", {str(rest): near}, kind="instead"),) if near else ()
    advice = '"error", "keep", "drop", or "{k...} -> x.{k...}"'
    return Diagnostic("bad-rest", f"rest = {rest!r}", place=place, remedies=meant, advice=advice)


def bad_dim(name: str, value: Any, place: str | None) -> Diagnostic:
    """Return the diagnostic of a value in `dims` that is neither a size nor an expression."""
    return Diagnostic(
        "bad-dim",
        f"dims.{name} = {value!r} is no size",
        place=place,
        help="a number, a list, a table by choice or index, or an expression such as config.num_attention_heads",
    )


def law_breaks(
    rules: Iterable[Rule], names: Mapping[str, Mapping[str, str]], dims: Mapping[str, DimValue]
) -> list[Diagnostic]:
    """Return the breaches of the law of a rule; a fragment (`rest=None`) is judged within its scope."""
    found: list[Diagnostic] = []
    numbers = dict.fromkeys(dims, 1)
    for rule in rules:
        try:
            spelled = normalise(rule, {n: pairs for n, pairs in names.items() if n in rule.names})
            sides = (
                [replace(t, pattern=t.pattern.bind(numbers)) for t in side]
                for side in (spelled.sources, spelled.targets)
            )
            sources, targets = map(tuple, sides)
            signature(replace(spelled, sources=sources, targets=targets))
        except RecipeError as error:
            # a name that dims may still settle is no contradiction yet
            found += [d for d in error.diagnostics if d.code != "unknown-dim"]
    return found
