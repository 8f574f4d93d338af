"""The base of all exports: the rules of a recipe one by one, and the refusal of what a target cannot say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TypeVar

from ..errors import Diagnostic, RecipeError
from ..language.axes import Axis
from ..language.captures import Capture, Literal
from ..language.keys import KeyPattern
from ..language.recipe import Recipe
from ..language.rules import Rule, Term
from .conversion_axes import NotSayable

__all__ = [
    "RuleSide",
    "each_rule",
    "each_target",
    "expanded",
    "filled",
    "regex_of",
    "side_of",
    "single",
    "spelled_choices",
]

T = TypeVar("T")
_SEGMENT = r"[^./]+"
_SEGMENTS = r".+"
_INDEX = r"0|[1-9][0-9]*"


@dataclass(frozen=True)
class RuleSide:
    """One side of a rule: its key as pieces, and for each dimension the names that make it up.

    Args:
        counts: axes that are lists of choices -> how many there are.
        optional: dimensions that may be absent, by the name of their axis.
    """

    pieces: tuple[Literal | Capture, ...]
    axes: tuple[tuple[str, ...], ...] | None
    counts: Mapping[str, int] = field(default_factory=dict)
    optional: tuple[str, ...] = ()

    @property
    def captures(self) -> list[Capture]:
        """The captures, in the order in which they stand."""
        return [piece for piece in self.pieces if isinstance(piece, Capture)]

    def without(self, name: str) -> RuleSide:
        """The side of the tensors that have no dimension of this axis."""
        return replace(self, axes=tuple(d for d in self.axes or () if d != (name,)), optional=())


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


def single(rule: Rule, computed: bool = False) -> tuple[RuleSide, RuleSide]:
    """Return the two sides of a rule with one term each and no ops.

    Args:
        computed: whether the target framework has computed indices, optional dimensions, and dimensions of size 1.

    Raises:
        NotSayable: it has more, or shares its keys with another rule.
    """
    if rule.sources[0].shared:
        raise NotSayable("it reads keys that another rule claims")
    found = list(each_target(rule, computed))
    if len(found) != 1:
        raise NotSayable("several terms on one side")
    return found[0]


def each_target(rule: Rule, computed: bool = False) -> Iterator[tuple[RuleSide, RuleSide]]:
    """Yield the source of a rule without ops with each of its targets: several hold the same.

    Args:
        computed: as for `single`.

    Raises:
        NotSayable: an op, several sources, a target that other rules make too.
    """
    if rule.before or rule.after:
        raise NotSayable(f"the op {(*rule.before, *rule.after)[0]}")
    if len(rule.sources) != 1:
        raise NotSayable("several terms on one side")
    if any(term.shared for term in rule.targets):
        raise NotSayable("a tensor that several rules make")
    source = side_of(rule.sources[0], computed)
    yield from ((source, side_of(term, computed)) for term in rule.targets)


def side_of(term: Term, computed: bool = False) -> RuleSide:
    """Return a term as pieces and axes.

    Args:
        computed: as for `single`.

    Raises:
        NotSayable: flat indices; sums and ranges in its key, optional or literal dimensions, unless `computed`.
    """
    for capture in term.pattern.captures:
        if capture.flat or ((capture.terms is not None or capture.span is not None) and not computed):
            raise NotSayable(f"the index {{{capture}}}")
    axes = None
    counts: dict[str, int] = {}
    optional: tuple[str, ...] = ()
    if term.axes is not None:
        for dim in term.axes.dims:
            if dim.optional and not computed:
                raise NotSayable(f"the optional dimension {dim}")
            if any(a.size is not None and not (computed and a.size == 1 and len(dim.axes) == 1) for a in dim.axes):
                raise NotSayable(f"the dimension {dim}")
            counts |= {a.name: len(a.choices) for a in dim.axes if a.choices is not None}
        optional = tuple(dim.axes[0].name for dim in term.axes.dims if dim.optional)
        axes = tuple(("...",) if d.ellipsis else tuple(map(_axis, d.axes)) for d in term.axes.dims)
    return RuleSide(tuple(term.pattern.pieces), axes, counts, optional)


def _axis(axis: Axis) -> str:
    return f"{axis.name}:{axis.marker}" if axis.marker else axis.name


def spelled_choices(source: RuleSide, target: RuleSide, names: Iterable[str]) -> Iterator[tuple[RuleSide, RuleSide]]:
    """Yield a rule once for each combination of choices of some captures, with these as literal text."""
    listed = [name for name in names if any(c.name == name and c.choices for c in source.captures)]
    spelled = []
    for name in listed:
        one, other = (_choices(side, name) for side in (source, target))
        spelled.append([(name, a, b) for a, b in zip(one, other or one)])
    for chosen in product(*spelled):
        left, right = source.pieces, target.pieces
        for name, a, b in chosen:
            left, right = filled(left, name, a), filled(right, name, b)
        yield replace(source, pieces=left), replace(target, pieces=right)


def expanded(source: RuleSide, target: RuleSide) -> Iterator[tuple[RuleSide, RuleSide]]:
    """Yield a rule once for each combination of the choices that both keys have."""
    both = {c.name for c in source.captures} & {c.name for c in target.captures}
    yield from spelled_choices(source, target, [c.name for c in source.captures if c.name in both and c.choices])


def _choices(side: RuleSide, name: str) -> tuple[str, ...]:
    return next((c.choices for c in side.captures if c.name == name and c.choices), ())


def filled(pieces: Iterable[Literal | Capture], name: str, text: str) -> tuple[Literal | Capture, ...]:
    """Return pieces with a capture replaced by text, neighbours made one."""
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
        inner = _SEGMENTS if piece.rest else _INDEX if piece.numeric else _SEGMENT
        if piece.choices is not None and piece.terms is None:
            inner = "|".join(map(re.escape, piece.choices))
        found.append(f"(?P={piece.name})" if piece.name in seen else f"(?P<{piece.name}>{inner})")
        seen.add(piece.name)
    return "".join(found)
