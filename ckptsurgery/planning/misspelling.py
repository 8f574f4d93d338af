"""Patterns that match nothing: the pattern that was probably meant, read off the keys that are there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

from ..errors import RecipeError, Remedy
from ..language.captures import escape
from ..language.grouping import group_keys
from ..language.keys import KeyPattern

__all__ = ["meant_instead", "nearest_pattern", "notation_advice"]

_SEPARATOR = re.compile(r"([./]+(?![^{]*\}))")
_FOREIGN = re.compile(r"\*|^\^|\$$|\(\.")  # globs and regular expressions
_LETTERS = "abcdefgh"
_ALIKE = 0.6  # of two segments, as difflib measures it; a transposed letter in five leaves 0.8
_MOST_GROUPS = 2048  # every one of them is compared


def nearest_pattern(pattern: KeyPattern, keys: Iterable[str]) -> KeyPattern | None:
    """The pattern with its misspelt segments as a key spells them, or with a prefix more or less; None if none is near.

    >>> str(nearest_pattern(KeyPattern.parse("h.{i}.mpl.{l}"), ["h.0.mlp.weight", "h.0.attn.weight"]))
    'h.{i}.mlp.{l}'
    >>> str(nearest_pattern(KeyPattern.parse("h.{i}.w"), ["module.h.0.w"]))
    'module.h.{i}.w'
    """
    parts = _SEPARATOR.split(str(pattern))
    best: tuple[float, KeyPattern] | None = None
    for group in group_keys(keys)[:_MOST_GROUPS]:
        key = group.keys[0]
        for score, text in _spellings(parts, _SEPARATOR.split(key)):
            if best is None or score > best[0]:
                found = _matching(text, key)
                best = (score, found) if found is not None else best
    return best[1] if best else None


def meant_instead(argument: str, text: str, pattern: KeyPattern, keys: Iterable[str]) -> tuple[Remedy, ...]:
    """What settles a pattern that matches nothing: the spelling that was meant, and the mark that allows it.

    Args:
        argument: the part of the recipe that the pattern is written in.
        text: the line that it is written in. keys: those that it may have meant.
    """
    optional = Remedy(argument, {text: f"? {text}"}, "may match nothing", kind="instead")
    known = list(keys)
    if "*" in str(pattern):
        captured = _captured(text)
        if any(map(KeyPattern.parse(captured.partition(" -> ")[0]).readings, known)):
            return (Remedy(argument, {text: captured}, kind="instead"), optional)
    found = nearest_pattern(pattern, known) if str(pattern) in text else None
    return (optional,) if found is None else (Remedy(argument, {str(pattern): str(found)}, kind="instead"), optional)


def notation_advice(pattern: KeyPattern) -> str | None:
    """How parts of a key are captured, for a pattern that is written as a regular expression or with stars."""
    if _FOREIGN.search(str(pattern)) is None:
        return None
    return "{x} captures one part of a key, {x...} one or more; globs and regular expressions are not used"


def _captured(text: str) -> str:
    """A line whose stars are captures: one at the end takes all that is left, each other one a part.

    >>> _captured("module.*.w.* -> *.w.*"), _captured("a.* -> *.*")
    ('module.{a}.w.{b...} -> {a}.w.{b...}', 'a.* -> *.*')
    """
    left, arrow, right = text.partition(" -> ")
    stars = left.count("*")
    if (arrow and right.count("*") != stars) or stars > len(_LETTERS):
        return text
    names = [f"{{{name}}}" for name in _LETTERS[:stars]]
    if left.endswith("*"):
        names[-1] = names[-1].replace("}", "...}")
    return arrow.join("".join(map("".join, zip(side.split("*"), [*names, ""]))) for side in (left, right) if side)


def _matching(text: str, key: str) -> KeyPattern | None:
    try:
        pattern = KeyPattern.parse(text)
        return pattern if pattern.readings(key) else None
    except RecipeError:
        return None


def _spellings(wanted: Sequence[str], key: Sequence[str]) -> Iterable[tuple[float, str]]:
    """Texts that match the key, with a score: how much of the pattern they keep."""
    if wanted[-1].endswith("...}") and len(key) > len(wanted):
        key = [*key[: len(wanted) - 1], "".join(key[len(wanted) - 1 :])]
    less = len(key) - len(wanted)
    if less == 0:
        yield from _corrected(wanted, key)
    elif less > 0 and all(map(_fits, wanted, key[less:])):
        yield len(wanted) / len(key), "".join([*map(escape, key[:less]), *wanted])
    elif less < 0 and all(map(_fits, wanted[-less:], key)):
        yield len(key) / len(wanted), "".join(wanted[-less:])


def _corrected(wanted: Sequence[str], key: Sequence[str]) -> Iterable[tuple[float, str]]:
    scores = [1.0 if _fits(w, k) else _likeness(w, k) for w, k in zip(wanted, key)]
    if min(scores) >= _ALIKE:
        texts = (w if score == 1 else escape(k) for w, k, score in zip(wanted, key, scores))
        yield sum(scores) / len(scores), "".join(texts)


def _likeness(wanted: str, segment: str) -> float:
    return 0.0 if "{" in wanted else SequenceMatcher(None, wanted, segment).ratio()


def _fits(wanted: str, segment: str) -> bool:
    if wanted == segment:
        return True
    try:
        return "{" in wanted and bool(KeyPattern.parse(wanted).readings(segment))
    except RecipeError:
        return False
