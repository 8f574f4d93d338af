"""Domains: the values that a captured name may have, known wherever the name occurs in a rule.

A list (`{i:1,3}`) or a range (`{i:0..7}`) may be written at one occurrence only. `{i}`, `{i+10}` and `{3-i}` at other
occurrences have the same domain: they match and spell its values, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import Diagnostic, RecipeError
from .axes import Axis, AxisList
from .keys import Capture, KeyPattern, Literal, Span, is_index
from .law import normalise
from .rules import Rule, Term

__all__ = ["numbers_of", "with_domains", "with_domains_of_both"]

Spelling = tuple[str, ...]


def with_domains(rule: Rule) -> Rule:
    """The rule with the domain of each name at all of its captures.

    >>> rule = with_domains(Rule.parse("l.{i:1,3}.w -> x.{i+10}.w"))
    >>> rule.targets[0].pattern.match("x.13.w"), rule.targets[0].pattern.match("x.12.w")
    ({'i': '3'}, None)

    Args:
        rule: normalised, with the names from `dims` in sums and ranges bound.

    Raises:
        RecipeError: a sum over choices that are not integers, or a range that leaves no choice.
    """
    terms = (*rule.sources, *rule.targets)
    spans = _spans(terms)
    lists = _lists(terms)
    if not spans and not any(c.terms for t in terms for c in t.pattern.captures):
        return rule
    kept = {name: _kept(name, lists[name], spans[name]) for name in spans if name in lists}
    lists = {name: [tuple(c[n] for n in kept.get(name, range(len(c)))) for c in lists[name]] for name in lists}

    def within(term: Term, side: Sequence[Term]) -> Term:
        near = {name: [*_lists([term]).get(name, ()), *_lists(side).get(name, ())] for name in lists}
        domain = _Domain(spans, kept, {n: [_chosen(c, kept.get(n)) for c in near[n]] + lists[n] for n in lists})
        return _mapped(term, domain.capture, domain.axis)

    return replace(
        rule,
        sources=tuple(within(t, rule.sources) for t in rule.sources),
        targets=tuple(within(t, rule.targets) for t in rule.targets),
    )


def with_domains_of_both(first: KeyPattern, second: KeyPattern) -> tuple[KeyPattern, KeyPattern]:
    """Two patterns of one statement, such as a tie, with the domain of each name in both.

    >>> alias, base = with_domains_of_both(KeyPattern.parse("g.{i:1,3}"), KeyPattern.parse("h.{i}"))
    >>> base.match("h.3"), base.match("h.2")
    ({'i': '3'}, None)

    Raises:
        RecipeError: lists of one name that differ in length; else as for `with_domains`.
    """
    rule = with_domains(normalise(Rule((Term(first),), (Term(second),)), {}))
    return rule.sources[0].pattern, rule.targets[0].pattern


def numbers_of(rule: Rule, name: str) -> tuple[int, ...] | None:
    """The values of a name whose domain is a list of integers, in order; None where it is not.

    >>> numbers_of(Rule.parse("l.{i:1,3}.w -> {i:a,b}.w"), "i")
    (1, 3)
    """
    found = _integers(_lists((*rule.sources, *rule.targets)).get(name, ()))
    return tuple(map(int, found)) if found is not None else None


@dataclass(frozen=True, slots=True)
class _Domain:
    """What the captures of one term are given.

    Args:
        spans: the range of each name.
        kept: the positions of the choices that lie in the name's range.
        lists: spellings of the choices of each name, those of the term itself first.
    """

    spans: Mapping[str, Span]
    kept: Mapping[str, Sequence[int]]
    lists: Mapping[str, Sequence[Spelling]]

    def capture(self, piece: Capture) -> Capture:
        if piece.rest or piece.flat:
            return piece
        if piece.name in self.lists:
            if piece.terms is None and piece.span is None:
                return replace(piece, choices=_chosen(piece.choices or (), self.kept.get(piece.name)))
            numbers = _integers(self.lists[piece.name])
            if numbers is None:
                raise _not_integers(piece, self.lists[piece.name][0])
            return replace(piece, choices=numbers, span=None)
        span = self.spans.get(piece.name)
        return replace(piece, span=span) if span is not None else piece

    def axis(self, axis: Axis) -> Axis:
        if axis.choices is None or axis.name not in self.kept:
            return axis
        return replace(axis, choices=_chosen(axis.choices, self.kept[axis.name]))


def _spans(terms: Sequence[Term]) -> dict[str, Span]:
    """The range of each name: where several are written, the values that all of them hold."""
    found: dict[str, Span] = {}
    for capture in (c for t in terms for c in t.pattern.captures):
        if capture.span is not None:
            own, other = capture.span, found.get(capture.name, capture.span)
            found[capture.name] = Span(max(int(own.first), int(other.first)), min(int(own.last), int(other.last)))
    return found


def _lists(terms: Sequence[Term]) -> dict[str, list[Spelling]]:
    """The lists of choices of each name, in the order of the text."""
    found: dict[str, list[Spelling]] = {}
    for name, choices in (pair for term in terms for pair in _written(term)):
        found.setdefault(name, []).append(choices)
    return found


def _written(term: Term) -> Iterator[tuple[str, Spelling]]:
    for item in (*term.pattern.captures, *(term.axes.axes if term.axes else ())):
        if item.choices is not None:
            yield item.name, item.choices


def _kept(name: str, lists: Sequence[Spelling], span: Span) -> list[int]:
    numbers = _integers(lists)
    kept = [n for n, text in enumerate(numbers or ()) if int(text) in span]
    if not kept:
        text = f"none of the choices {', '.join(lists[0])} of {{{name}}} lies in its range {span}"
        raise RecipeError(Diagnostic("bad-pattern", text, help=f"{{{name}:{span}}} alone, or the choices alone"))
    return kept


def _chosen(choices: Spelling, kept: Sequence[int] | None) -> Spelling:
    return choices if kept is None else tuple(choices[n] for n in kept)


def _integers(lists: Sequence[Spelling]) -> Spelling | None:
    """The first spelling that consists of integers."""
    return next((choices for choices in lists if all(map(is_index, choices))), None)


def _not_integers(capture: Capture, choices: Spelling) -> RecipeError:
    odd = next(c for c in choices if not is_index(c))
    return RecipeError(
        Diagnostic(
            "not-a-number",
            f"{{{capture}}} computes with {odd!r}, a choice of {{{capture.name}}} that is not an integer",
            help="choices that are computed with are integers without leading zeros: {i:1,3}",
        )
    )


def _mapped(term: Term, capture: Callable[[Capture], Capture], axis: Callable[[Axis], Axis]) -> Term:
    def piece(found: Literal | Capture) -> Literal | Capture:
        return capture(found) if isinstance(found, Capture) else found

    pattern = KeyPattern(tuple(map(piece, term.pattern.pieces)))
    if term.axes is None:
        return replace(term, pattern=pattern)
    dims = tuple(replace(d, axes=tuple(map(axis, d.axes))) for d in term.axes.dims)
    return replace(term, pattern=pattern, axes=AxisList(dims))
