"""The Python expressions that match the keys of a rule and spell those of its results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..language.captures import Capture, Literal
from .conversion_axes import NotSayable
from .exporting import RuleSide, regex_of

__all__ = ["matched", "raw", "spelled", "tables", "tuple_of", "value"]

Pieces = Iterable[Literal | Capture]


def matched(pieces: Pieces) -> str:
    """Return the condition that `key` is one of a pattern's, with `match` as the match.

    >>> from ..language.keys import KeyPattern
    >>> print(matched(KeyPattern.parse("h.{i}.w").pieces))
    match := re.fullmatch(r'h\\.(?P<i>[^./]+)\\.w', key)
    >>> print(matched(KeyPattern.parse("h.{i+1}.w").pieces))
    (match := re.fullmatch(r'h\\.(?P<i>0|[1-9][0-9]*)\\.w', key)) and int(match['i']) - 1 >= 0
    """
    listed = tuple(pieces)
    numeric = {c.name: c for c in listed if isinstance(c, Capture) and c.numeric}
    for name, first in numeric.items():
        if any(isinstance(c, Capture) and c.name == name and c != first for c in listed):
            raise NotSayable(f"the index {name!r} in two forms")
    found = f"match := re.fullmatch({raw(listed)}, key)"
    conditions = [one for capture in numeric.values() for one in _conditions(capture)]
    return " and ".join([f"({found})", *conditions]) if conditions else found


def raw(pieces: Pieces) -> str:
    """Return the regular expression of a pattern, as a raw string."""
    return "r" + repr(regex_of(pieces)).replace("\\\\", "\\")


def _conditions(capture: Capture) -> Iterator[str]:
    """What a number must satisfy beyond its digits."""
    scale, offset = capture.affine
    number = value(capture)
    if capture.terms is not None and abs(scale) != 1:
        yield f"{_shifted(f'int(match[{capture.name!r}])', -offset, grouped=True)} % {abs(scale)} == 0"
    if capture.choices is not None:
        yield f"{number} in {tuple(int(c) for c in capture.choices)}"
    elif capture.span is not None:
        yield f"{capture.span.first} <= {number} <= {capture.span.last}"
    elif capture.terms is not None:
        yield f"{number} >= 0"


def value(capture: Capture) -> str:
    """Return what a capture of the source binds, as an expression over `match`."""
    text = f"match[{capture.name!r}]"
    if capture.terms is None:
        return f"int({text})" if capture.span is not None else text
    scale, offset = capture.affine
    if scale == -1:
        return f"{offset} - int({text})"
    moved = _shifted(f"int({text})", -offset, grouped=scale != 1)
    return moved if scale == 1 else f"{moved} // {scale}"


def _shifted(text: str, by: int, grouped: bool = False) -> str:
    if by == 0:
        return text
    moved = f"{text} {'+' if by > 0 else '-'} {abs(by)}"
    return f"({moved})" if grouped else moved


def tuple_of(values: Sequence[str], empty: str = "()") -> str:
    """Return several values as one key of a dict."""
    if not values:
        return empty
    return "(" + ", ".join(values) + ("," if len(values) == 1 else "") + ")"


def tables(source: RuleSide, target: RuleSide) -> Iterator[str]:
    """Yield the tables of choices that are spelled otherwise in the target's key."""
    for (name, choices), table in _respelled(source, target).items():
        first = next(c for c in source.captures if c.name == name)
        piece = next(c for c in target.captures if (c.name, c.choices) == (name, choices))
        if first.numeric or piece.numeric:
            raise NotSayable(f"the choices of the index {{{piece}}}")
        yield f"    {table} = {dict(zip(first.choices or (), choices))!r}"


def _respelled(source: RuleSide, target: RuleSide) -> dict[tuple[str, tuple[str, ...]], str]:
    """Name and list of the target's captures that spell the source's choices otherwise -> the name of a table."""
    firsts = {c.name: c for c in reversed(source.captures)}
    found: dict[tuple[str, tuple[str, ...]], str] = {}
    for piece in target.captures:
        first = firsts.get(piece.name)
        if first is not None and first.choices and piece.choices and first.choices != piece.choices:
            more = sum(name == piece.name for name, _ in found)
            found.setdefault((piece.name, piece.choices), f"{piece.name}_names{more + 1 if more else ''}")
    return found


def spelled(source: RuleSide, target: RuleSide, named: bool = False) -> str:
    """Return the target's key as an f-string.

    Args:
        named: over the names of its captures, `i_`, in the place of `match`.
    """
    respelled = _respelled(source, target)
    firsts = {c.name: c for c in reversed(source.captures)}
    pieces = []
    for piece in target.pieces:
        if isinstance(piece, Literal):
            pieces.append(piece.text.replace("{", "{{").replace("}", "}}"))
            continue
        first = firsts.get(piece.name, piece)
        text = f"{piece.name}_" if named else value(first)
        table = respelled.get((piece.name, piece.choices or ()))
        if table is not None:
            text = f"{table}[{text}]"
        elif piece.terms is not None:
            text = _computed(piece, text if first.numeric and not named else f"int({text})")
        pieces.append(f"{{{text}}}")
    text = "".join(pieces)
    quote = '"""' if "'" in text and '"' in text else "'" if '"' in text else '"'
    return f"f{quote}{text}{quote}"


def _computed(capture: Capture, text: str) -> str:
    """A sum of the target over a bound value."""
    scale, offset = capture.affine
    if scale == -1:
        return f"{offset} - ({text})"
    return _shifted(text if scale == 1 else f"{scale} * ({text})", offset)
