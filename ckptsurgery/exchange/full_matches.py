"""Renames of keys as regular expressions that match the whole key, and whether one renames the result of another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..language.captures import Capture, Literal
from .conversion_axes import NotSayable

__all__ = ["KeyRename", "in_order", "made_anew"]

Pieces = tuple[Literal | Capture, ...]
Letters = tuple[tuple[str, bool], ...]
_Walk = tuple[int, bool, frozenset[int], frozenset[int]]
_END = "(?!.)"  # a dollar sign would stay in the name when the library turns the rename round; a lookahead is taken out
_PLAIN = re.compile(r"[\w./-]*")
_ANY, _IN_SEGMENT = "any", "in a segment"


@dataclass(frozen=True)
class KeyRename:
    """One rename of the keys that match a pattern."""

    source: Pieces
    target: Pieces

    def patterns(self) -> tuple[str, str]:
        """Return a regular expression and its replacement, anchored where the key is.

        The library knows one group, and replaces the first place that reads as the match does. So the whole key is
        matched where the captures stay together; where text between them changes, the captures of whole segments at
        the ends are left out.

        Raises:
            NotSayable: captures in another order, or apart from one another; text that a pattern reads otherwise.
        """
        names = [c.name for c in self.source if isinstance(c, Capture)]
        if names != [c.name for c in self.target if isinstance(c, Capture)]:
            raise NotSayable("captures in another order, or of one side alone")
        if len(set(names)) < len(names):
            raise NotSayable("a capture given twice")
        open_start, open_end = (_rest(self.source, n) and _rest(self.target, n) for n in (0, -1))
        reason: NotSayable | None = None
        for start, end in ((False, False), (False, True), (True, False), (True, True)):
            if (start and not open_start) or (end and not open_end) or start + end >= len(self.source):
                continue
            try:
                return _anchored(self.source, self.target, start, end)
            except NotSayable as found:
                reason = found
        raise reason or NotSayable("captures in another order, or of one side alone")


def _rest(pieces: Pieces, at: int) -> bool:
    """Whether an end is a capture of whole segments."""
    piece = pieces[at] if pieces else None
    return isinstance(piece, Capture) and piece.rest


def _anchored(source: Pieces, target: Pieces, start: bool, end: bool) -> tuple[str, str]:
    """The patterns without the captures at the start, the end or both, which stay as they are."""
    source, target = (side[start : len(side) - end] for side in (source, target))
    (before, group, after), (other_before, other_group, other_after) = _split(source), _split(target)
    if [str(p) for p in group] != [str(p) for p in other_group]:
        raise NotSayable("text between two captures changes")
    held = "".join(_plain([p]) if isinstance(p, Literal) else _inner(p) for p in group)
    first, last = "" if start else "^", "" if end else _END
    left = f"{_plain(before)}({held}){_plain(after)}" if group else _plain(before)
    right = f"{_plain(other_before)}\\1{_plain(other_after)}" if group else _plain(other_before)
    return first + left + last, first + right + last


def _split(pieces: Pieces) -> tuple[Pieces, Pieces, Pieces]:
    """Split a key: before the first capture, from the first to the last, after the last."""
    at = [n for n, piece in enumerate(pieces) if isinstance(piece, Capture)]
    return (pieces[: at[0]], pieces[at[0] : at[-1] + 1], pieces[at[-1] + 1 :]) if at else (pieces, (), ())


def _plain(pieces: Sequence[Literal | Capture]) -> str:
    text = "".join(piece.text for piece in pieces if isinstance(piece, Literal))
    if not _PLAIN.fullmatch(text):
        raise NotSayable(f"a character in {text!r} that the library reads as a pattern")
    return text.replace(".", r"\.")


def _inner(capture: Capture) -> str:
    if capture.rest:
        return ".+"
    if capture.choices is not None:
        raise NotSayable(f"the choice {{{capture}}} beside another capture")
    return r"[^./]+"


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
            first = left[0]
            text = f"the result of '{_text(first.source)} -> {_text(first.target)}' would be renamed again"
            raise NotSayable(text)
        found.append(free)
        left.remove(free)
    return found


def _text(pieces: Pieces) -> str:
    return "".join(p.text if isinstance(p, Literal) else f"{{{p}}}" for p in pieces)


def made_anew(rename: KeyRename, other: Pieces) -> bool:
    """Whether some key matches a pattern once it is renamed, and did not before.

    A key that matched before is claimed by two rules, which the plan refuses. The two sides of the rename are read side
    by side, with the same letters for each capture; what the pattern has read of either is a set of its places. Beside
    a capture of whole segments, one of a single segment is taken for a number, and not for a word of the other pattern.
    """
    return any(_made_anew(rename, letters) for letters in _letters(other))


def _made_anew(rename: KeyRename, pattern: Letters) -> bool:
    alphabet = {letter for letter, _ in pattern if len(letter) == 1} | {".", "\0"}  # a zero is any other letter
    before, after = _by_capture(rename.source), _by_capture(rename.target)
    kinds = [p for p in rename.source if isinstance(p, Capture)]
    inside = {"0", "\0"} if any(c.rest for c in kinds) else alphabet - {".", "/"}
    start = _closed(pattern, {0})
    seen, todo = set[_Walk](), [(0, False, _read(pattern, start, before[0]), _read(pattern, start, after[0]))]
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
