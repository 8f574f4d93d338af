"""One line of a recipe: `[?] SOURCE [| op]* -> TARGET [| op]*`, and its inverse.

SOURCE is one term or several. Several are separated by commas, and then each of their keys needs all partners, or by
`&`, and then keys without a partner are left to other rules. A `+` in front of a term shares its keys: on the left with
the rule that claims them, on the right with the rule that makes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..errors import Diagnostic, RecipeError
from ..specs import DTYPES
from ..toml_writing import quoted
from ..wording import brief
from .axes import Axis, AxisList
from .calls import Call, parse_call
from .captures import guarded, split_unescaped, stripped
from .keys import KeyPattern

__all__ = ["OpAlgebra", "Rule", "Term", "optional_text", "parse_made", "parse_pattern", "with_arrow"]

SAME = Call("same")
_OTHER_ARROW = re.compile(r"\s*(?:[=~]>|→|-\s+>)\s*")


class OpAlgebra(Protocol):
    """What inverting a rule has to know of ops, which are names with arguments here."""

    def undo(self, call: Call) -> Call | None:
        """The call that undoes `call` but for rounding, None where nothing does."""

    def joins(self, call: Call) -> bool:
        """Whether the op takes or gives several tensors at once."""


@dataclass(frozen=True, slots=True)
class Term:
    """A key pattern with the axes of its tensors, or without.

    Args:
        shared: whether a `+` stands in front. A source term then reads keys that another rule claims. A target term
            then makes keys that another rule makes as well, and the tensors are proved equal.
    """

    pattern: KeyPattern
    axes: AxisList | None = None
    shared: bool = False

    def __str__(self) -> str:
        key = ("+ " if self.shared else "") + guarded(str(self.pattern))
        return key if self.axes is None else f"{key} {self.axes}"


@dataclass(frozen=True, slots=True, repr=False)
class Rule:
    """A rule: a pattern for source keys and axes, and the target that they become.

    >>> rule = Rule.parse("? h.{i}.fc.{l} [x y?] -> layers.{i}.fc.{l} [y? x] | cast(bf16)")
    >>> rule.optional, str(rule.targets[0].pattern), str(rule.after[0])
    (True, 'layers.{i}.fc.{l}', 'cast(bf16)')
    >>> str(rule)
    '? h.{i}.fc.{l} [x y?] -> layers.{i}.fc.{l} [y? x] | cast(bf16)'

    Args:
        sources, targets: the terms of each side, one or more.
        before: ops on the source side, run before the rearrangement.
        after: ops on the target side, run after it.
        optional: whether it may match nothing (`?` in front).
        joined: whether the rule takes only keys that have all their partners (`&` between the sources).
        place: where it was read, `file:line`.
    """

    sources: tuple[Term, ...]
    targets: tuple[Term, ...]
    before: tuple[Call, ...] = ()
    after: tuple[Call, ...] = ()
    optional: bool = False
    joined: bool = False
    place: str | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str, place: str | None = None) -> Rule:
        """Read one line.

        Raises:
            RecipeError: the text is no rule; the diagnostic shows the place.
        """
        try:
            return _parse(text, place)
        except RecipeError as error:
            raise RecipeError([_in_rule(d, text, place) for d in error.diagnostics]) from None

    @property
    def names(self) -> tuple[str, ...]:
        """All names of captures and axes, each once."""
        found: dict[str, None] = {}
        for term in (*self.sources, *self.targets):
            found.update(dict.fromkeys(term.pattern.names))
            if term.axes is not None:
                found.update(dict.fromkeys(term.axes.names))
        return tuple(found)

    @property
    def marked(self) -> tuple[Axis, ...]:
        """The axes whose size depends on the value of another name."""
        axes = (axis for term in (*self.sources, *self.targets) if term.axes for axis in term.axes.axes)
        return tuple(axis for axis in axes if axis.marker is not None)

    @property
    def only_renames(self) -> bool:
        """Whether each tensor that it reads gets another name, and no more.

        >>> Rule.parse("a.{i} -> b.{i}").only_renames, Rule.parse("a [x y] -> b [y x]").only_renames
        (True, False)
        """
        terms = (*self.sources, *self.targets)
        return len(terms) == 2 and not (self.before or self.after) and all(term.axes is None for term in terms)

    def inverse(self, ops: OpAlgebra) -> Rule:
        """Return the rule with sides swapped and ops inverted; a copy to several places becomes a proof of equality.

        Raises:
            RecipeError: an op that nothing undoes; `&`, since only the keys show which of them had partners.
        """
        if self.joined:
            raise RecipeError(
                Diagnostic(
                    "not-invertible",
                    "the way back of '&' depends on which keys had partners",
                    place=self.place,
                    notes=(str(self),),
                    help="plan.inverse(converted) knows the keys; or write ',' where every key has its partners",
                )
            )
        undone_before = tuple(self._undo(call, ops) for call in reversed(self.after) if call != SAME)
        undone_after = tuple(self._undo(call, ops) for call in reversed(self.before) if call != SAME)
        copies = len(self.targets) > 1 and not any(ops.joins(c) for c in self.after)
        after = (SAME, *undone_after) if copies else undone_after
        return replace(self, sources=self.targets, targets=self.sources, before=undone_before, after=after)

    def _undo(self, call: Call, ops: OpAlgebra) -> Call:
        undone = ops.undo(call)
        if undone is None:
            raise RecipeError(
                Diagnostic(
                    "not-invertible",
                    f"{call} cannot be undone",
                    place=self.place,
                    notes=(str(self),),
                    help="leave the op out of the recipe, or write the way back by hand",
                )
            )
        return undone

    def __str__(self) -> str:
        between = " & " if self.joined else ", "
        left = " | ".join([between.join(map(str, self.sources)), *map(str, self.before)])
        right = " | ".join([", ".join(map(str, self.targets)), *map(str, self.after)])
        return ("? " if self.optional else "") + f"{left} -> {right}"

    def __repr__(self) -> str:
        return brief("Rule", str(self))


def optional_text(text: str) -> tuple[bool, str]:
    """Whether a `?` stands in front, and the text behind it.

    >>> optional_text("? a.{i}"), optional_text("a.{i}")
    ((True, 'a.{i}'), (False, 'a.{i}'))
    """
    body = stripped(text)
    return (True, stripped(body[1:])) if body.startswith("?") else (False, body)


def parse_pattern(text: str, place: str | None = None) -> tuple[bool, KeyPattern]:
    """A pattern that may be optional, as `drop`, `[init]` and `[tie]` hold them."""
    optional, body = optional_text(text)
    try:
        return optional, KeyPattern.parse(body)
    except RecipeError as error:
        raise RecipeError([_in_rule(d, text, place) for d in error.diagnostics]) from None


def parse_made(text: str, place: str | None = None) -> tuple[bool, Term, str | None]:
    """A key of `[init]`: a pattern that may be optional, its axes and its dtype where they are said.

    >>> optional, term, dtype = parse_made("? router.{i}.weight [e d] BF16")
    >>> optional, str(term), dtype
    (True, 'router.{i}.weight [e d]', 'BF16')
    """
    optional, body = optional_text(text)
    try:
        head, *behind = split_unescaped(body, "]", "{}")
        word = behind[-1].strip() if behind else ""
        if len(behind) > 1 or (word and word not in DTYPES):
            raise RecipeError(
                Diagnostic("bad-init", f"{body!r} is not a key, its axes and a dtype", help="key [e d] BF16")
            )
        return optional, _term(f"{head}]" if behind else body), word or None
    except RecipeError as error:
        raise RecipeError([_in_rule(d, text, place) for d in error.diagnostics]) from None


def with_arrow(text: str) -> str | None:
    """Return a rule with its arrow as it is written here, or None where no other arrow is in the text.

    >>> with_arrow("{k...}=>x.{k...}"), with_arrow("a, b")
    ('{k...} -> x.{k...}', None)
    """
    meant = _OTHER_ARROW.sub(" -> ", text)
    return meant if meant != text else None


def _parse(text: str, place: str | None) -> Rule:
    optional, body = optional_text(text)
    sides = split_unescaped(body, "->")
    if len(sides) != 2:
        inside = (
            "; one stands within braces or brackets that are never closed" if body.count("->") >= len(sides) else ""
        )
        meant = with_arrow(body) if len(sides) == 1 else None
        help = "SOURCE -> TARGET" if meant is None else f"did you mean {meant!r}?"
        raise RecipeError(Diagnostic("bad-rule", f"a rule has one '->', this has {len(sides) - 1}{inside}", help=help))
    if not all(map(stripped, sides)):
        raise RecipeError(_half_empty(*map(stripped, sides)))
    (sources, before, joined), (targets, after, joined_targets) = map(_side, sides)
    if joined_targets:
        raise RecipeError(Diagnostic("bad-rule", "'&' stands between targets", help="targets are separated by commas"))
    return Rule(sources, targets, before, after, optional, joined, place)


def _half_empty(source: str, target: str) -> Diagnostic:
    """The error of a rule without a source, a target or both; `a ->` reads like "leave a out", so the help is how."""
    if source and not target:
        drop = ", ".join(quoted(str(term.pattern)) for term in _side(source)[0])
        help = f"to leave a tensor out, write in place of the rule: drop = [{drop}]"
        return Diagnostic("bad-rule", "nothing is written right of '->'", help=help)
    if target and not source:
        init = ", ".join(f'{quoted(str(term))} = "zeros"' for term in _side(target)[0])
        help = f"to make a tensor that has no source, write in place of the rule: init = {{ {init} }}"
        return Diagnostic("bad-rule", "nothing is written left of '->'", help=help)
    return Diagnostic("bad-rule", "a key pattern is missing", help="SOURCE -> TARGET")


def _side(text: str) -> tuple[tuple[Term, ...], tuple[Call, ...], bool]:
    head, *calls = split_unescaped(text, "|")
    parts = [split_unescaped(part, ",") for part in split_unescaped(head, "&")]
    if len(parts) > 1 and any(len(part) > 1 for part in parts):
        advice = "a comma demands every partner, '&' takes the keys that have all of them: use one for all sources"
        raise RecipeError(Diagnostic("bad-rule", "',' and '&' stand between the sources of one rule", help=advice))
    terms = tuple(_term(t) for part in parts for t in part)
    return terms, tuple(parse_call(c.strip()) for c in calls), len(parts) > 1


def _term(text: str) -> Term:
    body = stripped(text)
    if body.startswith("+"):
        return replace(_term(body[1:]), shared=True) if not stripped(body[1:]).startswith("+") else _twice(body)
    if not body:
        raise RecipeError(Diagnostic("bad-rule", "a key pattern is missing", help="SOURCE -> TARGET"))
    key, *rest = split_unescaped(body, "[", "{}")
    if not rest:
        return Term(KeyPattern.parse(body))
    axes = "[".join(rest)
    if not axes.endswith("]") or len(rest) > 1:
        raise RecipeError(Diagnostic("bad-rule", f"the axis list of {body!r} is not closed at its end"))
    return Term(KeyPattern.parse(stripped(key)), AxisList.parse(axes[:-1]))


def _twice(body: str) -> Term:
    raise RecipeError(Diagnostic("bad-rule", f"'+' stands twice in front of {body!r}", help="+ SOURCE -> TARGET"))


def _in_rule(diagnostic: Diagnostic, text: str, place: str | None) -> Diagnostic:
    notes = diagnostic.notes
    if not notes or notes[0] not in text:
        notes = (text.strip(), *notes)
    elif notes[0] != text:
        # the caret was placed within a part of the rule: show it below the whole rule
        notes = (text, *(" " * text.find(notes[0]) + n for n in notes[1:]))
    return replace(diagnostic, notes=notes, place=diagnostic.place or place)
