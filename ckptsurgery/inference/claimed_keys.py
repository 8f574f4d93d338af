"""What a pattern would claim of a side's keys, asked before it becomes a rule."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

__all__ = ["Book"]


class Book:
    """The source's keys, to see what a pattern would claim."""

    def __init__(self, keys: Sequence[str], spare: frozenset[str]) -> None:
        self.keys, self.spare = sorted(keys), spare
        self.cache: dict[str, frozenset[str]] = {}

    def claimed(self, pattern: str) -> frozenset[str]:
        """All keys that a pattern matches; its variables any number."""
        if pattern not in self.cache:
            text, head = re.compile(_regex(pattern)), re.split(r"[{\\]", pattern, maxsplit=1)[0]
            near = self.keys[bisect_left(self.keys, head) : bisect_right(self.keys, head + chr(0x10FFFF))]
            self.cache[pattern] = frozenset(k for k in near if text.fullmatch(k))
        return self.cache[pattern]


def _regex(pattern: str) -> str:
    parts = re.split(r"(\{[^{}]*\}|\\.)", pattern)
    return "".join(_part(p) for p in parts)


def _part(text: str) -> str:
    if text.startswith("\\"):
        return re.escape(text[1:])
    if not text.startswith("{"):
        return re.escape(text)
    inside = text[1:-1]
    if inside.endswith("..."):
        return r".+"
    if inside in ("l", "m"):
        return r"[^./]+"
    if ":" in inside and ".." not in inside:
        return "(?:" + "|".join(re.escape(c) for c in inside.split(":", 1)[1].split(",")) + ")"
    return r"\d+"
