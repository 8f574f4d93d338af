"""Edits of the config that goes along with an output: fields to drop, to rename and to set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import Diagnostic, RecipeError

__all__ = ["ConfigEdits", "edits_of", "literal_of", "same_field"]

_WORDS = ("drop", "rename", "set")


@dataclass(frozen=True)
class ConfigEdits:
    """Edits of a config, in this order: fields are dropped, then renamed, then set. Paths are dotted.

    >>> edits = ConfigEdits(rename={"dim": "hidden_size"}, set={"heads": "g", "kind": "'a text'"})
    >>> edits.inverse()
    ConfigEdits(drop=(), rename={'hidden_size': 'dim'}, set={})

    Args:
        drop: fields that go.
        rename: old path -> new path; a field that is not there is none.
        set: path -> value. A text is an expression over names of `dims`, axes, captured indices and `config.…`; a
            literal text is in quotes of its own: `"'float16'"`.
    """

    drop: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.drop or self.rename or self.set)

    def __add__(self, other: ConfigEdits) -> ConfigEdits:
        """Both at once; where both set a field, the other's value counts."""
        drop = tuple(dict.fromkeys((*self.drop, *other.drop)))
        return ConfigEdits(drop, {**self.rename, **other.rename}, {**self.set, **other.set})

    def inverse(self) -> ConfigEdits:
        """The way back: renamed fields get their old names; dropped and set ones do not come back."""
        return ConfigEdits(rename={new: old for old, new in self.rename.items()})

    def plain(self) -> dict[str, Any]:
        """The table that a recipe's text holds."""
        parts = {"drop": list(self.drop), "rename": dict(self.rename), "set": dict(self.set)}
        return {word: part for word, part in parts.items() if part}


def edits_of(given: Mapping[str, Any] | ConfigEdits | None, place: str | None = None) -> ConfigEdits:
    """The edits of a table `[config]`.

    Raises:
        RecipeError: words that are not known, or values of another kind.
    """
    if given is None or isinstance(given, ConfigEdits):
        return given or ConfigEdits()
    problems = list(_problems(given))
    if problems:
        help = 'drop = ["a"], rename = { old = "new" }, set = { field = "an expression" }'
        raise RecipeError([Diagnostic("bad-recipe", f"[config] {text}", place, help=help) for text in problems])
    return ConfigEdits(tuple(given.get("drop", ())), dict(given.get("rename", {})), dict(given.get("set", {})))


def _problems(given: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"has no {word!r}" for word in given if word not in _WORDS)
    drop, rename = given.get("drop", ()), given.get("rename", {})
    if isinstance(drop, str) or not isinstance(drop, Sequence) or not all(isinstance(path, str) for path in drop):
        yield f"drop = {drop!r} is not a list of paths"
    if not isinstance(rename, Mapping) or not all(isinstance(new, str) for new in rename.values()):
        yield f"rename = {rename!r} is not a table of paths"
    if not isinstance(given.get("set", {}), Mapping):
        yield f"set = {given['set']!r} is not a table"


def literal_of(text: str) -> str | None:
    """The text within quotes of its own; None where there are none, and the text is an expression.

    >>> literal_of("'float16'"), literal_of("config.n")
    ('float16', None)
    """
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else None


def same_field(path: str, other: str) -> bool:
    """Return whether one path is the other, or is inside of it."""
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")
