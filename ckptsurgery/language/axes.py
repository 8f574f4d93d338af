"""Axis lists: `[a (b c) ...]`, the names of a tensor's dimensions.

    list = "[" [dim (" " dim)*] "]"
    dim  = axis ["?"] | "(" axis+ ")" | "..."
    axis = name | name ":" marker | name ":" choice ("," choice)+ | integer

`rows:p` is an axis whose size is its own for each value of p. Sizes are solved in planning; here is text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import Diagnostic, RecipeError
from .captures import escape, unescape

__all__ = ["Axis", "AxisList", "Dim"]

_TOKEN = re.compile(r"\s*(\.\.\.|[()]|(?:\\.|[^\s()\\])+)")
_AXIS = re.compile(r"([^\W\d]\w*)(?::(.*))?\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Axis:
    """One elementary axis.

    Args:
        name: shared with the captures of the rule; for a literal size its digits.
        marker: the name on whose value the size depends (`rows:p`).
        choices: the choices of an axis that is itself a choice list.
        size: a literal size.
    """

    name: str
    marker: str | None = None
    choices: tuple[str, ...] | None = None
    size: int | None = None

    def __str__(self) -> str:
        if self.choices is not None:
            return f"{self.name}:" + ",".join(escape(c, first=False) for c in self.choices)
        return f"{self.name}:{self.marker}" if self.marker else self.name


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension of a tensor: an axis, several merged ones, or the dimensions that `...` stands for."""

    axes: tuple[Axis, ...] = ()
    optional: bool = False
    ellipsis: bool = False
    grouped: bool = False

    def __str__(self) -> str:
        if self.ellipsis:
            return "..."
        text = " ".join(map(str, self.axes))
        return (f"({text})" if self.grouped else text) + ("?" if self.optional else "")


@dataclass(frozen=True, slots=True)
class AxisList:
    """The dimensions of one tensor, outermost first.

    >>> axes = AxisList.parse("(g p rows:p) d ... y?")
    >>> [str(dim) for dim in axes.dims], axes.names
    (['(g p rows:p)', 'd', '...', 'y?'], ('g', 'p', 'rows', 'd', 'y'))
    >>> str(AxisList.parse("")), str(AxisList.parse("1 n (p:q,k,v d)"))
    ('[]', '[1 n (p:q,k,v d)]')
    """

    dims: tuple[Dim, ...]

    @classmethod
    def parse(cls, text: str) -> AxisList:
        """Read the text between the brackets.

        Raises:
            RecipeError: the text is no axis list.
        """
        dims = tuple(_dims(text))
        if sum(d.ellipsis for d in dims) > 1:
            raise _error(text, "'...' stands twice in one axis list")
        names = [a.name for d in dims for a in d.axes if a.size is None]
        for name in names:
            if names.count(name) > 1:
                raise _error(text, f"axis {name!r} stands twice in one list", "a diagonal is no move of data")
        return cls(dims)

    @property
    def axes(self) -> Iterator[Axis]:
        """The elementary axes, outermost first."""
        return (axis for dim in self.dims for axis in dim.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the axes that are no literal sizes."""
        return tuple(a.name for a in self.axes if a.size is None)

    @property
    def has_ellipsis(self) -> bool:
        """Whether `...` stands in it."""
        return any(d.ellipsis for d in self.dims)

    def __str__(self) -> str:
        return "[" + " ".join(map(str, self.dims)) + "]"


def _dims(text: str) -> Iterator[Dim]:
    tokens = [m.group(1) for m in _TOKEN.finditer(text)]
    group: list[Axis] | None = None
    for token in tokens:
        if token == "(":
            if group is not None:
                raise _error(text, "a group inside a group", "one level is enough: ((a b) c) is (a b c)")
            group = []
        elif token == ")":
            if not group:
                raise _error(text, "an empty group" if group is not None else "')' without '('")
            yield Dim(tuple(group), grouped=True)
            group = None
        elif token == "...":
            if group is not None:
                raise _error(text, "'...' cannot stand inside a group")
            yield Dim(ellipsis=True)
        elif group is not None:
            group.append(_axis(token, text))
        else:
            optional = token.endswith("?") and not token.endswith("\\?")
            yield Dim((_axis(token.removesuffix("?"), text),), optional=optional)
    if group is not None:
        raise _error(text, "a group that is never closed")


def _axis(token: str, text: str) -> Axis:
    if token.isdecimal() and len(token) > 18:
        raise _error(text, f"the size {token[:20]}… is too large")
    if token.isdecimal():
        return Axis(str(int(token)), size=int(token))
    match = _AXIS.match(token)
    if match is None:
        raise _error(text, f"{token!r} is no axis", "names, integers, '...', groups in parentheses, rows:p, p:q,k,v")
    name, domain = match.groups()
    if domain is None:
        return Axis(name)
    if "," in domain:
        return Axis(name, choices=tuple(unescape(c) for c in re.split(r"(?<!\\),", domain)))
    if not domain.isidentifier():
        raise _error(text, f"{token!r}: {domain!r} is no name", "rows:p takes its size by the value of p")
    return Axis(name, marker=domain)


def _error(text: str, message: str, help: str | None = None) -> RecipeError:
    return RecipeError(Diagnostic("bad-axes", f"{message} in [{text}]", help=help))
