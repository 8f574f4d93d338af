"""`carry`: the trees beside a model that follow its rules, as a recipe or a caller names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ..errors import Diagnostic, RecipeError, Remedy

__all__ = ["CARRY_LOST", "Carry", "as_carry", "check_carry_lost"]

Carry = str | Sequence[str] | Mapping[str, Sequence[str]]
"""Paths of trees; a mapping gives for each the keys of its parameters in its order, or nothing."""
CARRY_LOST = ("error", "drop")


def as_carry(carry: Carry | None) -> dict[str, tuple[str, ...]] | None:
    """Return paths with the keys of their parameters.

    >>> as_carry(["optimizer"]), as_carry({"optimizer": ["a.weight", "a.bias"]})
    ({'optimizer': ()}, {'optimizer': ('a.weight', 'a.bias')})

    Raises:
        RecipeError: neither texts nor lists of texts.
    """
    if carry is None:
        return None
    given: Any = {carry: ()} if isinstance(carry, str) else carry
    if not isinstance(given, Iterable):
        raise RecipeError(Diagnostic("bad-carry", f"carry = {given!r}", help='carry = ["optimizer", "ema"]'))
    pairs = dict(given) if isinstance(given, Mapping) else dict.fromkeys(given, ())
    for path, keys in pairs.items():
        texts = [path, *keys] if isinstance(keys, list | tuple) else [path, None]
        if not all(isinstance(text, str) and text for text in texts):
            shown = f"carry: {path!r} = {keys!r} is not a path with a list of keys"
            raise RecipeError(Diagnostic("bad-carry", shown, help='carry = ["optimizer", "ema"]'))
    return {path: tuple(keys) for path, keys in pairs.items()}


def check_carry_lost(word: str) -> str:
    """Return the word for state that cannot follow.

    Raises:
        RecipeError: another word than "error" and "drop".
    """
    if word not in CARRY_LOST:
        near = get_close_matches(str(word), CARRY_LOST, 1)
        raise RecipeError(
            Diagnostic(
                "bad-carry",
                f"carry_lost = {word!r} is neither 'error' nor 'drop'",
                remedies=(Remedy("carry_lost", {word: near}, kind="instead"),) if near else (),
                advice=None if near else '"drop" resets state that cannot follow',
            )
        )
    return word
