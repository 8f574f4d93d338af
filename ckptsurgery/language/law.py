"""The law of a rule: which names loop, which are gathered, which are scattered, and what has no partner.

A name bound in a key on both sides is a loop variable. Bound in a key on one side only, it must be an axis on the
other. An axis name on one side only must be bound by a key, or be the argument of an op that reduces or repeats it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import Diagnostic, RecipeError
from .axes import Axis, AxisList, Dim
from .calls import Call, Name
from .keys import Capture, KeyPattern, Literal
from .rules import Rule, Term

__all__ = ["Signature", "normalise", "signature"]

Names = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Signature:
    """The roles of a rule's names.

    Args:
        loops: bound in keys on both sides.
        gathered: bound in source keys only.
        scattered: bound in target keys only.
        counts: name -> number of its choices.
        over: names that an op reduces or repeats.
    """

    loops: tuple[str, ...]
    gathered: tuple[str, ...]
    scattered: tuple[str, ...]
    counts: Mapping[str, int]
    over: tuple[str, ...]


def normalise(rule: Rule, names: Names) -> Rule:
    """The rule with every choice list spelled out wherever its name is captured.

    A table of `[names]` is spelled as its sources on the left and as its targets on the right. For a side of several
    terms that is provisional: planning, which has the keys, may give a term the other spelling.

    Raises:
        RecipeError: lists of one name that differ in length.
    """
    left = {n: tuple(pairs) for n, pairs in names.items()}
    right = {n: tuple(pairs.values()) for n, pairs in names.items()}
    found: dict[str, tuple[str, ...]] = {}
    for name, choices in _choice_lists(rule):
        if len(found.setdefault(name, choices)) != len(choices):
            raise RecipeError(
                Diagnostic(
                    "choices-differ",
                    f"{{{name}}} has {len(found[name])} choices in one place and {len(choices)} in another",
                    place=rule.place,
                    notes=(str(rule),),
                    help="choices are paired by position",
                )
            )
    if not found and not names:
        return rule
    sources = tuple(_spelled(t, {**left, **_own(t), **_missing(found, left, t)}, found) for t in rule.sources)
    targets = tuple(_spelled(t, {**right, **_own(t), **_missing(found, right, t)}, found) for t in rule.targets)
    return replace(rule, sources=sources, targets=targets)


def _choice_lists(rule: Rule) -> Iterator[tuple[str, tuple[str, ...]]]:
    for term in (*rule.sources, *rule.targets):
        yield from _own(term).items()
        for axis in term.axes.axes if term.axes else ():
            if axis.choices is not None:
                yield axis.name, axis.choices


def _own(term: Term) -> dict[str, tuple[str, ...]]:
    return {c.name: c.choices for c in term.pattern.captures if c.choices is not None}


def _missing(
    found: Mapping[str, tuple[str, ...]], named: Mapping[str, tuple[str, ...]], term: Term
) -> dict[str, tuple[str, ...]]:
    """Spellings for bare captures: those of the rule itself, where neither the term nor `[names]` has any."""
    own = _own(term)
    return {n: c for n, c in found.items() if n not in own and n not in named}


def _spelled(term: Term, spelling: Mapping[str, tuple[str, ...]], found: Mapping[str, tuple[str, ...]]) -> Term:
    def capture(piece: Literal | Capture) -> Literal | Capture:
        bare = isinstance(piece, Capture) and not (piece.choices or piece.numeric or piece.rest)
        if bare and isinstance(piece, Capture) and piece.name in spelling:
            return replace(piece, choices=spelling[piece.name])
        return piece

    def axis(item: Axis) -> Axis:
        choices = found.get(item.name) or spelling.get(item.name)
        return replace(item, choices=choices) if choices and item.choices is None and item.marker is None else item

    pattern = KeyPattern(tuple(capture(p) for p in term.pattern.pieces))
    if term.axes is None:
        return replace(term, pattern=pattern)
    dims = tuple(replace(d, axes=tuple(axis(a) for a in d.axes)) for d in term.axes.dims)
    return replace(term, pattern=pattern, axes=AxisList(dims))


def signature(rule: Rule) -> Signature:
    """The roles of the names of a normalised rule.

    >>> rule = Rule.parse("e.{e}.{p:w1,w3}.{l} [f d] -> up.{l} [e (p f) d]")
    >>> s = signature(rule)
    >>> s.loops, s.gathered, s.scattered, s.counts
    (('l',), ('e', 'p'), (), {'p': 2})

    Raises:
        RecipeError: every name without a partner.
    """
    left, right = _key_names(rule.sources), _key_names(rule.targets)
    left_axes, right_axes = _axes(rule.sources), _axes(rule.targets)
    over = tuple(dict.fromkeys(n for call in (*rule.before, *rule.after) for n in _words(call)))
    problems = [
        *_unbound(rule, left, right, left_axes, right_axes, over),
        *_lonely_axes(rule, left, right, left_axes, right_axes, over),
        *_ellipses(rule),
    ]
    if problems:
        raise RecipeError(problems)
    return Signature(
        loops=tuple(n for n in left if n in right),
        gathered=tuple(n for n in left if n not in right),
        scattered=tuple(n for n in right if n not in left),
        counts={name: len(choices) for name, choices in _choice_lists(rule)},
        over=tuple(n for n in over if n in {*left, *right, *left_axes, *right_axes}),
    )


def _words(call: Call) -> Iterator[str]:
    for value in (*call.args, *(v for _, v in call.keywords)):
        if isinstance(value, Name):
            yield str(value)


def _key_names(terms: Iterable[Term]) -> dict[str, None]:
    return dict.fromkeys(n for t in terms for n in t.pattern.names)


def _axes(terms: Iterable[Term]) -> dict[str, Axis]:
    found: dict[str, Axis] = {}
    for term in terms:
        for axis in term.axes.axes if term.axes else ():
            found.setdefault(axis.name if axis.size is None else f"={axis.size}", axis)
    return found


def _unbound(
    rule: Rule,
    left: Iterable[str],
    right: Iterable[str],
    left_axes: Iterable[str],
    right_axes: Iterable[str],
    over: Iterable[str],
) -> Iterator[Diagnostic]:
    sides = (
        ("left", "right", rule.sources, left, right, right_axes),
        ("right", "left", rule.targets, right, left, left_axes),
    )
    for side, other, terms, bound, elsewhere, axes in sides:
        for name in bound:
            if name in elsewhere or name in axes or name in over:
                continue
            text = str(rule)
            opposite = rule.targets if side == "left" else rule.sources
            notes = (text, _underline(text, terms, name))
            yield Diagnostic(
                "unbound-capture",
                f"{{{name}}} is bound on the {side} only, and is no axis on the {other}",
                place=rule.place,
                notes=notes,
                help=_stack_help(name, opposite[0], side, rule),
            )


def _stack_help(name: str, opposite: Term, side: str, rule: Rule) -> str:
    own = (rule.sources if side == "left" else rule.targets)[0]
    axes = opposite.axes or own.axes
    dims = (Dim((Axis(name),)), *axes.dims) if axes else (Dim((Axis(name),)), Dim(ellipsis=True))
    verb = "stack them" if side == "left" else "split it"
    elsewhere = "target" if side == "left" else "source"
    return f"{verb}: {opposite.pattern} {AxisList(dims)}, or keep {{{name}}} in the {elsewhere}'s key"


def _underline(text: str, terms: Iterable[Term], name: str) -> str:
    for term in terms:
        for capture in term.pattern.captures:
            at = text.find(f"{{{capture}}}")
            if name in capture.names and at >= 0:
                return " " * at + "^" * (len(str(capture)) + 2)
    return ""


def _lonely_axes(
    rule: Rule,
    left: Iterable[str],
    right: Iterable[str],
    left_axes: Mapping[str, Axis],
    right_axes: Mapping[str, Axis],
    over: Iterable[str],
) -> Iterator[Diagnostic]:
    if not left_axes and not right_axes and all(t.axes is None for t in (*rule.sources, *rule.targets)):
        return
    sides = (("left", left_axes, right_axes, right), ("right", right_axes, left_axes, left))
    for side, own, others, keys in sides:
        for name, axis in own.items():
            if name in others or name in keys or name in over or axis.size == 1:
                continue
            what = f"the size {axis.size}" if axis.size is not None else f"axis {name!r}"
            yield Diagnostic(
                "unbound-axis",
                f"{what} stands on the {side} only, and no key binds it",
                place=rule.place,
                notes=(str(rule),),
                help=_lonely_help(side, axis, rule),
            )
    for axis in (*left_axes.values(), *right_axes.values()):
        marker = axis.marker
        if marker and marker not in {*left, *right, *left_axes, *right_axes}:
            yield Diagnostic(
                "unbound-axis",
                f"{axis}: {marker!r} is neither a capture nor an axis",
                place=rule.place,
                notes=(str(rule),),
            )


def _lonely_help(side: str, axis: Axis, rule: Rule) -> str:
    if axis.size is not None:
        return "name the axis, and say by an op what becomes of it"
    own, other = (rule.sources, rule.targets) if side == "left" else (rule.targets, rule.sources)
    if any(t.axes is None for t in other) and any(t.axes for t in own):
        return "axes stand on both sides: " + ", ".join(
            f"{t.pattern} [… {axis.name} …]" for t in other if t.axes is None
        )
    op = "mean_over" if side == "left" else "repeat_over"
    return f"a reduction or a repetition is an op and says so: | {op}({axis.name})"


def _ellipses(rule: Rule) -> Iterator[Diagnostic]:
    lists = [t.axes for t in (*rule.sources, *rule.targets) if t.axes is not None]
    if any(a.has_ellipsis for a in lists) and not all(a.has_ellipsis for a in lists):
        yield Diagnostic(
            "unbound-axis",
            "'...' stands on one side only",
            place=rule.place,
            notes=(str(rule),),
            help="it stands for dimensions that the rule leaves alone, on both sides",
        )
    optional = [{x.name for d in a.dims if d.optional for x in d.axes} for a in lists]
    if optional and any(o != optional[0] for o in optional):
        yield Diagnostic(
            "unbound-axis",
            "an axis may be absent on one side only",
            place=rule.place,
            notes=(str(rule),),
            help="write the '?' on both sides",
        )
