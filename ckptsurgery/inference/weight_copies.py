"""Copies of a network beside it: averages of its weights, a teacher, an optimizer's moments.

Where the other side holds no copies, those of this one have no counterpart: targets are made of the originals.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from ..specs import TensorSpec
from .vocabulary import concepts, words

__all__ = ["copied_trees", "copies_in"]

_SEPARATORS = re.compile(r"[./]")
_BESIDE = frozenset(["m", "v", "1", "model", "module", "weights", "params", "exponential", "moving"])
_MANY = 0.5  # of the keys with such a word, at least this share must have an original


def copies_in(specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
    """Return the keys that name a copy, each with the key of the original; none where few have one.

    >>> spec = TensorSpec((4, 4), "F32")
    >>> keys = ("model.a.w", "model.b.w", "ema_model.a.w", "ema_model.b.w")
    >>> dict(copies_in(dict.fromkeys(keys, spec)))
    {'ema_model.a.w': 'model.a.w', 'ema_model.b.w': 'model.b.w'}
    """
    named = {key: spelled for key in specs if (spelled := _original(key))[1]}
    if not named:
        return {}
    originals = {_original(key)[0]: key for key in specs if key not in named}
    found = {
        key: originals[text]
        for key, (text, _) in named.items()
        if text in originals and specs[originals[text]].shape == specs[key].shape
    }
    return found if len(found) >= max(2, _MANY * len(named)) else {}


def copied_trees(copies: Collection[str]) -> list[str]:
    """Return the words that name the copies, the most frequent first."""
    seen = Counter(segment for key in copies for segment in _SEPARATORS.split(key) if _copied(segment))
    return [segment for segment, _ in seen.most_common()]


def _original(key: str) -> tuple[str, bool]:
    """The letters of a key without the words that name a copy, and whether there are such words."""
    found: list[str] = []
    copy = False
    for segment in _SEPARATORS.split(key):
        parts = [word for word in words(segment) if word not in ("model", "module")]
        if _copied(segment):
            copy = True
            parts = [word for word in parts if word not in _BESIDE and not _copied(word)]
        found += parts
    return "".join(found).replace("model", ""), copy


def _copied(segment: str) -> bool:
    return any(concept == "average" for concept, _ in concepts(segment))
