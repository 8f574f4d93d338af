"""The planner: a recipe and specs in, a checked plan out. No data is read here, and no torch is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from ..errors import Diagnostic, PlanError, RecipeError, Remedy
from ..language.covering import exact_patterns
from ..language.folding import fold
from ..language.recipe import Recipe
from ..many_objects import gc_pause
from ..narrowing import present
from ..ops.base import OpError, SourceNote
from ..specs import TensorSpec
from .assembling import Draft, RuleSteps
from .choices import unknown_entries, unused_choices
from .claims import claim, unexpected
from .config_changes import ConfigChange, settled_edits
from .drawing import drawn
from .expanding import BoundPattern, Resolve, ResolvedRule, Stage, expand
from .flattening import FlatIndexCounts, Flattening
from .joining import canonical, counts_of
from .matching import MatchedColumns, respelled
from .options import DEFAULTS, DTYPE_POLICIES, LoadOptions, PlanOptions
from .plan import Plan
from .record import RuleUse, Target
from .rule_ops import Notes, OpsOfRule, RuleOps
from .settlement import Offer
from .settling import settle
from .stages import chained
from .steps import Step, outputs_of
from .uniting import united
from .unread import Unreadable

__all__ = ["draft_plan", "fitted", "make_plan"]


@gc_pause()
def make_plan(
    specs: Mapping[str, TensorSpec],
    recipe: Recipe,
    resolve: Resolve,
    target: Target | None = None,
    options: PlanOptions = DEFAULTS,
    *,
    unreadable: Unreadable | None = None,
    told_of: Notes | None = None,
) -> Plan:
    """Plan a recipe over headers.

    Args:
        specs: what the source holds.
        resolve: finds recipes by name, for `use`.
        target: what the target wants, where there is one: shapes and dtypes are held against it, ties are followed.
        options: what else the caller asks for.
        unreadable: tensors that cannot be read; each has to be dropped.
        told_of: gives facts about a source beside its spec, for ops that read ahead.

    Raises:
        RecipeError: the recipe breaks its law. PlanError: it does not fit the headers; all problems at once.
    """
    drafted, stage = draft_plan(specs, recipe, resolve, target, options, unreadable=unreadable, told_of=told_of)
    return fitted(drafted, stage, target, options.dtype)


def fitted(drafted: Plan, stage: Stage, target: Target | None, dtype: str, *, uncast: Collection[str] = ()) -> Plan:
    """A draft held against its target.

    Args:
        uncast: targets that keep their dtype where `dtype` is one.

    Raises:
        PlanError: what does not fit.
    """
    if target is None and dtype in DTYPE_POLICIES and not (stage.inits or stage.ties):
        return drafted  # there is nothing to settle
    settlement = settle(Offer(drafted, stage, uncast=uncast), target, LoadOptions(dtype=dtype))
    if settlement.problems:
        raise PlanError([*settlement.problems, *drafted.warnings])
    return settlement.plan


@gc_pause()
def draft_plan(
    specs: Mapping[str, TensorSpec],
    recipe: Recipe,
    resolve: Resolve,
    target: Target | None = None,
    options: PlanOptions = DEFAULTS,
    *,
    unreadable: Unreadable | None = None,
    told_of: Notes | None = None,
) -> tuple[Plan, Stage]:
    """What the rules make, before it is held against the target; and the last stage, whose inits and ties are open.

    Args:
        specs, recipe, resolve, target, options, unreadable, told_of: as for `make_plan`.

    Raises:
        RecipeError, PlanError: as for `make_plan`.
    """
    problems: list[Diagnostic] = []
    notes: list[Diagnostic] = []
    stages = expand(recipe, resolve, options.config, options.dims)
    plan: Plan | None = None
    current = specs
    tied = {name: names[0] for names in options.ties for name in names}
    lost: dict[str, str] = {}  # source key of a tensor that cannot be read -> the line that drops it
    for number, stage in enumerate(stages):
        last = number == len(stages) - 1
        before = len(problems)
        named = current
        names = unreadable.names_at(number) if unreadable is not None else {}
        wanted = target if last else None
        stage = respelled(stage, current, wanted.specs if wanted else (), problems)
        staged = _StagePlanner(
            current, wanted, problems, notes, seed=options.seed, stage=stage, tied=tied, unreadable=names
        )
        staged.told_of = told_of
        planned = staged.plan()
        if wanted is None and stage.inits:
            planned, stage = drawn(planned, stage, staged.sizes, options.seed, problems)
        lost |= {names[name]: line for name, line in staged.lost.items()}
        if not last:
            problems += [_homeless(init) for init in stage.inits]
        if not last and not problems:
            settlement = settle(Offer(planned, stage), None)
            planned = settlement.plan
            problems += settlement.problems
        plan = planned if plan is None else chained(plan, planned, problems)
        problems[before:] = [_in_stage(d, number) for d in problems[before:]] if number else problems[before:]
        if unreadable is not None and unreadable.refused and staged.unread:
            problems.append(unreadable.refusal(names, staged.unread, named))
        if last or problems:
            break
        tied = _tied_after(planned, tied)
        told_of = _told_after(planned, told_of)
        current = {**planned.specs, **{alias: planned.specs[base] for alias, base in plan.ties.items()}}
    if problems:
        raise PlanError([*problems, *notes])
    plan = present(plan, "the plan of the first stage")
    dropped = {**plan.dropped, **lost}
    return replace(plan, dropped=dropped, warnings=tuple(notes), source=specs, recipe=recipe), stage


def _tied_after(plan: Plan, tied: Mapping[str, str]) -> dict[str, str]:
    """Key -> one key for all that are one tensor with it, of what a stage makes."""
    copied = (
        (s.targets[0], tied[s.sources[0]]) for s in plan.steps if s.sources and s.sources[0] in tied and _copies_one(s)
    )
    made = {target: f"source {first}" for target, first in copied}
    for alias, base in plan.ties.items():
        made[alias] = made.setdefault(base, base)
    return made


def _told_after(plan: Plan, told_of: Notes | None) -> Notes | None:
    """The notes on what a stage makes: those on its sources, where a tensor is handed on as it is."""
    if told_of is None:
        return None
    known = {step.targets[0]: step.sources[0] for step in plan.steps if step.sources and _copies_one(step)}
    return lambda key: told_of(known[key]) if key in known else SourceNote()


def _copies_one(step: Step) -> bool:
    return len(step.targets) == 1 and step.program.copies == (0,)


def _in_stage(problem: Diagnostic, number: int) -> Diagnostic:
    """The problem with its remedies as a sentence: an entry of a later stage is no entry of the recipe."""
    if not any(remedy.kind == "recipe" for remedy in problem.remedies):
        return problem
    return replace(problem, remedies=(), advice=None, help=f"in stage {number + 1}: {problem.help}")


def _homeless(init: BoundPattern) -> Diagnostic:
    return Diagnostic(
        "init-in-stage",
        f"[init] '{init.pattern}' stands in a stage that others follow, and nothing there says its shape",
        place=init.place,
        advice="move it to the last stage, under its last name",
    )


@dataclass
class _StagePlanner(Draft):
    """Plans one stage."""

    stage: Stage = field(default_factory=Stage)
    tied: Mapping[str, str] = field(default_factory=dict)
    unreadable: Collection[str] = ()  # names of tensors that cannot be read
    lost: Mapping[str, str] = field(init=False)  # those of them that are dropped -> the line that drops them
    unread: Sequence[str] = field(init=False)  # those that are not
    ops: list[OpsOfRule] = field(default_factory=list)

    def plan(self) -> Plan:
        wanted = self.target.specs if self.target else ()
        claims = claim(self.stage, self.specs, self.problems, self.tied, wanted, self.unreadable)
        self.lost, self.unread = claims.lost, claims.unread
        if claims.leftover:
            self.problems += unexpected(claims.leftover, dict(self.specs))
        flat = [(bound, matched) for bound, matched in zip(self.stage.rules, claims.terms) if bound.flats]
        self.flats = FlatIndexCounts.of(flat, wanted) if flat else FlatIndexCounts()
        for bound, matched in zip(self.stage.rules, claims.terms):
            if all(matched) or (any(matched) and len(matched) > 1):
                self.rule(bound, matched)
        rests: dict[int, tuple[ResolvedRule, list[MatchedColumns]]] = {}
        for bound, matches in claims.rests:
            rests.setdefault(id(bound), (bound, []))[1].append(matches)
        for bound, found in rests.values():
            self.rule(bound, [found], is_rest=True)
        seen = [[[*m, *u] if m else m for m, u in zip(*pair)] for pair in zip(claims.terms, claims.unread_terms)]
        self.problems += chain(unused_choices(self.stage.rules, seen), unknown_entries(self.stage.rules, self.ops))
        self.steps = self.in_order()
        equal = self.unite() if self.shared else []
        return Plan(
            steps=tuple(self.steps),
            uses=tuple(self.uses),
            dropped=claims.dropped,
            proofs=(*self.proofs(claims.same), *equal),
            specs=self.outputs(),
            config=self.config_changes(claims.terms) if self.stage.edits else (),
        )

    def config_changes(self, matched: Sequence[Sequence[Sequence[MatchedColumns]]]) -> tuple[ConfigChange, ...]:
        """Return the changes of the config; an axis or an index stands for its size where it has one."""
        known = {**counts_of(matched), **self.sizes}
        sizes = {name: next(iter(found)) for name, found in known.items() if len(found) == 1}
        return settled_edits(self.stage.edits, sizes, self.problems)

    def proofs(self, same: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        for alias, base in same.items():
            if base not in self.specs:
                self.problems.append(
                    Diagnostic("missing-partner", f"{alias!r} must equal {base!r}, which the source lacks")
                )
            elif self.specs[base] != self.specs[alias]:
                self.problems.append(
                    Diagnostic(
                        "not-the-same",
                        f"{alias!r} must equal {base!r}",
                        facts=(("shapes", f"{self.specs[alias]} against {self.specs[base]}"),),
                    )
                )
        return tuple(same.items())

    def in_order(self) -> list[Step]:
        """The steps in the order of their first sources."""
        by_source = dict(zip(self.firsts, self.steps))
        if len(by_source) == len(self.steps) or self.problems:
            return list(filter(None, map(by_source.get, self.specs)))
        place = {key: number for number, key in enumerate(self.specs)}  # a source begins several steps
        return sorted(self.steps, key=lambda step: place[step.sources[0]])

    def outputs(self) -> dict[str, TensorSpec]:
        """Keys made, with their specs; two rules that make one key are a problem."""
        targets, specs = outputs_of(self.steps)
        made = dict(zip(targets, specs))
        if len(made) < len(targets):
            self.collisions()
        return made

    def unite(self) -> list[tuple[str, str]]:
        """Unite the steps that share what they make; pairs of source keys that must be equal."""
        makers = Counter(chain.from_iterable(step.targets for step in self.steps))
        if any(times > max(self.shared[key], 1) + (0 < self.shared[key] < times) for key, times in makers.items()):
            return []  # made twice by rules that do not share it, which is reported
        try:
            self.steps, equal = united(self.steps)
        except OpError as error:
            key = next(key for key, times in makers.items() if times > 1)
            self.problems.append(Diagnostic("not-the-same", f"{key!r} is made by two rules that share it: {error}"))
            self.steps = list({step.targets: step for step in self.steps}.values())
            return []
        return equal

    def collisions(self) -> None:
        maker: dict[str, int] = {}
        collisions: dict[tuple[int, int], list[str]] = {}
        for step in self.steps:
            for key in step.targets:
                if key in maker:
                    collisions.setdefault((maker[key], step.rules[0]), []).append(key)
                maker[key] = step.rules[0]
        for (a, b), keys in collisions.items():
            self.problems.append(self.made_twice(self.uses[a], self.uses[b], keys))

    def made_twice(self, a: RuleUse, b: RuleUse, keys: Sequence[str]) -> Diagnostic:
        folded = [text for text, _ in fold(keys)]
        many = f"{len(keys)} target key{'s' * (len(keys) > 1)}"
        rules = (a.text, b.text) if a is not b else (a.text,)
        if a.is_rest != b.is_rest:
            rest = a if a.is_rest else b
            sources = [s.sources[0] for s in self.steps if self.uses[s.rules[0]] is rest and s.targets[0] in set(keys)]
            return Diagnostic(
                "made-twice",
                f"{many} that the rest keeps {'are' if len(keys) > 1 else 'is'} made by a rule too: {folded[0]}",
                place=b.place,
                notes=(*rules, *folded[1:6]),
                remedies=(Remedy("drop", exact_patterns(sources, self.specs), kind="recipe"),),
            )
        return Diagnostic(
            "made-twice",
            f"{many} {'are' if len(keys) > 1 else 'is'} made twice: {folded[0]}",
            place=b.place,
            notes=(*rules, *folded[1:6]),
            advice="keep apart what the captures keep apart, or drop one",
        )

    def rule(self, bound: ResolvedRule, matched: list[list[MatchedColumns]], *, is_rest: bool = False) -> None:
        number = len(self.uses)
        rule = bound.rule
        self.uses.append(RuleUse(bound.text, rule.place, bound, is_rest))
        if not self.sizes_of_choices(bound):
            return
        found = [[canonical(term, m) for m in matches] for term, matches in zip(rule.sources, matched)]
        try:
            flats = self.flats.flattening(bound) if bound.flats else Flattening({})
            apart = [[flats.split(m) for m in matches] for matches in found] if flats.indices else found
        except RecipeError as error:
            self.problems += [replace(d, place=rule.place, notes=(bound.text, *d.notes)) for d in error.diagnostics]
            return
        ops = OpsOfRule(bound, self.seed)
        if rule.before or rule.after:
            self.ops.append(ops)
        joined = False if rule.only_renames else self.joins_first(bound, ops, apart)
        if joined is not None:
            RuleSteps(self, bound, ops, joined, number, flats).run(apart)

    def joins_first(
        self, bound: ResolvedRule, ops: OpsOfRule, apart: Sequence[Sequence[MatchedColumns]]
    ) -> bool | None:
        """Whether an op joins the sources before they are rearranged; None where the ops are a problem."""
        try:
            # Which ops join is the same for all values that keys capture, so the first ones tell.
            first = ops.at({n: _first(c) for matches in apart for m in matches[:1] for n, c in m.columns.items()})
            self.check_joins(bound, first)
        except OpError as error:
            given = bound.remedies(error.lacks) if error.lacks is not None and error.lacks.isidentifier() else ()
            self.problem(error.code, str(error), bound, remedies=error.remedies("rules") or given, help=error.help)
            return None
        return first.joined_before

    def sizes_of_choices(self, bound: ResolvedRule) -> bool:
        """Whether no axis that has its own size for each choice is given one number for all."""
        one = {(a.name, a.marker): bound.dims.get(a.name) for a in bound.rule.marked}
        wrong = {names: size for names, size in one.items() if isinstance(size, int)}
        for (name, marker), size in wrong.items():
            text = f"{name}:{marker} has its own size for each {marker}, and dims give one number, {name} = {size}"
            given = bound.remedies(name)
            in_place = tuple(replace(r, effect="in its place") if r.argument == "dims" else r for r in given)
            self.problem("one-size", text, bound, remedies=in_place)
        return not wrong

    def check_joins(self, bound: ResolvedRule, ops: RuleOps) -> None:
        if len(bound.rule.sources) > 1 and not (ops.joined_before or ops.joined_after):
            raise OpError(f"{len(bound.rule.sources)} sources need an op that joins them, such as '| same'")


def _first(column: Any) -> str:
    return column if isinstance(column, str) else str(column[0])
