"""Reads a recipe's text, which is TOML. Every key that is not known is an error with a suggestion."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import Diagnostic, RecipeError, Remedy
from .recipe import SCHEMA, Recipe, Scope
from .rules import Rule

__all__ = ["from_tree", "loads"]

_DEPTH = 64
_TOLD = 200  # problems that an error lists
_RECIPE: dict[str, Any] = {
    "rules": list,
    "drop": list,
    "init": dict,
    "tie": dict,
    "same": dict,
    "dims": dict,
    "data": dict,
    "names": dict,
    "rest": str,
    "config": dict,
    "scope": list,
    "then": list,
    "carry": list | dict,
    "carry_lost": str,
    "summary": str,
}
_OWN = ("drop", "init", "tie", "same", "dims", "data", "names", "config", "carry", "carry_lost", "summary")
# The config of a scope is a path, or edits, which may have the path among them.
_SCOPE: dict[str, Any] = {key: kind for key, kind in _RECIPE.items() if not key.startswith("carry")} | {
    "source": str,
    "target": str,
    "use": str,
    "inverse": bool,
    "config": str | dict,
}


def loads(text: str, place: str | None = None) -> Recipe:
    """Read a recipe.

    >>> loads('schema = 1\\nrules = ["a -> b"]').rules[0].targets[0].pattern.spell({})
    'b'

    Raises:
        RecipeError: all problems at once: bad TOML, unknown keys, texts that do not parse, a newer schema.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise RecipeError(Diagnostic("bad-toml", f"no TOML: {error}", place=place)) from None
    return _from_data(data, text, place)


def from_tree(tree: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a file that was parsed already, by a TOML or a JSON reader.

    >>> from_tree({"schema": 1, "rules": ["a -> b"]}) == loads('schema = 1\\nrules = ["a -> b"]')
    True

    Raises:
        RecipeError: as `loads`.
    """
    return _from_data(dict(tree), "", None)


def _from_data(data: dict[str, Any], text: str, place: str | None) -> Recipe:
    if _deeper(data, _DEPTH):
        raise RecipeError(Diagnostic("bad-toml", f"tables within tables, more than {_DEPTH} deep", place=place))
    if _too_large(data):
        raise RecipeError(Diagnostic("bad-toml", "a number beyond 64 bits", place=place))
    schema = data.pop("schema", SCHEMA)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise RecipeError(
            Diagnostic(
                "newer-schema",
                f"the recipe has schema {schema!r}, this version reads {SCHEMA}",
                place=place,
                help="pip install -U ckptsurgery",
            )
        )
    problems: list[Diagnostic] = []
    recipe = _Reader(text, place, problems).recipe(data, "error")
    if problems:
        raise RecipeError(problems)
    return recipe


def _deeper(data: Any, limit: int) -> bool:
    """Whether tables and lists nest deeper than `limit`; what follows may then recurse."""
    level = [data]
    for _ in range(limit):
        level = [part for node in level for part in _parts(node)]
        if not level:
            return False
    return True


def _too_large(node: Any) -> bool:
    """Whether an integer does not fit 64 bits; one of thousands of hexadecimal digits cannot even be shown."""
    if isinstance(node, dict | list):
        return any(map(_too_large, node.values() if isinstance(node, dict) else node))
    return isinstance(node, int) and node.bit_length() > 64


def _parts(node: Any) -> list[Any]:
    inside = node.values() if isinstance(node, dict) else node
    return [part for part in inside if isinstance(part, dict | list)]


class _Reader:
    def __init__(self, text: str, place: str | None, problems: list[Diagnostic]) -> None:
        self.whole, self.place, self.problems = text, place, problems
        self.at = self.line = self.misses = 0  # where the last rule was found, and how many lines lie before that

    def recipe(self, data: Mapping[str, Any], rest: str | None, inside: str = "") -> Recipe:
        known = self.checked(data, _SCOPE if inside == "scope" else _RECIPE, inside)
        rules = [r for text in known.get("rules", ()) if (r := self.rule(text)) is not None]
        scopes = [self.scope(s) for s in self.tables(known, "scope")]
        stages = [self.recipe(s, "error", "then") for s in self.tables(known, "then")]
        own = {k: v for k, v in known.items() if k in _OWN}
        texts = ("init", "tie", "same", "data")
        own.update({table: self.strings(own[table], table) for table in texts if table in own})
        own["names"] = {n: self.strings(pairs, f"names.{n}") for n, pairs in own.get("names", {}).items()}
        own["drop"] = [pattern for pattern in own.get("drop", ()) if self.text(pattern)]
        # what is wrong was told and is left out, so that the others are judged too
        try:
            return Recipe(rules, rest=known.get("rest", rest), scopes=scopes, stages=stages, place=self.place, **own)
        except RecipeError as error:
            self.problems.extend(error.diagnostics)
            return Recipe()

    def scope(self, data: Mapping[str, Any]) -> Scope:
        edits = data.get("config")
        path = edits.get("path") if isinstance(edits, dict) else edits
        if isinstance(edits, dict):
            edits = {word: part for word, part in edits.items() if word != "path"}
        apart = {key: value for key, value in data.items() if key != "config"}
        inner = self.recipe({**apart, "config": edits} if isinstance(edits, dict) else apart, None, "scope")
        if isinstance(path, str):
            data = {**data, "config": path}
        given = ("source", "target", "use", "inverse", "config")
        fields: dict[str, Any] = {
            k: data[k] for k in given if k in data and isinstance(data[k], _SCOPE[k]) and not isinstance(data[k], dict)
        }
        try:
            return Scope(inner, **fields)
        except RecipeError as error:
            self.problems.extend(replace(d, place=d.place or self.place) for d in error.diagnostics)
            return Scope(inner)

    def tables(self, data: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
        found = data.get(name, [])
        if not all(isinstance(t, dict) for t in found):
            self.problem("bad-recipe", f"{name!r} holds tables", f"[[{name}]]")
            return []
        return list(found)

    def strings(self, table: Any, name: str) -> dict[str, str]:
        """Those pairs of a table that are texts."""
        if not isinstance(table, dict):
            self.problem("bad-recipe", f"{name} = {table!r} is no table", f"[{name}]")
            return {}
        for key, value in table.items():
            if not isinstance(value, str):
                self.problem("bad-recipe", f"[{name}] {key!r} = {value!r} is no text", f'"{key}" = "…"')
        return {key: value for key, value in table.items() if isinstance(value, str)}

    def text(self, pattern: Any) -> bool:
        if not isinstance(pattern, str):
            self.problem("bad-recipe", f"drop holds {pattern!r}, which is no text", 'drop = ["a.{i}.b"]')
        return isinstance(pattern, str)

    def rule(self, text: Any) -> Rule | None:
        if not isinstance(text, str):
            self.problem("bad-recipe", f"{text!r} is no rule", '"SOURCE -> TARGET"')
            return None
        try:
            return Rule.parse(text, self.where(text))
        except RecipeError as error:
            self.problems.extend(error.diagnostics)
            return None

    def where(self, text: str) -> str | None:
        """`file:line` of a rule: the first line that holds its text."""
        if self.place is None:
            return None
        # Rules come in the order of the text: a search from the start for each would take forever for very many.
        spelled = json.dumps(text, ensure_ascii=False)[1:-1]
        for start in (self.at, 0) if self.misses < _TOLD else ():
            at = min((i for i in (self.whole.find(t, start) for t in (text, spelled)) if i >= 0), default=-1)
            if at >= 0:
                self.line = self.whole.count("\n", start, at) + (self.line if start else 0)
                self.at = at
                return f"{self.place}:{self.line + 1}"
        self.misses += 1
        return self.place

    def checked(self, data: Mapping[str, Any], known: Mapping[str, Any], inside: str) -> dict[str, Any]:
        good: dict[str, Any] = {}
        for key, value in data.items():
            if len(self.problems) >= _TOLD:
                break
            if key not in known:
                near = difflib.get_close_matches(key, [*known, "schema"], 1)
                meant = (Remedy("recipe", {key: near}, kind="instead"),) if near else ()
                advice = None if near else "known: " + ", ".join(known)
                text = f"a recipe has no {key!r}" + (f" in [[{inside}]]" if inside else "")
                self.problems.append(Diagnostic("unknown-key", text, self.place, remedies=meant, advice=advice))
            elif not isinstance(value, known[key]):
                self.problem("bad-recipe", f"{key} = {value!r}: a {_kind(known[key])} was expected")
            else:
                good[key] = value
        return good

    def problem(self, code: str, headline: str, help: str | None = None) -> None:
        self.problems.append(Diagnostic(code, headline, place=self.place, help=help))


def _kind(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else " or ".join(part.__name__ for part in kind.__args__)
