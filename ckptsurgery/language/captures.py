"""The pieces of a key pattern, literals and captures, and how their text is read.

pattern = (literal | "{" capture "}")*
capture = name                          a run of characters without "." or "/"
        | name ":" choice ("," choice)* one of these, in this order
        | name ":" sum ".." sum         an integer in a range, both ends included
        | name "..."                    one segment or more, bounded by separators
        | sum                           "i+16", "3-i", "2*i+1": an integer, shifted, reflected, in steps
        | "(" name name+ ")"            one flat index over several
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..errors import Diagnostic, RecipeError, Remedy

__all__ = [
    "SEPARATORS",
    "Capture",
    "Literal",
    "Piece",
    "Span",
    "escape",
    "guarded",
    "is_index",
    "pattern_error",
    "pieces_of",
    "split_unescaped",
    "stripped",
    "unescape",
]

_SPECIAL = re.compile(r"->|[{}\[\],|?&\\]")


def escape(text: str, *, first: bool = True) -> str:
    r"""A literal text as a pattern spells it.

    >>> escape("a[0]->b"), escape("+a+b"), escape(" a")
    ('a\\[0\\]\\->b', '\\+a+b', '\\ a')

    Args:
        first: the text may begin or end a pattern, where a `+` is a mark, and spaces are not part of it.
    """
    spelled = _SPECIAL.sub(lambda m: "\\" + m.group(), text)
    if not first:
        return spelled
    return guarded("\\" + spelled if spelled.startswith("+") else spelled)


def unescape(text: str) -> str:
    """The literal text of a pattern's piece."""
    return re.sub(r"\\(->|.)", r"\1", text, flags=re.DOTALL)


def guarded(text: str) -> str:
    r"""A pattern's text with its outermost spaces escaped, since unescaped ones are not part of it.

    >>> guarded(" a b "), guarded(" "), guarded("a")
    ('\\ a b\\ ', '\\ ', 'a')
    """
    if text[-1:].isspace() and not _escaped(text[:-1]):
        text = f"{text[:-1]}\\{text[-1]}"
    return f"\\{text}" if text[:1].isspace() else text


def stripped(text: str) -> str:
    r"""The text without the spaces around it that are not escaped.

    >>> stripped(" a\\  "), stripped(" a ")
    ('a\\ ', 'a')
    """
    body = text.strip()
    return body + text[len(text.rstrip())] if _escaped(body) and len(text.rstrip()) < len(text) else body


def _escaped(before: str) -> bool:
    """Whether what follows this text is escaped."""
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


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


SEPARATORS = "./"
_NAME = re.compile(r"[^\W\d]\w*\Z")
_INDEX = re.compile(r"(0|[1-9][0-9]{0,17})\Z")  # longer runs of digits are names, such as hashes
_ATOM = r"(\d+|(\d+\s*\*\s*)?[^\W\d]\w*)"
_SUM = re.compile(rf"\s*[+-]?\s*{_ATOM}(\s*[+-]\s*{_ATOM})*\s*")
_MOST_DIGITS = 18


def is_index(text: str) -> bool:
    """Whether a captured text is a number that can be computed with: digits, no leading zero."""
    return _INDEX.match(text) is not None


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that stands in the key as it is."""

    text: str

    def __str__(self) -> str:
        return escape(self.text, first=False)


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
        choices: the texts it may have, in order; for a sum the values.
        span: the range its value may have.
        rest: whether it takes whole segments, one or more.
        terms: `(coefficient, atom)` pairs when it is a sum such as `{i+16}` or `{2*i+1}`; the atom that is no number
            and not in `dims` is `name`.
        flat: the names of a flat index, outermost first.
    """

    name: str
    choices: tuple[str, ...] | None = None
    span: Span | None = None
    rest: bool = False
    terms: tuple[tuple[int, int | str], ...] | None = None
    flat: tuple[str, ...] | None = None
    _texts: frozenset[str] = field(init=False, repr=False, compare=False)  # a list may have thousands of choices

    def __post_init__(self) -> None:
        object.__setattr__(self, "_texts", frozenset(self.choices or ()))

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
        return text if self.choices is None or text in self._texts else None

    def spell(self, value: str) -> str:
        """The text in the key for a bound value.

        Raises:
            RecipeError: a sum over a value that is not an integer, or a sum that is negative.
        """
        if self.terms is None:
            return value
        if not is_index(value):
            raise RecipeError(
                Diagnostic(
                    "not-a-number",
                    f"{{{self}}} computes with {value!r}, which is no number without leading zeros",
                    help=f"{{{self.name}}} alone hands any text on as it is",
                )
            )
        scale, offset = self.affine
        number = scale * int(value) + offset
        if number < 0:
            raise RecipeError(
                Diagnostic(
                    "negative-index",
                    f"{{{self}}} would be {number} for {self.name} = {value}",
                    help=_restricted_to(self.name, scale, offset),
                )
            )
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
                    Diagnostic(
                        "unknown-dim",
                        f"{{{self}}} has {len(free)} unknowns: {', '.join(free)}",
                        remedies=(Remedy.size(free[-1]),),
                        advice="dims say which of them is a number",
                    )
                )
            terms = tuple(
                (s, a) if a == free[0] else _signed(s * int(numbers.get(str(a), a))) for s, a in capture.terms
            )
            capture = replace(capture, name=free[0], terms=terms)
        return capture

    def _end(self, end: int | str, numbers: Mapping[str, int]) -> int:
        total = 0
        for sign, atom in _atoms(str(end)):
            if isinstance(atom, str) and atom not in numbers:
                text = f"{{{self}}}: {atom!r} is not in dims"
                raise RecipeError(Diagnostic("unknown-dim", text, remedies=(Remedy.size(atom),)))
            total += sign * int(numbers.get(str(atom), atom))
        return total

    def __str__(self) -> str:
        if self.flat:
            return "(" + " ".join(self.flat) + ")"
        if self.terms is not None:
            text = "".join(
                ("+" if s > 0 else "-") + (f"{abs(s)}*" if abs(s) > 1 else "") + str(a) for s, a in self.terms
            )
            return text.removeprefix("+")
        if self.rest:
            return self.name + "..."
        if self.choices is not None:
            # two dots would read as a range
            return (
                self.name
                + ":"
                + ",".join(re.sub(r"\.(?=\.)", r".\\", guarded(escape(c, first=False))) for c in self.choices)
            )
        return f"{self.name}:{self.span}" if self.span is not None else self.name


Piece = Literal | Capture


def pieces_of(text: str) -> Iterator[Piece]:
    """The pieces of a pattern's text.

    Raises:
        RecipeError: the text is no pattern; the diagnostic points at the place.
    """
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
            raise pattern_error(text, at, f"a bare {char!r} in a key", f"\\{char} stands for the character itself")
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
            raise pattern_error(text, at, "a capture inside a capture")
        if text[at] == "}":
            return at
        at += 1
    raise pattern_error(text, start, "a capture that is never closed")


def _capture(body: str, text: str, at: int) -> Capture:
    inner = stripped(body)
    if inner.startswith("(") and inner.endswith(")"):
        names = tuple(inner[1:-1].split())
        if len(names) < 2 or not all(_NAME.match(n) for n in names) or len(set(names)) < len(names):
            raise pattern_error(text, at, f"{{{body}}} is no flat index", "two names or more: {(stage block)}")
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
        if named and atoms == ((1, named[0]),):  # {+i} and {1*i} are {i}
            return Capture(named[0])
        if named and all(s for s, _ in atoms):
            # which name is the capture is known once dims are; until then, the last with a minus, or the first
            minus = [str(a) for s, a in atoms if isinstance(a, str) and s < 0]
            return Capture(minus[-1] if minus else named[0], terms=atoms)
    raise pattern_error(
        text, at, f"{{{body}}} is no capture", "{i}, {p:q,k,v}, {i:0..7}, {i+16}, {3-i}, {2*i+1}, {(s b)} or {rest...}"
    )


def _atoms(text: str) -> tuple[tuple[int, int | str], ...]:
    """The signed integers and names of a sum, names with their factors."""
    found = re.findall(r"([+-]?)\s*(?:(\d+)\s*\*\s*)?(\w+)", text)
    return tuple((int(f"{sign}{factor or 1}"), int(atom) if atom.isdecimal() else atom) for sign, factor, atom in found)


def _too_long(text: str) -> bool:
    return any(len(digits) > _MOST_DIGITS for digits in re.findall(r"\d+", text))


def _restricted_to(name: str, scale: int, offset: int) -> str | None:
    """The help for `scale * value + offset` below 0: the range of values for which it is not."""
    if scale < 0 and offset < 0:
        return None
    first, last = (-(offset // scale), 9999) if scale > 0 else (0, offset // -scale)
    return f"{{{name}:{first}..{last}}} in place of {{{name}}}, and a rule of their own, or a drop, for the other keys"


def _signed(number: int) -> tuple[int, int]:
    return (-1, -number) if number < 0 else (1, number)


def _restricted(name: str, domain: str, text: str, at: int) -> Capture:
    ends = [e.strip() for e in domain.split("..")]
    if len(ends) == 2 and all(map(_SUM.fullmatch, ends)) and not _too_long(domain):
        first, last = (int(e) if e.isdecimal() else e for e in ends)
        if isinstance(first, int) and isinstance(last, int) and first > last:
            raise pattern_error(text, at, f"the range {domain} is empty")
        return Capture(name, span=Span(first, last))
    if ".." in domain:
        raise pattern_error(
            text, at, f"{domain!r} is no range", "two integers, or sums over names from dims: {i:0..n-1}"
        )
    choices = tuple(unescape(stripped(c)) for c in split_unescaped(domain, ",", ""))
    if len(set(choices)) < len(choices):
        raise pattern_error(text, at, f"a choice stands twice in {{{name}:{domain}}}")
    return Capture(name, choices=choices)


def pattern_error(text: str, at: int, message: str, help: str | None = None) -> RecipeError:
    """The error for a place in a pattern."""
    return RecipeError(Diagnostic("bad-pattern", message, notes=(text, " " * max(at, 0) + "^"), help=help))
