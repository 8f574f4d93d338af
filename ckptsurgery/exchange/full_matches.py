"""Renames of whole keys, and whether one renames the result of another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..language.captures import Capture, Literal
from ..language.keys import KeyPattern
from .conversion_axes import NotSayable

__all__ = ["KeyRename", "in_order", "made_anew"]

Pieces = tuple[Literal | Capture, ...]
Letters = tuple[tuple[str, bool], ...]
_Walk = tuple[int, bool, frozenset[int], frozenset[int]]
_ANY, _IN_SEGMENT = "any", "in a segment"


@dataclass(frozen=True)
class KeyRename:
    """One rename of the keys that match a pattern."""

    source: Pieces
    target: Pieces

    def __str__(self) -> str:
        return f"{KeyPattern(self.source)} -> {KeyPattern(self.target)}"


def in_order(renames: Sequence[KeyRename]) -> list[KeyRename]:
    """Return renames in an order in which none renames what one before it made.

    The library applies them one after another, and all that match.

    Raises:
        NotSayable: two or more rename in a circle.
    """
    left, found = list(renames), list[KeyRename]()
    while left:
        free = next((a for a in left if not any(b != a and made_anew(a, b.source) for b in left)), None)
        if free is None:
            raise NotSayable(f"the result of '{left[0]}' would be renamed again")
        found.append(free)
        left.remove(free)
    return found


def made_anew(rename: KeyRename, other: Pieces) -> bool:
    """Whether some key matches a pattern once it is renamed, and did not before.

    A key that matched before is claimed by two rules, which the plan refuses. The two sides of the rename are read side
    by side, with the same letters for each capture; what the pattern has read of either is a set of its places. Beside
    a capture of whole segments, one of a single segment is taken for a number, and not for a word of the other pattern.
    """
    return any(_made_anew(rename, letters) for letters in _letters(other))


def _made_anew(rename: KeyRename, pattern: Letters) -> bool:
    alphabet = {letter for letter, _ in pattern if len(letter) == 1} | {".", "\0"}  # a zero is any other letter
    kinds, others = ([p for p in side if isinstance(p, Capture)] for side in (rename.target, rename.source))
    after = _by_capture(rename.target)
    aligned = kinds == others
    before = _by_capture(rename.source) if aligned else [""] * len(after)
    inside = {"0", "\0"} if any(c.rest for c in kinds) else alphabet - {".", "/"}
    start = _closed(pattern, {0})
    old = _read(pattern, start, before[0]) if aligned else frozenset[int]()
    seen, todo = set[_Walk](), [(0, False, old, _read(pattern, start, after[0]))]
    while todo:
        walk = number, begun, old, new = todo.pop()
        if walk in seen or not new:
            continue
        seen.add(walk)
        if number == len(kinds):
            if len(pattern) in new and len(pattern) not in old:
                return True
            continue
        for letter in alphabet if kinds[number].rest else inside:
            todo.append((number, True, _read(pattern, old, letter), _read(pattern, new, letter)))
        if begun:
            ends = _read(pattern, old, before[number + 1]), _read(pattern, new, after[number + 1])
            todo.append((number + 1, False, *ends))
    return False


def _by_capture(pieces: Pieces) -> list[str]:
    """The text before the first capture, between each two, and after the last."""
    found = [""]
    for piece in pieces:
        if isinstance(piece, Literal):
            found[-1] += piece.text
        else:
            found.append("")
    return found


def _letters(pieces: Pieces) -> Iterator[Letters]:
    """A pattern as letters, or classes of them, with whether each may come any number of times."""
    heads: list[Letters] = [()]
    for piece in pieces:
        if isinstance(piece, Literal):
            tails = [tuple((letter, False) for letter in piece.text)]
        elif piece.choices is not None:
            tails = [tuple((letter, False) for letter in text) for text in piece.choices]
        else:
            kind = _ANY if piece.rest else _IN_SEGMENT
            tails = [((kind, False), (kind, True))]
        heads = [head + tail for head in heads for tail in tails]
    yield from heads


def _read(pattern: Letters, places: frozenset[int], text: str) -> frozenset[int]:
    """The places of a pattern after some text."""
    for letter in text:
        places = _step(pattern, places, letter)
    return places


@lru_cache(maxsize=1 << 14)
def _step(pattern: Letters, places: frozenset[int], letter: str) -> frozenset[int]:
    found = set[int]()
    for place in places:
        if place < len(pattern) and _fits(pattern[place][0], letter):
            found.add(place if pattern[place][1] else place + 1)
    return _closed(pattern, found)


def _closed(pattern: Letters, places: set[int]) -> frozenset[int]:
    """Places with those behind what may be absent."""
    return frozenset(places | {p + 1 for p in places if p < len(pattern) and pattern[p][1]})


def _fits(kind: str, letter: str) -> bool:
    return kind in (_ANY, letter) or (kind == _IN_SEGMENT and letter not in "./")
