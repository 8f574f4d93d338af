"""Keys as the patterns of a rule that can be pasted: folded where the pattern names these keys and no others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from .folding import fold_groups
from .keys import KeyPattern, escape

__all__ = ["listed", "patterns_of"]

_MOST = 12


def patterns_of(keys: Sequence[str], known: Iterable[str]) -> list[str]:
    """Patterns that match these keys and none of the other known ones.

    >>> patterns_of(["h.0.w", "h.1.w"], ["h.0.w", "h.1.w", "h.x"]), patterns_of(["h.0.w"], ["h.0.w", "h.1.w"])
    (['h.{i}.w'], ['h.0.w'])
    """
    wanted = set(keys)
    others = [k for k in known if k not in wanted]
    found: list[str] = []
    left = list(dict.fromkeys(keys))
    for group in fold_groups(left):
        pattern = KeyPattern.parse(group.pattern)
        mine = [k for k in left if pattern.readings(k)]
        if mine and not any(pattern.readings(k) for k in others):
            found.append(group.pattern)
            left = [k for k in left if k not in set(mine)]
    return [*found, *map(escape, left)]


def listed(texts: Iterable[str]) -> str:
    """Texts as the inside of a Python list; the first dozen."""
    shown = list(islice(texts, _MOST + 1))
    return ", ".join(f'"{text}"' for text in shown[:_MOST]) + (", …" if len(shown) > _MOST else "")
