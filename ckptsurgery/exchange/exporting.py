"""What all exports have in common: the rules of a recipe one by one, and the refusal of what a target cannot say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TypeVar

from ..errors import Diagnostic, RecipeError
from ..language.axes import Axis
from ..language.captures import Capture, Literal
from ..language.keys import KeyPattern
from ..language.recipe import Recipe
from ..language.rules import Rule, Term
from .conversion_axes import NotSayable

__all__ = ["Side", "each_rule", "expanded", "regex_of", "side_of", "single", "spelled_choices"]

T = TypeVar("T")
_SEGMENT = r"[^./]+"
_SEGMENTS = r".+"


@dataclass(frozen=True)
class Side:
    """One side of a rule: its key as pieces, and for each dimension the names that make it up.

    Args:
        counts: axes that are lists of choices -> how many there are.
    """

    pieces: tuple[Literal | Capture, ...]
    axes: tuple[tuple[str, ...], ...] | None
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def captures(self) -> list[Capture]:
        """The captures, in the order in which they stand."""
        return [piece for piece in self.pieces if isinstance(piece, Capture)]


def each_rule(recipe: Recipe, target: str, said: Callable[[Rule, Recipe], T]) -> list[T]:
    """Return what `said` makes of each rule of a recipe that is one stage without scopes.

    Args:
        target: what the recipe is exported as, for the message.

    Raises:
        RecipeError: every rule and every part that the target cannot say, each with the reason.
    """
    problems: list[Diagnostic] = []
    parts = {"stages": recipe.stages, "scopes": recipe.scopes, "[init]": recipe.init, "[same]": recipe.same}
    problems += [_refused(target, f"its {name}", "no counterpart there") for name, part in parts.items() if part]
    if recipe.names:
        problems.append(_refused(target, "[names]", "no counterpart there"))
    if recipe.fallback is not None:
        problems.append(_refused(target, f"rest = {recipe.rest!r}", "no counterpart there"))
    made: list[T] = []
    for rule in recipe.rules:
        try:
            made.append(said(rule, recipe))
        except NotSayable as reason:
            problems.append(_refused(target, f"'{rule}'", str(reason)))
    if problems:
        raise RecipeError(problems)
    return made


def _refused(target: str, what: str, reason: str) -> Diagnostic:
    return Diagnostic("not-exportable", f"{target} cannot say {what}: {reason}")


def single(rule: Rule) -> tuple[Side, Side]:
    """Return the two sides of a rule with one term each and no ops.

    Raises:
        NotSayable: it has more.
    """
    if rule.before or rule.after:
        raise NotSayable(f"the op {(*rule.before, *rule.after)[0]}")
    if len(rule.sources) != 1 or len(rule.targets) != 1:
        raise NotSayable("several terms on one side")
    return side_of(rule.sources[0]), side_of(rule.targets[0])


def side_of(term: Term) -> Side:
    """Return a term as pieces and axes.

    Raises:
        NotSayable: sums, ranges or flat indices in its key, optional or literal dimensions, choices on an axis.
    """
    for capture in term.pattern.captures:
        if capture.flat or capture.terms is not None or capture.span is not None:
            raise NotSayable(f"the index {{{capture}}}")
    axes = None
    counts: dict[str, int] = {}
    if term.axes is not None:
        for dim in term.axes.dims:
            if dim.optional:
                raise NotSayable(f"the optional dimension {dim}")
            if any(a.size is not None for a in dim.axes):
                raise NotSayable(f"the dimension {dim}")
            counts |= {a.name: len(a.choices) for a in dim.axes if a.choices is not None}
        axes = tuple(("...",) if d.ellipsis else tuple(map(_axis, d.axes)) for d in term.axes.dims)
    return Side(tuple(term.pattern.pieces), axes, counts)


def _axis(axis: Axis) -> str:
    return f"{axis.name}:{axis.marker}" if axis.marker else axis.name


def spelled_choices(source: Side, target: Side, names: Iterable[str]) -> Iterator[tuple[Side, Side]]:
    """Yield a rule once for each combination of choices of some captures, with these as literal text."""
    listed = [name for name in names if any(c.name == name and c.choices for c in source.captures)]
    spelled = []
    for name in listed:
        one, other = (_choices(side, name) for side in (source, target))
        spelled.append([(name, a, b) for a, b in zip(one, other or one)])
    for chosen in product(*spelled):
        left, right = source.pieces, target.pieces
        for name, a, b in chosen:
            left, right = _filled(left, name, a), _filled(right, name, b)
        yield Side(left, source.axes, source.counts), Side(right, target.axes, target.counts)


def expanded(source: Side, target: Side) -> Iterator[tuple[Side, Side]]:
    """Yield a rule once for each combination of the choices that both keys have."""
    both = {c.name for c in source.captures} & {c.name for c in target.captures}
    yield from spelled_choices(source, target, [c.name for c in source.captures if c.name in both and c.choices])


def _choices(side: Side, name: str) -> tuple[str, ...]:
    return next((c.choices for c in side.captures if c.name == name and c.choices), ())


def _filled(pieces: Iterable[Literal | Capture], name: str, text: str) -> tuple[Literal | Capture, ...]:
    """Pieces with a capture replaced by text, neighbours made one."""
    found: list[Literal | Capture] = []
    for piece in pieces:
        one = Literal(text) if isinstance(piece, Capture) and piece.name == name else piece
        last = found[-1] if found else None
        if isinstance(one, Literal) and isinstance(last, Literal):
            found[-1] = Literal(last.text + one.text)
        else:
            found.append(one)
    return tuple(found)


def regex_of(pattern: KeyPattern | Iterable[Literal | Capture]) -> str:
    """Return a regular expression with a named group for each capture, for a full match."""
    pieces = pattern.pieces if isinstance(pattern, KeyPattern) else pattern
    seen: set[str] = set()
    found = []
    for piece in pieces:
        if isinstance(piece, Literal):
            found.append(re.escape(piece.text))
            continue
        inner = _SEGMENTS if piece.rest else _SEGMENT
        if piece.choices is not None:
            inner = "|".join(map(re.escape, piece.choices))
        found.append(f"(?P={piece.name})" if piece.name in seen else f"(?P<{piece.name}>{inner})")
        seen.add(piece.name)
    return "".join(found)
