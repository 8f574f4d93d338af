"""From a recipe to flat stages: scopes dissolved into prefixes, used recipes read, names and dims bound.

What comes out knows no nesting any more: a stage is a list of whole-key rules, each with the sizes it may ask for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from ..errors import CkptSurgeryError, Diagnostic, RecipeError, Remedy
from ..language.axes import AxisList
from ..language.dims import Dims, DimValue
from ..language.domains import with_domains, with_domains_of_both
from ..language.keys import KeyPattern
from ..language.law import Signature, normalise, signature
from ..language.recipe import Recipe, Scope
from ..language.rules import Rule, Term, parse_made, parse_pattern
from ..ops.base import OpError
from .arguments import settled
from .asked_names import captured_by, sizes_asked, words_of_ops
from .config_changes import BoundEdits
from .recipe_data import DataEntry

__all__ = ["BoundPattern", "ResolvedRule", "Rest", "Stage", "expand"]

Resolve = Callable[[str], Recipe]
_WORD = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class ResolvedRule:
    """A rule over whole keys, with the roles of its names and the sizes it may ask for."""

    rule: Rule
    signature: Signature
    dims: Dims
    text: str
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """The tables of `[names]` that spell choices of the rule; several rules may share one."""
    own: Dims = field(default_factory=lambda: Dims({}))
    """The sizes without those of this run."""
    overrides: Mapping[str, DimValue] = field(default_factory=dict)
    """Sizes of this run; a table holds the choices of all stages."""
    data: Mapping[str, DataEntry] = field(default_factory=dict)
    """Arguments of ops in files, by name."""

    def given(self, name: str) -> Mapping[str, Any]:
        """The choices for which this run gives a size."""
        table = self.overrides.get(name)
        return table if isinstance(table, Mapping) else {}

    @property
    def flats(self) -> list[tuple[str, ...]]:
        """The names of each flat index, outermost first."""
        terms = (*self.rule.sources, *self.rule.targets)
        return [c.flat for t in terms for c in t.pattern.captures if c.flat]

    def remedies(self, name: str) -> tuple[Remedy, ...]:
        """What settles the size of an axis, the config first where the recipe's dims read one."""
        choices = next((found for axis, found in self.ragged() if axis == name), ())
        listed = [None, None] if any(a.name == name for a in self.rule.marked) else None
        size = Remedy("dims", {name: dict.fromkeys(choices) if choices else listed}, kind="recipe")
        return (Remedy("config", None, "holds it"), size) if self.own.asks_config(name) else (size,)

    def unmarked(self, name: str) -> str | None:
        """What to do with an axis that has a size for each choice in `dims`, and no choice in the rule."""
        if not isinstance(self.dims.get(name), Mapping | tuple) or any(a.name == name for a in self.rule.marked):
            return None
        captured = [c.name for t in self.rule.sources for c in t.pattern.captures if not c.rest]
        which = f"{name}:{captured[0]}" if captured else f"{name}:i with the capture i"
        return f"dims.{name} has a size for each choice: write the axis as {which}"

    def ragged(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The axes whose size depends on a choice, with the spellings of the choices, those of either side."""
        terms = (*self.rule.sources, *self.rule.targets)
        axes = [a for t in terms if t.axes for a in t.axes.axes]
        for marked in axes:
            if marked.marker is not None:
                yield from ((marked.name, a.choices) for a in axes if a.name == marked.marker and a.choices)
                captures = (c for t in terms for c in t.pattern.captures if c.name == marked.marker)
                yield from ((marked.name, c.choices) for c in captures if c.choices)


@dataclass(frozen=True)
class BoundPattern:
    """A pattern of `drop`, `[init]`, `[tie]` or `[same]`, with what is said of it."""

    pattern: KeyPattern
    optional: bool
    text: str
    value: Any = None
    place: str | None = None
    axes: AxisList | None = None
    dtype: str | None = None
    dims: Dims | None = None


@dataclass(frozen=True)
class Rest:
    """What becomes of keys under `prefix` that nothing names: `"error"`, `"drop"`, or a rule."""

    prefix: KeyPattern | None
    kind: str
    rule: ResolvedRule | None = None


@dataclass
class Stage:
    """One pass of rules over the keys that the stage before left."""

    rules: list[ResolvedRule] = field(default_factory=list)
    drops: list[BoundPattern] = field(default_factory=list)
    inits: list[BoundPattern] = field(default_factory=list)
    ties: list[BoundPattern] = field(default_factory=list)
    sames: list[BoundPattern] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)
    edits: list[BoundEdits] = field(default_factory=list)


def expand(
    recipe: Recipe,
    resolve: Resolve,
    config: Mapping[str, Any] | None = None,
    dims: Mapping[str, DimValue] | None = None,
) -> list[Stage]:
    """The stages of a recipe.

    Args:
        resolve: finds a recipe by the name that `use` gives.
        config: what `config.` refers to.
        dims: sizes that go before the recipe's own.

    Raises:
        RecipeError: all rules that break the law, unknown recipes, names without their numbers.
    """
    stages: list[Stage] = []
    problems: list[Diagnostic] = []
    asked: set[str] = set()
    for part in (recipe.replace(stages=()), *recipe.stages):
        expansion = _Expansion(resolve, dict(dims if dims is not None else {}), problems, asked)
        expansion.add(part, Frame(config=config), depth=0)
        expansion.stage.rests.sort(key=lambda r: -len(str(r.prefix or "")))
        stages.append(expansion.stage)
    given = dims if dims is not None else {}
    problems += [_unasked(name, asked) for name in given if name not in asked]
    if given:
        problems += _unknown_choices(given, [bound for stage in stages for bound in stage.rules])
    if problems:
        raise RecipeError(problems)
    return stages


def _unknown_choices(given: Mapping[str, DimValue], rules: Sequence[ResolvedRule]) -> Iterator[Diagnostic]:
    """Choices of the tables of this run that no rule of any stage has."""
    ragged = [pair for bound in rules for pair in bound.ragged()]
    for name, table in given.items():
        known = {choice for axis, choices in ragged if axis == name for choice in choices}
        for choice in table if isinstance(table, Mapping) and known else ():
            if choice not in known:
                text = f"a size is given for {name}.{choice}, and {choice!r} is no choice of any rule"
                near = get_close_matches(choice, sorted(known), 1)
                meant = (Remedy("dims", {choice: near}, kind="instead"),) if near else ()
                yield Diagnostic("unknown-choice", text, remedies=meant, advice=f"one of: {', '.join(sorted(known))}")


def _unasked(name: str, asked: set[str]) -> Diagnostic:
    near = get_close_matches(name, sorted(asked), n=2)
    return Diagnostic(
        "unused-dim",
        f"a size is given for {name!r}, and nothing asks for it",
        remedies=(Remedy("dims", {name: near}, kind="instead"),) if near else (),
        advice=None if near else "leave it out",
    )


@dataclass(frozen=True)
class Frame:
    """What surrounds a part of a recipe."""

    source: KeyPattern | None = None
    target: KeyPattern | None = None
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    dims: Dims | None = None
    config: Mapping[str, Any] | None = None
    path: str = ""
    """Where in the whole config `config` is."""
    own: Mapping[str, DimValue] = field(default_factory=dict)
    data: Mapping[str, DataEntry] = field(default_factory=dict)


class _Expansion:
    def __init__(
        self, resolve: Resolve, overrides: dict[str, DimValue], problems: list[Diagnostic], asked: set[str]
    ) -> None:
        self.resolve, self.overrides, self.problems, self.asked = resolve, overrides, problems, asked
        self.stage = Stage()
        self.open: list[str] = []

    def add(self, recipe: Recipe, frame: Frame, depth: int) -> None:
        if recipe.stages:
            self.problems.append(
                Diagnostic(
                    "bad-scope",
                    "a recipe with stages cannot stand in a scope",
                    place=recipe.place,
                    help="scope its parts, then chain them",
                )
            )
            return
        if self.overrides:
            self.asked |= sizes_asked(recipe)
        given = {name: _over(recipe.dims.get(name), value) for name, value in self.overrides.items()}
        dims = Dims({**recipe.dims, **given}, frame.config, frame.dims)
        data = {name: DataEntry(name, value, recipe.place) for name, value in recipe.data.items()}
        names = {**frame.names, **recipe.names}
        frame = replace(frame, names=names, dims=dims, own=recipe.dims, data={**frame.data, **data})
        for rule in recipe.rules:
            bound = self.bound(rule, frame, dims)
            if bound is not None:
                self.stage.rules.append(bound)
        if recipe.config:
            self.stage.edits.append(BoundEdits(recipe.config, dims, frame.path, recipe.place))
        self.patterns(recipe, frame)
        if recipe.names:
            self.names(recipe)
        if recipe.data:
            self.data(recipe)
        self.rest(recipe, frame, dims, depth)
        for scope in recipe.scopes:
            self.scope(scope, frame, depth + 1)

    def names(self, recipe: Recipe) -> None:
        """A table of `[names]` that nothing captures is a misspelling; a bare capture would then take any text."""
        for name in recipe.names.keys() - captured_by(recipe):
            self.problems.append(
                Diagnostic(
                    "unused-names",
                    f"[names.{name}]: no pattern captures {{{name}}}",
                    place=recipe.place,
                    help=f"{{{name}}} in a rule, or leave the table out",
                )
            )

    def data(self, recipe: Recipe) -> None:
        """An entry of `[data]` that no op names is a misspelling, or its file is not needed."""
        for name in recipe.data.keys() - words_of_ops(recipe):
            self.problems.append(
                Diagnostic(
                    "unused-data",
                    f"data.{name}: no op names it",
                    place=recipe.place,
                    help=f"| take(x, {name}) in a rule, or leave the entry out",
                )
            )

    def scope(self, scope: Scope, frame: Frame, depth: int) -> None:
        inner = replace(
            frame,
            source=_joined(frame.source, scope.source),
            target=_joined(frame.target, scope.target),
            config=_rooted(frame.config, scope.config),
            path=".".join(filter(None, (frame.path, scope.config))),
        )
        self.add(scope.recipe, inner, depth)
        if scope.use is None:
            return
        if scope.use in self.open or len(self.open) > 16:
            self.problems.append(
                Diagnostic("circular-use", f"{' -> '.join((*self.open, scope.use))} goes round in a circle")
            )
            return
        try:
            used = self.resolve(scope.use)
            used = used.inverse() if scope.inverse else used
        except CkptSurgeryError as error:
            self.problems.extend(error.diagnostics)
            return
        self.open.append(scope.use)
        # the scope's own dims are the arguments of the used recipe: they go before its defaults
        self.add(used.replace(dims={**used.dims, **scope.recipe.dims}), inner, depth)
        self.open.pop()

    def bound(self, rule: Rule, frame: Frame, dims: Dims) -> ResolvedRule | None:
        try:
            prefixed = replace(
                rule,
                sources=tuple(_prefixed(t, frame.source) for t in rule.sources),
                targets=tuple(_prefixed(t, frame.target) for t in rule.targets),
            )
            tables = _used(prefixed, frame.names)
            final = normalise(prefixed, tables)
            if _asks(final):
                final = with_domains(_with_numbers(final, _numbers(final, dims)))
            own = replace(dims, values=frame.own)
            return ResolvedRule(final, signature(final), dims, str(rule), tables, own, self.overrides, frame.data)
        except RecipeError as error:
            text = str(rule)
            self.problems.extend(
                replace(d, place=d.place or rule.place, notes=d.notes if text in d.notes else (text, *d.notes))
                for d in error.diagnostics
            )
            return None

    def patterns(self, recipe: Recipe, frame: Frame) -> None:
        stage, place = self.stage, recipe.place
        for text in recipe.drop:
            stage.drops.append(self.pattern(text, frame, place, frame.source, left=True))
        for text, value in recipe.init.items():
            given = self.initialiser(text, value, frame, place)
            optional, term, dtype = parse_made(text, place)
            bare = ("? " if optional else "") + str(term.pattern)
            init = self.pattern(bare, frame, place, frame.target, value=given)
            stage.inits.append(replace(init, text=text, axes=term.axes, dtype=dtype, dims=frame.dims))
        for mapping, found, prefix, left in (
            (recipe.tie, stage.ties, frame.target, False),
            (recipe.same, stage.sames, frame.source, True),
        ):
            for text, other in mapping.items():
                base = self.pattern(other, frame, place, prefix, left=left).pattern
                said = self.pattern(text, frame, place, prefix, left=left, value=base)
                try:
                    alias, base = with_domains_of_both(said.pattern, base)
                    said = replace(said, pattern=alias, value=base)
                except RecipeError as error:
                    here = f"{text} = {other}"
                    self.problems += [replace(d, place=place, notes=(here,)) for d in error.diagnostics]
                found.append(said)

    def initialiser(self, key: str, value: Any, frame: Frame, place: str | None) -> Any:
        """The value of [init], names and formulas settled where it is a text; one that is no call is told later."""
        if not isinstance(value, str) or frame.dims is None:
            return value
        try:
            return settled(value, frame.dims)
        except RecipeError:
            return value
        except OpError as error:
            text = f"[init] '{key}' = '{value}': {error}"
            self.problems.append(Diagnostic("bad-init", text, place=place, remedies=error.remedies("init")))
            return value

    def pattern(
        self,
        text: str,
        frame: Frame,
        place: str | None,
        prefix: KeyPattern | None,
        *,
        left: bool = False,
        value: Any = None,
    ) -> BoundPattern:
        optional, parsed = parse_pattern(text, place)
        whole = parsed.prefixed(prefix) if prefix else parsed
        term = Rule((Term(whole),), (Term(whole),))
        spelled = normalise(term, _used(term, frame.names))
        side = spelled.sources if left else spelled.targets
        numbers = frame.dims.numbers if frame.dims and _asks(spelled) else {}
        try:
            return BoundPattern(side[0].pattern.bind(numbers), optional, text, value, place)
        except RecipeError as error:
            self.problems.extend(replace(d, place=place) for d in error.diagnostics)
            return BoundPattern(whole, optional, text, value, place)

    def rest(self, recipe: Recipe, frame: Frame, dims: Dims, depth: int) -> None:
        if recipe.rest is None or (recipe.rest == "error" and frame.source is None):
            return
        if recipe.rest in ("error", "drop"):
            self.stage.rests.append(Rest(frame.source, recipe.rest))
            return
        rule = recipe.fallback or Rule.parse("{rest...} -> {rest...}")
        bound = self.bound(rule, frame, dims)
        if bound is not None:
            kind = "keep" if recipe.rest == "keep" else "rule"
            self.stage.rests.append(Rest(frame.source, kind, bound))


def _over(own: DimValue | None, given: DimValue) -> DimValue:
    """A size of this run in place of the recipe's own; of a table, choice by choice."""
    return {**own, **given} if isinstance(own, Mapping) and isinstance(given, Mapping) else given


def _prefixed(term: Term, prefix: KeyPattern | None) -> Term:
    return replace(term, pattern=term.pattern.prefixed(prefix)) if prefix is not None else term


def _joined(outer: KeyPattern | None, prefix: str) -> KeyPattern | None:
    if not prefix:
        return outer
    inner = KeyPattern.parse(prefix)
    return inner.prefixed(outer) if outer is not None else inner


def _rooted(config: Mapping[str, Any] | None, path: str | None) -> Mapping[str, Any] | None:
    node: Any = config
    for part in path.split(".") if path else ():
        node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, Mapping) else None


def _used(rule: Rule, names: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    """Those tables of `[names]` that the rule captures without choices of its own; a list in the rule goes before."""
    terms = (*rule.sources, *rule.targets)
    listed = {c.name for t in terms for c in t.pattern.captures if c.choices is not None}
    listed |= {a.name for t in terms if t.axes for a in t.axes.axes if a.choices is not None}
    return {n: pairs for n, pairs in names.items() if n in set(rule.names) - listed}


def _with_numbers(rule: Rule, numbers: Mapping[str, int]) -> Rule:
    sides = ((replace(t, pattern=t.pattern.bind(numbers)) for t in side) for side in (rule.sources, rule.targets))
    sources, targets = map(tuple, sides)
    return replace(rule, sources=sources, targets=targets)


def _numbers(rule: Rule, dims: Dims) -> dict[str, int]:
    """Return the numbers that sums and ranges in a rule's keys may stand for.

    Raises:
        RecipeError: dims name one that the config lacks.
    """
    for capture in (c for t in (*rule.sources, *rule.targets) for c in t.pattern.captures):
        ends = (str(capture.span.first), str(capture.span.last)) if capture.span else ()
        words = [str(a) for _, a in capture.terms or ()] + [w for end in ends for w in _WORD.findall(end)]
        for name in words:
            lacking = dims.missing(name)
            if lacking is not None:
                raise RecipeError(
                    Diagnostic(
                        "unknown-dim",
                        f"{{{capture}}}: nothing says what {name!r} is",
                        remedies=(Remedy.size(name),),
                        facts=(("config", f"lacks what {name} = {lacking!r} needs"),),
                    )
                )
    return dims.numbers


def _asks(rule: Rule) -> bool:
    return any(c.terms or c.span for t in (*rule.sources, *rule.targets) for c in t.pattern.captures)
