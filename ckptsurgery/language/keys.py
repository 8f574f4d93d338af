"""Key patterns: match a whole key, bind its captures, spell a key from bound captures.

    pattern = (literal | "{" capture "}")*
    capture = name                          a run of characters without "." or "/"
            | name ":" choice ("," choice)* one of these, in this order
            | name ":" number ".." number   an integer in a range, both ends included
            | name "..."                    one segment or more, bounded by separators
            | sum                           "i+16", "3-i", "2*i+1": an integer, shifted, reflected or counted in steps
            | "(" name name+ ")"            one flat index over several

Matching is by dynamic programming over (piece, position), never by regular expressions, so that no pattern is slow and
a key that can be read in two ways is found out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..errors import Diagnostic, RecipeError

__all__ = ["SEPARATORS", "Capture", "KeyPattern", "Literal", "Span", "escape", "is_index", "split_unescaped"]

SEPARATORS = "./"
_SPECIAL = re.compile(r"->|[{}\[\],|?\\]")
_NAME = re.compile(r"[^\W\d]\w*\Z")
_INDEX = re.compile(r"(0|[1-9][0-9]{0,17})\Z")  # longer runs of digits are names, such as hashes
_ATOM = r"(\d+|(\d+\s*\*\s*)?[^\W\d]\w*)"
_SUM = re.compile(rf"\s*[+-]?\s*{_ATOM}(\s*[+-]\s*{_ATOM})*\s*")
_MOST_READINGS = 4096
_MOST_CAPTURES = 64
_MOST_DIGITS = 18


def is_index(text: str) -> bool:
    """Whether a captured text is a number that can be computed with: digits, no leading zero."""
    return _INDEX.match(text) is not None


def escape(text: str) -> str:
    r"""A literal text as a pattern spells it.

    >>> escape("a[0]->b")
    'a\\[0\\]\\->b'
    """
    return _SPECIAL.sub(lambda m: "\\" + m.group(), text)


def unescape(text: str) -> str:
    """The literal text of a pattern's piece."""
    return re.sub(r"\\(->|.)", r"\1", text)


def split_unescaped(text: str, mark: str, depth_marks: str = "{}[]()") -> list[str]:
    r"""Split at `mark` where it stands outside of brackets and is not escaped.

    >>> split_unescaped("{p:q,k}.w, b\\,c", ",")
    ['{p:q,k}.w', ' b\\,c']
    """
    parts, start, at, depth = [], 0, 0, 0
    openers, closers = depth_marks[::2], depth_marks[1::2]
    while at < len(text):
        if text[at] == "\\":
            at += 3 if text.startswith("->", at + 1) else 2
            continue
        if depth == 0 and text.startswith(mark, at):
            parts.append(text[start:at])
            at += len(mark)
            start = at
            continue
        if text[at] in openers:
            depth += 1
        elif text[at] in closers:
            depth = max(0, depth - 1)
        at += 1
    parts.append(text[start:])
    return parts


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that stands in the key as it is."""

    text: str

    def __str__(self) -> str:
        return escape(self.text)


@dataclass(frozen=True, slots=True)
class Span:
    """An inclusive range of integers, `first..last`; ends may be sums over names from `dims` until they are bound."""

    first: int | str
    last: int | str

    def __contains__(self, value: int) -> bool:
        return int(self.first) <= value <= int(self.last)

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"


@dataclass(frozen=True, slots=True)
class Capture:
    """A hole in a key.

    Args:
        name: what rules and axes call it; for a flat index its names joined, `"(s b)"`.
        choices: the texts it may have, in order.
        span: the range its value may have.
        rest: whether it takes whole segments, one or more.
        terms: `(coefficient, atom)` pairs when it is a sum such as `{i+16}` or `{2*i+1}`; the atom that is no number and
            not in `dims` is `name`.
        flat: the names of a flat index, outermost first.
    """

    name: str
    choices: tuple[str, ...] | None = None
    span: Span | None = None
    rest: bool = False
    terms: tuple[tuple[int, int | str], ...] | None = None
    flat: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names it binds."""
        return self.flat or (self.name,)

    @property
    def numeric(self) -> bool:
        """Whether its text must be an integer for the pattern to match."""
        return self.span is not None or self.terms is not None or self.flat is not None

    def value_of(self, text: str) -> str | None:
        """The value that a piece of a key binds, or None when it cannot stand here."""
        if self.choices is not None:
            return text if text in self.choices else None
        if self.numeric:
            if not is_index(text):
                return None
            if self.terms is not None:
                scale, offset = self.affine
                value, over = divmod(int(text) - offset, scale)
                if value < 0 or over:
                    return None
                text = str(value)
            if self.span is not None and int(text) not in self.span:
                return None
        return text

    def spell(self, value: str) -> str:
        """The text in the key for a bound value."""
        if self.terms is None:
            return value
        scale, offset = self.affine
        number = scale * int(value) + offset
        if number < 0:
            raise RecipeError(Diagnostic("negative-index", f"{{{self}}} would be {number} for {self.name} = {value}"))
        return str(number)

    @property
    def affine(self) -> tuple[int, int]:
        """`(scale, offset)` of a bound sum: the key shows `scale * value + offset`."""
        scale, offset = 1, 0
        for s, atom in self.terms or ():
            if atom == self.name:
                scale = s
            else:
                offset += s * int(atom)
        return scale, offset

    def bind(self, numbers: Mapping[str, int]) -> Capture:
        """The capture with names from `dims` replaced by their numbers, in sums and ranges."""
        capture = self
        if capture.span is not None:
            first, last = (self._end(e, numbers) for e in (capture.span.first, capture.span.last))
            if first > last:
                raise RecipeError(Diagnostic("bad-pattern", f"{{{self}}}: the range {first}..{last} is empty"))
            capture = replace(capture, span=Span(first, last))
        if capture.terms is not None:
            names = [a for _, a in capture.terms if isinstance(a, str)]
            free = [n for n in names if n not in numbers] or names[:1]
            if len(free) != 1:
                raise RecipeError(
                    Diagnostic("unknown-dim", f"{{{self}}} has {len(free)} unknowns: {', '.join(free)}",
                               help=f"dims say which of them is a number: --dim {free[-1]}=…")
                )  # fmt: skip
            terms = tuple((s, a) if a == free[0] else _signed(s * int(numbers.get(str(a), a))) for s, a in capture.terms)
            capture = replace(capture, name=free[0], terms=terms)
        return capture

    def _end(self, end: int | str, numbers: Mapping[str, int]) -> int:
        total = 0
        for sign, atom in _atoms(str(end)):
            if isinstance(atom, str) and atom not in numbers:
                raise RecipeError(Diagnostic("unknown-dim", f"{{{self}}}: {atom!r} is not in dims", help=f"--dim {atom}=…"))
            total += sign * int(numbers.get(str(atom), atom))
        return total

    def __str__(self) -> str:
        if self.flat:
            return "(" + " ".join(self.flat) + ")"
        if self.terms is not None:
            text = "".join(("+" if s > 0 else "-") + (f"{abs(s)}*" if abs(s) > 1 else "") + str(a) for s, a in self.terms)
            return text.removeprefix("+")
        if self.rest:
            return self.name + "..."
        if self.choices is not None:
            return self.name + ":" + ",".join(escape(c) for c in self.choices)
        return f"{self.name}:{self.span}" if self.span is not None else self.name


Piece = Literal | Capture


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "_slots", tuple(p for p in self.pieces if isinstance(p, Capture)))

    @classmethod
    def parse(cls, text: str) -> KeyPattern:
        """Read a pattern.

        Raises:
            RecipeError: the text is no pattern; the diagnostic points at the place.
        """
        pattern = cls(tuple(_pieces(text)))
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
        for count, reading in enumerate(_Matcher(self.pieces, key).readings(0, 0)):
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
        shown = tuple(", ".join(f"{n} = {v!r}" for n, v in reading.items()) for reading in readings)
        return Diagnostic(
            "ambiguous-match", f"'{self}' can read {key!r} in two ways", notes=shown,
            help="give a capture its choices, or put a literal between them",
        )  # fmt: skip

    def spell(self, values: Mapping[str, str]) -> str:
        """The key for these values of the captures; a flat index goes by its joined name."""
        return "".join(p.text if isinstance(p, Literal) else p.spell(values[p.name]) for p in self.pieces)

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
        return "".join(f"{{{p}}}" if isinstance(p, Capture) else str(p) for p in self.pieces)


def _merge(reading: tuple[tuple[str, str], ...]) -> dict[str, str] | None:
    merged: dict[str, str] = {}
    for name, value in reading:
        if merged.setdefault(name, value) != value:
            return None
    return merged


class _Matcher:
    """Enumerates readings of one key; `dead` remembers what cannot be completed, so the search is polynomial."""

    def __init__(self, pieces: tuple[Piece, ...], key: str) -> None:
        self.pieces, self.key = pieces, key
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
        elif piece.choices is not None:
            for choice in piece.choices:
                if key.startswith(choice, at):
                    yield at + len(choice), ((piece.name, choice),)
        else:
            for end in self.ends(piece, at):
                value = piece.value_of(key[at:end])
                if value is not None:
                    yield end, ((piece.name, value),)

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


def _pieces(text: str) -> Iterator[Piece]:
    literal, at = "", 0
    while at < len(text):
        char = text[at]
        if char == "\\" and at + 1 < len(text):
            step = 3 if text.startswith("->", at + 1) else 2
            literal += text[at + 1 : at + step]
            at += step
        elif char == "{":
            end = _closing(text, at)
            if literal:
                yield Literal(literal)
                literal = ""
            yield _capture(text[at + 1 : end], text, at)
            at = end + 1
        elif char in "}[]":
            raise _error(text, at, f"a bare {char!r} in a key", f"\\{char} stands for the character itself")
        else:
            literal += char
            at += 1
    if literal:
        yield Literal(literal)


def _closing(text: str, start: int) -> int:
    at = start + 1
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        if text[at] == "{":
            raise _error(text, at, "a capture inside a capture")
        if text[at] == "}":
            return at
        at += 1
    raise _error(text, start, "a capture that is never closed")


def _capture(body: str, text: str, at: int) -> Capture:
    inner = body.strip()
    if inner.startswith("(") and inner.endswith(")"):
        names = tuple(inner[1:-1].split())
        if len(names) < 2 or not all(_NAME.match(n) for n in names) or len(set(names)) < len(names):
            raise _error(text, at, f"{{{body}}} is no flat index", "two names or more: {(stage block)}")
        return Capture("(" + " ".join(names) + ")", flat=names)
    if inner.endswith("...") and _NAME.match(inner[:-3]):
        return Capture(inner[:-3], rest=True)
    if _NAME.match(inner):
        return Capture(inner)
    name, colon, domain = inner.partition(":")
    if colon and _NAME.match(name.strip()):
        return _restricted(name.strip(), domain, text, at)
    if _SUM.fullmatch(inner) and not _too_long(inner):
        atoms = _atoms(inner)
        named = [str(a) for s, a in atoms if isinstance(a, str)]
        if named and all(s for s, _ in atoms):
            # which name is the capture and which a number is known once dims are; until then, the last minus or the first
            minus = [str(a) for s, a in atoms if isinstance(a, str) and s < 0]
            return Capture(minus[-1] if minus else named[0], terms=atoms)
    raise _error(text, at, f"{{{body}}} is no capture", "{i}, {p:q,k,v}, {i:0..7}, {i+16}, {3-i}, {2*i+1}, {(s b)} or {rest...}")


def _atoms(text: str) -> tuple[tuple[int, int | str], ...]:
    """The signed integers and names of a sum, names with their factors."""
    found = re.findall(r"([+-]?)\s*(?:(\d+)\s*\*\s*)?(\w+)", text)
    return tuple(
        (int(f"{sign}{factor or 1}"), int(atom) if atom.isdecimal() else atom) for sign, factor, atom in found
    )  # fmt: skip


def _too_long(text: str) -> bool:
    return any(len(digits) > _MOST_DIGITS for digits in re.findall(r"\d+", text))


def _signed(number: int) -> tuple[int, int]:
    return (-1, -number) if number < 0 else (1, number)


def _restricted(name: str, domain: str, text: str, at: int) -> Capture:
    ends = [e.strip() for e in domain.split("..")]
    if len(ends) == 2 and all(map(_SUM.fullmatch, ends)) and not _too_long(domain):
        first, last = (int(e) if e.isdecimal() else e for e in ends)
        if isinstance(first, int) and isinstance(last, int) and first > last:
            raise _error(text, at, f"the range {domain} is empty")
        return Capture(name, span=Span(first, last))
    if ".." in domain:
        raise _error(text, at, f"{domain!r} is no range", "two integers, or sums over names from dims: {i:0..n-1}")
    choices = tuple(unescape(c.strip()) for c in split_unescaped(domain, ",", ""))
    if len(set(choices)) < len(choices):
        raise _error(text, at, f"a choice stands twice in {{{name}:{domain}}}")
    return Capture(name, choices=choices)


def _check(pattern: KeyPattern, text: str) -> None:
    before: Piece | None = None
    for index, piece in enumerate(pattern.pieces):
        if isinstance(piece, Capture) and isinstance(before, Capture):
            raise _error(text, text.find("}{"), f"{{{before}}} and {{{piece}}} with nothing between them",
                         "a literal or a separator between two captures says where one ends")  # fmt: skip
        if isinstance(piece, Capture) and piece.rest:
            after = pattern.pieces[index + 1] if index + 1 < len(pattern.pieces) else None
            glued = (isinstance(before, Literal) and before.text[-1] not in SEPARATORS) or (
                isinstance(after, Literal) and after.text[0] not in SEPARATORS
            )
            if glued:
                raise _error(text, text.find(f"{{{piece}}}"), f"{{{piece}}} takes whole segments, but is glued to text",
                             "a '.' or '/' stands on both of its sides")  # fmt: skip
        before = piece
    if len(pattern.captures) > _MOST_CAPTURES:
        raise _error(text, 0, f"a pattern of {len(pattern.captures)} captures; {_MOST_CAPTURES} are the limit")
    if not pattern.pieces:
        raise RecipeError(Diagnostic("bad-pattern", "an empty key pattern"))


def _error(text: str, at: int, message: str, help: str | None = None) -> RecipeError:
    return RecipeError(Diagnostic("bad-pattern", message, notes=(text, " " * max(at, 0) + "^"), help=help))
