"""Wrapper segments inside of names: taken out where the other side shows the names without them.

A wrapper holds the module that it wraps and no other, so its segment is the only child of its parent, and taking it
out keeps all names apart. No list of wrappers is needed: the shape of the names finds the candidates, and the other
side decides which of them are taken out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations

__all__ = ["NUMBERS", "OnlyChildren", "Wrappers", "candidates", "may_replace"]

NUMBERS = re.compile(r"(?<![^.])[0-9]+(?![^.])")
"""Segments that are numbers."""
_MOST_TEMPLATES = 2000
_DEEPEST = 3  # wrapper segments in one name that are looked for at once
_LEADING = 3  # segments of a prefix that are left out of the comparison


@dataclass(frozen=True)
class Wrappers:
    """Names of the segments to take out, on either side."""

    source: frozenset[str] = frozenset()
    target: frozenset[str] = frozenset()

    def __or__(self, other: Wrappers) -> Wrappers:
        return Wrappers(self.source | other.source, self.target | other.target)


@dataclass
class OnlyChildren:
    """Where in the names of one side a segment stands alone below its parent.

    >>> names = OnlyChildren(["a.inner.w", "a.inner.b", "c.w"])
    >>> names.bare("a.inner.w", {"inner"}), names.bare("c.w", {"c"})
    ('a.w', 'c.w')
    """

    keys: Iterable[str]
    single: dict[str, str | None] = field(init=False)

    def __post_init__(self) -> None:
        self.single = {}
        for key in self.keys:
            at = -1
            while True:
                dot = key.find(".", at + 1)
                parent, child = key[: max(at, 0)], key[at + 1 : dot if dot >= 0 else None]
                if self.single.setdefault(parent, child) != child:
                    self.single[parent] = None
                if dot < 0:
                    break
                at = dot

    def places(self, segments: list[str]) -> list[int]:
        """Where a wrapper may stand: modules that are an only child, and no numbers."""
        return [
            at
            for at, segment in enumerate(segments[:-1])
            if not segment.isdigit() and self.single.get(".".join(segments[:at])) == segment
        ]

    def bare(self, key: str, names: Iterable[str]) -> str:
        """The key without the segments of these names, wherever they stand alone."""
        segments = key.split(".")
        if not names or not any(s in names for s in segments[:-1]):
            return key
        out = {at for at in self.places(segments) if segments[at] in names}
        return ".".join(s for at, s in enumerate(segments) if at not in out)


def candidates(
    source: OnlyChildren, target: OnlyChildren, left: Iterable[str], free: Iterable[str]
) -> Iterator[Wrappers]:
    """Names that may be wrappers', those that bring most names together first.

    Args:
        left: the source's keys that are not matched so far. free: the target's keys that nothing fills.
    """
    theirs: dict[str, list[tuple[int, frozenset[str]]]] = {}
    for segments, places in _templates(target, free):
        for text, cost, names in _variants(segments, places):
            theirs.setdefault(text, []).append((cost, names))
    votes: Counter[Wrappers] = Counter()
    for segments, places in _templates(source, left):
        found: dict[Wrappers, int] = {}
        for text, cost, names in _variants(segments, places):
            for other, across in theirs.get(text, ()):
                pair = Wrappers(names, across)
                found[pair] = min(cost + other, found.get(pair, cost + other))
        least = min(found.values(), default=0)
        votes.update(pair for pair, cost in found.items() if cost == least and pair != Wrappers())
    for pair, _ in votes.most_common(8):
        yield pair


def _templates(side: OnlyChildren, keys: Iterable[str]) -> Iterator[tuple[list[str], list[int]]]:
    """One key of each form, with the places where a wrapper may stand; numbers do not tell forms apart."""
    seen: dict[str, set[int]] = {}
    for key in keys:
        places = side.places(key.split("."))
        seen.setdefault(NUMBERS.sub("0", key), set()).update(places)
        if len(seen) > _MOST_TEMPLATES:
            break
    for text, found in seen.items():
        yield text.split("."), sorted(found)


def _variants(segments: list[str], places: list[int]) -> Iterator[tuple[str, int, frozenset[str]]]:
    """What a name is without a prefix and without some of its wrappers, how much is left out, and which names."""
    for start in range(min(_LEADING, len(segments) - 2) + 1 if len(segments) > 1 else 1):
        inner = [at for at in places[-8:] if at >= start]
        for many in range(min(_DEEPEST, len(inner)) + 1):
            for out in combinations(inner, many):
                text = ".".join(s for at, s in enumerate(segments) if at >= start and at not in out)
                # a prefix costs a little more: a wrapper in front is a prefix as well
                yield text, 2 * many + 3 * start, frozenset(segments[at] for at in out)


def may_replace(wrappers: Wrappers) -> bool:
    """Whether one wrapper may stand for another: two layers of different names are two layers, not two wrappers.

    A leading underscore is how wrappers name what they hold, so that it is nobody's own attribute.
    """
    names = wrappers.source | wrappers.target
    return not (wrappers.source and wrappers.target) or any(name.startswith("_") for name in names)
