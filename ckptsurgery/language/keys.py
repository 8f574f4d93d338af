"""Key patterns: match a whole key, bind its captures, spell a key from bound captures.

Matching is by dynamic programming over (piece, position), never by regular expressions, so that no pattern is slow and
a key that can be read in two ways is found out. What a pattern is made of, and its grammar, stands in `captures`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import Diagnostic, RecipeError
from .captures import SEPARATORS, Capture, Literal, Piece, Span, escape, is_index, pattern_error, pieces_of

__all__ = ["Capture", "KeyPattern", "Literal", "Span", "escape", "is_index"]

_MOST_READINGS = 4096
_MOST_CAPTURES = 64


@dataclass(frozen=True)
class KeyPattern:
    """A pattern over whole keys.

    >>> pattern = KeyPattern.parse("layers.{i}.{p:q,k}_proj.{rest...}")
    >>> pattern.match("layers.07.q_proj.weight")
    {'i': '07', 'p': 'q', 'rest': 'weight'}
    >>> pattern.match("model.layers.7.q_proj.weight") is None
    True
    >>> pattern.spell({"i": "3", "p": "k", "rest": "a.b"})
    'layers.3.k_proj.a.b'
    >>> str(pattern)
    'layers.{i}.{p:q,k}_proj.{rest...}'
    """

    pieces: tuple[Piece, ...]
    _slots: tuple[Capture, ...] = field(init=False, repr=False, compare=False)
    _respelled: Mapping[Capture, Mapping[str, str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        slots = tuple(p for p in self.pieces if isinstance(p, Capture))
        object.__setattr__(self, "_slots", slots)
        object.__setattr__(self, "_respelled", _respelled(slots))

    @classmethod
    def parse(cls, text: str) -> KeyPattern:
        """Read a pattern.

        Raises:
            RecipeError: the text is no pattern; the diagnostic points at the place.
        """
        pattern = cls(tuple(pieces_of(text)))
        _check(pattern, text)
        return pattern

    @classmethod
    def literal(cls, key: str) -> KeyPattern:
        """The pattern that matches this one key."""
        return cls((Literal(key),))

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The captures, in the order in which they stand."""
        return self._slots

    @property
    def firsts(self) -> tuple[Capture, ...]:
        """The first capture of each name, whose spelling the name's values have."""
        return tuple({c.name: c for c in reversed(self._slots)}.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The captured names, each once."""
        return tuple(dict.fromkeys(n for c in self._slots for n in c.names))

    @cached_property
    def prefix(self) -> str:
        """The literal text that every matching key begins with."""
        return self.pieces[0].text if self.pieces and isinstance(self.pieces[0], Literal) else ""

    @cached_property
    def suffix(self) -> str:
        """The literal text that every matching key ends with."""
        return self.pieces[-1].text if self.pieces and isinstance(self.pieces[-1], Literal) else ""

    def match(self, key: str) -> dict[str, str] | None:
        """Bind the captures to the parts of `key`, or None when the whole key does not match.

        Raises:
            RecipeError: the key can be read in two ways; both are shown.
        """
        found = self.readings(key)
        if len(found) > 1:
            raise RecipeError(self.ambiguity(key, found))
        return found[0] if found else None

    def readings(self, key: str) -> list[dict[str, str]]:
        """The different ways, two at most, in which the whole key matches."""
        if not (key.startswith(self.prefix) and key.endswith(self.suffix)):
            return []
        if not self._slots:
            return [{}] if key == self.prefix else []
        found: list[dict[str, str]] = []
        for count, reading in enumerate(_Matcher(self.pieces, key, self._respelled).readings(0, 0)):
            merged = _merge(reading)
            if merged is not None and merged not in found:
                found.append(merged)
                if len(found) == 2:
                    break
            if count > _MOST_READINGS:
                raise RecipeError(Diagnostic("ambiguous-match", f"'{self}' reads {key[:80]!r} in too many ways"))
        return found

    def ambiguity(self, key: str, readings: list[dict[str, str]]) -> Diagnostic:
        """The diagnostic for a key that can be read in two ways."""
        shown = tuple(", ".join(f"{n} = {v[:200]!r}" for n, v in reading.items()) for reading in readings)
        return Diagnostic(
            "ambiguous-match",
            f"'{self}' can read {key[:200]!r} in two ways",
            notes=shown,
            help="give a capture its choices, or put a literal between them",
        )

    def spell(self, values: Mapping[str, str]) -> str:
        """The key for these values of the captures; a flat index goes by its joined name.

        A name that has several spellings here goes by the first of them.

        Raises:
            RecipeError: a sum over a value that is not an integer, or a sum that is negative.
        """
        return "".join(p.text if isinstance(p, Literal) else self._text(p, values[p.name]) for p in self.pieces)

    def spell_match(self, source: KeyPattern, values: Mapping[str, str]) -> str:
        """The key that goes with a match of another pattern: lists of choices of one name are paired by position.

        >>> left, right = KeyPattern.parse("{p:q,k}.{i:5,6}"), KeyPattern.parse("{p:a,b}.{i:1,2}")
        >>> right.spell_match(left, {"p": "k", "i": "5"})
        'b.1'

        Args:
            source: the other pattern, with lists of the same lengths. values: of its captures.

        Raises:
            RecipeError: as for `spell`.
        """
        theirs, ours = ({c.name: c.choices for c in one.firsts if c.choices} for one in (source, self))
        paired = {n: ours[n][theirs[n].index(values[n])] for n in theirs.keys() & ours.keys() & values.keys()}
        return self.spell({**values, **paired})

    def _text(self, capture: Capture, value: str) -> str:
        first = self._respelled.get(capture)
        return capture.spell(value if first is None else {v: own for own, v in first.items()}[value])

    def bind(self, numbers: Mapping[str, int]) -> KeyPattern:
        """The pattern with names from `dims` replaced by their numbers."""
        if not any(c.terms or c.span for c in self._slots):
            return self
        return KeyPattern(tuple(p.bind(numbers) if isinstance(p, Capture) else p for p in self.pieces))

    def prefixed(self, prefix: KeyPattern) -> KeyPattern:
        """This pattern behind another."""
        pieces = list(prefix.pieces)
        for piece in self.pieces:
            if pieces and isinstance(piece, Literal) and isinstance(pieces[-1], Literal):
                pieces[-1] = Literal(pieces[-1].text + piece.text)
            else:
                pieces.append(piece)
        return KeyPattern(tuple(pieces))

    def __str__(self) -> str:
        mark = "\\" if self.prefix.startswith("+") else ""
        return mark + "".join(f"{{{p}}}" if isinstance(p, Capture) else str(p) for p in self.pieces)


def _respelled(captures: tuple[Capture, ...]) -> dict[Capture, dict[str, str]]:
    """For captures that spell a name otherwise than the first one does: their choices -> those of the first."""
    first: dict[str, tuple[str, ...]] = {}
    found: dict[Capture, dict[str, str]] = {}
    for capture in captures:
        if capture.choices is None:
            continue
        others = first.setdefault(capture.name, capture.choices)
        if others != capture.choices and len(others) == len(capture.choices):
            found[capture] = dict(zip(capture.choices, others))
    return found


def _merge(reading: tuple[tuple[str, str], ...]) -> dict[str, str] | None:
    merged: dict[str, str] = {}
    for name, value in reading:
        if merged.setdefault(name, value) != value:
            return None
    return merged


class _Matcher:
    """Enumerates readings of one key; `dead` remembers what cannot be completed, so the search is polynomial."""

    def __init__(self, pieces: tuple[Piece, ...], key: str, respelled: Mapping[Capture, Mapping[str, str]]) -> None:
        self.pieces, self.key, self.respelled = pieces, key, respelled
        self.dead: set[tuple[int, int]] = set()

    def readings(self, piece: int, at: int) -> Iterator[tuple[tuple[str, str], ...]]:
        if piece == len(self.pieces):
            if at == len(self.key):
                yield ()
            return
        if (piece, at) in self.dead:
            return
        alive = False
        for end, bound in self.steps(self.pieces[piece], at):
            for tail in self.readings(piece + 1, end):
                alive = True
                yield bound + tail
        if not alive:
            self.dead.add((piece, at))

    def steps(self, piece: Piece, at: int) -> Iterator[tuple[int, tuple[tuple[str, str], ...]]]:
        key = self.key
        if isinstance(piece, Literal):
            if key.startswith(piece.text, at):
                yield at + len(piece.text), ()
        elif piece.choices is not None and piece.terms is None:
            for choice in piece.choices:
                if key.startswith(choice, at):
                    yield at + len(choice), ((piece.name, self.first(piece, choice)),)
        else:
            for end in self.ends(piece, at):
                value = piece.value_of(key[at:end])
                if value is not None:
                    yield end, ((piece.name, self.first(piece, value)),)

    def first(self, piece: Capture, value: str) -> str:
        return self.respelled[piece][value] if piece in self.respelled else value

    def ends(self, piece: Capture, at: int) -> Iterator[int]:
        key = self.key
        if piece.rest:
            if at == 0 or key[at - 1] in SEPARATORS:
                yield from (e for e in range(at + 1, len(key) + 1) if e == len(key) or key[e] in SEPARATORS)
            return
        for end in range(at, len(key)):
            if key[end] in SEPARATORS:
                break
            yield end + 1


def _check(pattern: KeyPattern, text: str) -> None:
    before: Piece | None = None
    for index, piece in enumerate(pattern.pieces):
        if isinstance(piece, Capture) and isinstance(before, Capture):
            raise pattern_error(
                text,
                text.find("}{"),
                f"{{{before}}} and {{{piece}}} with nothing between them",
                "a literal or a separator between two captures says where one ends",
            )
        if isinstance(piece, Capture) and piece.rest:
            after = pattern.pieces[index + 1] if index + 1 < len(pattern.pieces) else None
            glued = (isinstance(before, Literal) and before.text[-1] not in SEPARATORS) or (
                isinstance(after, Literal) and after.text[0] not in SEPARATORS
            )
            if glued:
                raise pattern_error(
                    text,
                    text.find(f"{{{piece}}}"),
                    f"{{{piece}}} takes whole segments, but is glued to text",
                    "a '.' or '/' stands on both of its sides",
                )
        before = piece
    if len(pattern.captures) > _MOST_CAPTURES:
        raise pattern_error(text, 0, f"a pattern of {len(pattern.captures)} captures; {_MOST_CAPTURES} are the limit")
    if not pattern.pieces:
        raise RecipeError(Diagnostic("bad-pattern", "an empty key pattern"))
