"""The planner: a recipe and specs in, a checked plan out. No data is read here, and no torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import Diagnostic, PlanError, RecipeError
from ..language.dims import DimValue
from ..language.keys import Capture, is_index
from ..language.recipe import Recipe
from ..ops.base import OpError
from ..ops.registry import make_op
from ..specs import TensorSpec
from .building import Built, ProgramBuilder, RuleOps
from .claims import claim, unexpected
from .expanding import BoundPattern, BoundRule, Resolve, Stage, expand
from .flattening import Flattening
from .joining import Group, Values, canonical, group_rows, spell_columns
from .matching import Matches
from .plan import Plan, RuleUse
from .solving import SizeError
from .stages import chained
from .steps import Program, Step
from .targets import Target, fit

__all__ = ["draft_plan", "fitted", "make_plan"]


def make_plan(
    specs: Mapping[str, TensorSpec], recipe: Recipe, resolve: Resolve, *, target: Target | None = None,
    config: Mapping[str, Any] | None = None, dims: Mapping[str, DimValue] | None = None, dtype: str = "lossless",
) -> Plan:  # fmt: skip
    """Plan a recipe over headers.

    Args:
        specs: what the source holds.
        resolve: finds recipes by name, for `use`.
        target: what the target wants, where there is one: shapes and dtypes are held against it, ties are followed.
        config: what `config.` means in dims; dims: sizes that go before the recipe's own.
        dtype: what a difference in dtype means: "lossless", "error", "model" or "source"; or a dtype to cast floats to.

    Raises:
        RecipeError: the recipe breaks its law. PlanError: it does not fit the headers; all problems at once.
    """
    drafted, stage = draft_plan(specs, recipe, resolve, target=target, config=config, dims=dims)
    return fitted(drafted, stage, target, dtype)


def fitted(drafted: Plan, stage: Stage, target: Target | None, dtype: str) -> Plan:
    """A draft held against its target.

    Raises:
        PlanError: what does not fit.
    """
    problems: list[Diagnostic] = []
    plan = fit(drafted, stage, target, dtype, problems)
    if problems:
        raise PlanError([*problems, *drafted.warnings])
    return plan


def draft_plan(
    specs: Mapping[str, TensorSpec], recipe: Recipe, resolve: Resolve, *, target: Target | None = None,
    config: Mapping[str, Any] | None = None, dims: Mapping[str, DimValue] | None = None,
) -> tuple[Plan, Stage]:  # fmt: skip
    """What the rules make, before it is held against the target; with the last stage, whose inits and ties are still open.

    Raises:
        RecipeError, PlanError: as for `make_plan`.
    """
    problems: list[Diagnostic] = []
    notes: list[Diagnostic] = []
    stages = expand(recipe, resolve, config, dims)
    plan: Plan | None = None
    current = specs
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        planned = _Stage(stage, current, target if last else None, problems, notes).plan()
        if not last and not problems:
            planned = fit(planned, stage, None, "lossless", problems)
        plan = planned if plan is None else chained(plan, planned, problems)
        current = {**planned.specs, **{alias: planned.specs[base] for alias, base in plan.ties.items()}}
        if problems:
            break
    assert plan is not None
    if problems:
        raise PlanError([*problems, *notes])
    return replace(plan, warnings=tuple(notes), source=dict(specs), recipe=recipe), stages[-1]


@dataclass
class _Stage:
    """Plans one stage; problems are collected, never raised one by one."""

    stage: Stage
    specs: Mapping[str, TensorSpec]
    target: Target | None
    problems: list[Diagnostic]
    notes: list[Diagnostic]
    steps: list[Step] = field(default_factory=list)
    uses: list[RuleUse] = field(default_factory=list)

    def plan(self) -> Plan:
        claims = claim(self.stage, self.specs, self.problems)
        if claims.leftover:
            self.problems += unexpected(claims.leftover, dict(self.specs))
        for bound, matched in zip(self.stage.rules, claims.terms):
            if all(matched) or (any(matched) and len(matched) > 1):
                self.rule(bound, matched)
        rests: dict[int, tuple[BoundRule, list[Matches]]] = {}
        for bound, matches in claims.rests:
            rests.setdefault(id(bound), (bound, []))[1].append(matches)
        for bound, found in rests.values():
            self.rule(bound, [found], is_rest=True)
        self.check_choices(claims.terms)
        order = {key: n for n, key in enumerate(self.specs)}
        self.steps.sort(key=lambda s: order[s.sources[0]])
        return Plan(
            steps=tuple(self.steps), uses=tuple(self.uses), dropped=claims.dropped, proofs=self.proofs(claims.same),
            specs=self.outputs(),
        )  # fmt: skip

    def proofs(self, same: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        for alias, base in same.items():
            if base not in self.specs:
                self.problems.append(Diagnostic("missing-partner", f"{alias!r} must equal {base!r}, which the source lacks"))
            elif self.specs[base] != self.specs[alias]:
                self.problems.append(Diagnostic("not-the-same", f"{alias!r} must equal {base!r}", facts=(
                    ("shapes", f"{self.specs[alias]} against {self.specs[base]}"),)))  # fmt: skip
        return tuple(same.items())

    def outputs(self) -> dict[str, TensorSpec]:
        """Keys made, with their specs; two rules that make one key are a problem."""
        made: dict[str, TensorSpec] = {}
        maker: dict[str, int] = {}
        collisions: dict[tuple[int, int], list[str]] = {}
        for step in self.steps:
            for key, spec in zip(step.targets, step.program.outputs):
                if key in made:
                    collisions.setdefault((maker[key], step.rules[0]), []).append(key)
                made[key], maker[key] = spec, step.rules[0]
        for (a, b), keys in collisions.items():
            rules = (self.uses[a].text, self.uses[b].text) if a != b else (self.uses[a].text,)
            self.problems.append(
                Diagnostic("made-twice", f"{len(keys)} target key{'s are' if len(keys) > 1 else ' is'} made twice: {keys[0]!r}",
                           place=self.uses[b].place, notes=rules, help="keep apart what the captures keep apart, or drop one")
            )  # fmt: skip
        return made

    def rule(self, bound: BoundRule, matched: list[list[Matches]], *, is_rest: bool = False) -> None:
        number = len(self.uses)
        rule = bound.rule
        self.uses.append(RuleUse(bound.text, rule.place, bound, is_rest))
        try:
            ops = RuleOps(*(tuple(self.op(c, bound) for c in calls) for calls in (rule.before, rule.after)))
            self.check_joins(bound, ops)
        except OpError as error:
            self.problem("bad-op", str(error), bound)
            return
        found = [[canonical(term, m) for m in matches] for term, matches in zip(rule.sources, matched)]
        flats = Flattening.of(bound, found, self.target.specs if self.target else {}, self.problems)
        if flats is not None:
            _Builder(self, bound, ops, number, flats).run([[flats.split(m) for m in matches] for matches in found])

    def op(self, call: Any, bound: BoundRule) -> Any:
        numbers: dict[str, Any] = _OpNumbers(bound)
        return make_op(call.name, call.args, dict(call.keywords), numbers)

    def check_joins(self, bound: BoundRule, ops: RuleOps) -> None:
        if len(bound.rule.sources) > 1 and not (ops.joined_before or ops.joined_after):
            raise OpError(f"{len(bound.rule.sources)} sources need an op that joins them, such as '| same'")

    def check_choices(self, terms: Sequence[Sequence[Sequence[Matches]]]) -> None:
        """A choice that matches no key is a misspelling; a table of `[names]` may spread over several rules."""
        shared: dict[tuple[str, tuple[str, ...]], set[str]] = {}
        places: dict[tuple[str, tuple[str, ...]], BoundRule] = {}
        for bound, matched in zip(self.stage.rules, terms):
            for term, found in zip(bound.rule.sources, matched):
                for capture in term.pattern.captures:
                    if capture.choices is None or bound.rule.optional or not found:
                        continue
                    seen = {v for m in found for v in _texts(m.columns[capture.name])}
                    if capture.name in bound.lists:
                        shared.setdefault((capture.name, capture.choices), set()).update(seen)
                        places[(capture.name, capture.choices)] = bound
                    else:
                        self.unused_choices(capture.name, capture.choices, seen, bound)
        for (name, choices), seen in shared.items():
            self.unused_choices(name, choices, seen, places[(name, choices)])

    def unused_choices(self, name: str, choices: Sequence[str], seen: set[str], bound: BoundRule) -> None:
        for choice in choices:
            if choice not in seen:
                self.problem("unused-choice", f"choice {choice!r} of {{{name}}} matches no source key", bound,
                             help="a misspelling? '?' in front of the rule lets it match less")  # fmt: skip

    def problem(self, code: str, headline: str, bound: BoundRule, *, help: str | None = None, **more: Any) -> None:
        notes = () if bound.text in headline else (bound.text,)
        self.problems.append(Diagnostic(code, headline, place=bound.rule.place, notes=notes, help=help, **more))


class _OpNumbers(dict[str, Any]):
    """The numbers that a bare word among an op's arguments may stand for."""

    def __init__(self, bound: BoundRule) -> None:
        super().__init__()
        self.bound = bound

    def get(self, key: str, default: Any = None) -> Any:
        if key in self.bound.signature.over:
            return default
        value = self.bound.dims.get(key)
        return default if value is None else value

    def __contains__(self, key: object) -> bool:
        return self.get(str(key)) is not None

    def __getitem__(self, key: str) -> Any:
        return self.get(key)


def _texts(column: Any) -> set[str]:
    return {column} if isinstance(column, str) else set(column)


UNBUILT = object()


@dataclass
class _Builder:
    """Turns the matches of one rule into steps."""

    stage: _Stage
    bound: BoundRule
    ops: RuleOps
    number: int
    flats: Flattening
    programs: dict[Any, Any] = field(default_factory=dict)

    def run(self, matched: list[list[Matches]]) -> None:
        signature = self.bound.signature
        single = len(self.bound.rule.sources) == len(self.bound.rule.targets) == 1
        if single and not signature.gathered and not signature.scattered:
            for matches in matched[0]:
                self.one_by_one(matches)
            return
        groups, problems = group_rows(
            self.bound.rule.sources, matched, signature.loops, signature.gathered, self.ops.joined_before
        )
        place = self.bound.rule.place
        self.stage.problems += [replace(p, place=p.place or place) for p in problems]
        if not problems:
            self.check_extents(groups)
            for group in groups:
                self.step(group)

    def check_extents(self, groups: Sequence[Group]) -> None:
        for name in {n for g in groups for n in g.extents}:
            known = self.bound.dims.get(name)
            found = next(g.extents[name] for g in groups if name in g.extents)
            if isinstance(known, int) and known != found:
                self.stage.problem("wrong-extent", f"dims say {name} = {known}, the keys have {found}", self.bound)

    def one_by_one(self, matches: Matches) -> None:
        """The quick way for rules that take one tensor to one: keys by column, programs by spec."""
        term = self.bound.rule.targets[0]
        keys = spell_columns(term.pattern, self.flats.join(term.pattern, matches), _spell)
        columns = [matches.columns[n] for n in self.marker_names() if n in matches.columns]
        markers = list(zip(*(c if isinstance(c, list) else [c] * len(keys) for c in columns))) if columns else [()] * len(keys)
        specs, wanted = self.stage.specs, self.stage.target.specs if self.stage.target else {}
        steps, rules, programs = self.stage.steps, (self.number,), self.programs
        for at, (source, made, marks) in enumerate(zip(matches.keys, keys, markers)):
            spec, want = specs[source], wanted.get(made)
            place = (spec.shape, spec.dtype, marks, want and (want.shape, want.dtype))
            built = programs.get(place, UNBUILT)
            if built is UNBUILT:
                values: Values = {n: c if isinstance(c, str) else c[at] for n, c in matches.columns.items()}
                group = Group(values, [[(source,)]], [()], [((),)])
                built = programs[place] = self.build(group, (spec,), ({(): want} if want else {},))
            if built is not None:
                steps.append(Step((source,), (made,), built.program, rules))

    def marker_names(self) -> list[str]:
        terms = (*self.bound.rule.sources, *self.bound.rule.targets)
        return sorted({a.marker for t in terms if t.axes for a in t.axes.axes if a.marker})

    def step(self, group: Group) -> None:
        inputs = tuple(self.stage.specs[k] for k in group.keys)
        wanted = [self.wanted(n, group) for n in range(len(self.bound.rule.targets))]
        place = (
            inputs,
            tuple(group.extents.items()),
            tuple(group.values.get(n) for n in self.marker_names()),
            tuple(tuple(w.items()) for w in wanted),
        )
        if place not in self.programs:
            self.programs[place] = self.build(group, inputs, wanted)
        built = self.programs[place]
        if built is not None:
            self.stage.steps.append(Step(group.keys, self.made(group, built), built.program, (self.number,)))

    def build(self, group: Group, inputs: tuple[TensorSpec, ...], wanted: Sequence[Mapping[tuple[int, ...], TensorSpec]]) -> Built | None:
        targets = self.stage.target.specs if self.stage.target else None
        try:
            built = ProgramBuilder(self.bound, self.ops, targets).build(group, inputs, wanted)
        except SizeError as error:
            d = error.diagnostic
            reads = self.reads(group, inputs)
            missing = self.lacking()
            self.stage.problems.append(replace(d, place=self.bound.rule.place, notes=(self.bound.text, *d.notes),
                                               facts=(("reads", reads), *missing, *d.facts)))  # fmt: skip
            return None
        except OpError as error:
            self.stage.problem("bad-op", str(error), self.bound, facts=(("reads", self.reads(group, inputs)),))
            return None
        for text in built.assumed:
            note = Diagnostic("assumed-split", text, place=self.bound.rule.place, severity="note", notes=(self.bound.text,))
            if note not in self.stage.notes:
                self.stage.notes.append(note)
        return built

    def lacking(self) -> tuple[tuple[str, str], ...]:
        """Expressions over the config that stayed without a value."""
        names = {a.name for t in (*self.bound.rule.sources, *self.bound.rule.targets) if t.axes for a in t.axes.axes}
        missing = [(n, self.bound.dims.missing(n)) for n in sorted(names)]
        return tuple(("config", f"lacks what {n} = {text!r} needs") for n, text in missing if text)

    def reads(self, group: Group, inputs: Sequence[TensorSpec]) -> str:
        pairs = [f"{k} {list(s.shape)}" for k, s in zip(group.keys, inputs)]
        return ", ".join(pairs[:4]) + (f", … ({len(pairs)} in all)" if len(pairs) > 4 else "")

    def wanted(self, number: int, group: Group) -> dict[tuple[int, ...], TensorSpec]:
        """What the target wants of one term, by scattered index, as far as it has such keys without a gap."""
        target = self.stage.target
        if target is None:
            return {}
        term = self.bound.rule.targets[number]
        names = [n for n in self.bound.signature.scattered if n in term.pattern.names]
        found: dict[tuple[int, ...], TensorSpec] = {}
        self._probe(names, (), term.pattern, group, target, found)
        return found

    def _probe(self, names: list[str], index: tuple[int, ...], pattern: Any, group: Group, target: Target,
               found: dict[tuple[int, ...], TensorSpec]) -> bool:  # fmt: skip
        if len(index) == len(names):
            key = self.spelled(pattern, {**group.values, **dict(zip(names, index))}, names)
            if key in target.specs:
                found[index] = target.specs[key]
            return key in target.specs
        count = self.bound.signature.counts.get(names[len(index)])
        any_found, value = False, 0
        while count is None or value < count:
            hit = self._probe(names, (*index, value), pattern, group, target, found)
            any_found |= hit
            if not hit and count is None:
                break
            value += 1
        return any_found

    def made(self, group: Group, built: Built) -> tuple[str, ...]:
        terms = self.bound.rule.targets
        keys = [
            [self.spelled(t.pattern, {**group.values, **dict(zip(names, index))}, names) for index in indices]
            for t, (names, indices) in zip(terms, built.grids)
        ]
        if built.interleaved:
            return tuple(k for row in zip(*keys) for k in row)
        return tuple(k for row in keys for k in row)

    def spelled(self, pattern: Any, values: Mapping[str, int | str], scattered: Sequence[str]) -> str:
        texts: dict[str, str] = {}
        for capture in pattern.captures:
            value = values.get(capture.name)
            if capture.flat:
                texts[capture.name] = self.flats.joined(capture.name, values)
            elif capture.choices is not None:
                texts[capture.name] = capture.choices[int(value or 0)]
            elif capture.name in scattered and capture.span is not None:
                texts[capture.name] = str(int(value or 0) + int(capture.span.first))
            else:
                texts[capture.name] = str(value)
        return str(pattern.spell(texts))


def _spell(capture: Capture, value: str) -> str:
    if capture.choices is not None:
        return capture.choices[int(value)]
    if capture.terms is not None and not is_index(value):
        raise RecipeError(Diagnostic("not-a-number", f"{{{capture}}} computes with {value!r}, which is no number"))
    return capture.spell(value)

