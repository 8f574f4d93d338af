"""Wrapper prefixes around the names that a recipe speaks of: taken off where its rules and the target show it.

A recipe for a model's own names meets files and models that have a prefix before them all, `model.` or `module.`. As
it stands such a recipe makes nothing that the target wants. Each prefix of whole segments is tried; the one under
which the recipe holds, and makes most of what the target wants, is taken. Two that do so equally well are an error.
Wrappers of single blocks stand inside of names; they are found by the shape of the names (see `only_children`), and
the same evidence decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product

from ..errors import Diagnostic, PlanError, Remedy
from ..language.keys import escape
from ..language.recipe import Recipe, Scope
from ..narrowing import present
from ..specs import TensorSpec
from ..wording import counted
from .expanding import Resolve, Stage
from .only_children import OnlyChildren, Wrappers
from .options import DEFAULTS, PlanOptions
from .plan import Plan, renaming
from .planner import draft_plan
from .record import Target
from .rule_ops import Notes
from .settlement import Offer
from .settling import settle
from .stages import chained
from .unread import Unreadable

__all__ = ["draft_unwrapped"]

Specs = Mapping[str, TensorSpec]
_DEEPEST = 4  # segments of a prefix
_MOST_INSIDES = 8  # combinations of wrappers inside of names that are tried
_LEAST_SHARE = 0.1  # of one side's keys that a prefix stands before


def draft_unwrapped(
    specs: Specs,
    recipe: Recipe,
    resolve: Resolve,
    target: Target | None = None,
    options: PlanOptions = DEFAULTS,
    *,
    unreadable: Unreadable | None = None,
    told_of: Notes | None = None,
) -> tuple[Plan, Stage]:
    """Draft a plan as `draft_plan` does, and where that makes nothing of the target, without wrapper prefixes.

    >>> spec = TensorSpec([2], "F32")
    >>> source = {"model.a.weight": spec, "model.b.weight": spec}
    >>> wanted = Target({"x.weight": spec, "y.weight": spec})
    >>> plan, _ = draft_unwrapped(source, Recipe(["a.{l} -> x.{l}", "b.{l} -> y.{l}"]), Recipe, wanted)
    >>> list(plan.specs), plan.warnings[0].headline
    (['x.weight', 'y.weight'], "prefix 'model.' taken off: the recipe's rules match the names without it")

    Raises:
        RecipeError, PlanError: as for `draft_plan`; and two prefixes that fit equally well.
    """
    drafting = _Drafting(specs, recipe, resolve, target, options, unreadable, told_of)
    try:
        drafted = drafting.draft()
    except PlanError as error:
        if target is None:
            raise
        return drafting.unwrapped(error)
    if target is None or _wanted(drafted[0], target) == len(drafted[0].specs):
        return drafted
    return drafting.unwrapped(drafted)


Drafted = tuple[Plan, Stage]


@dataclass(frozen=True)
class _Drafting:
    """The arguments of `draft_plan`."""

    specs: Specs
    recipe: Recipe
    resolve: Resolve
    target: Target | None
    options: PlanOptions
    unreadable: Unreadable | None
    told_of: Notes | None

    def draft(self) -> Drafted:
        """Draft the plan of the names as they are."""
        return draft_plan(
            self.specs,
            self.recipe,
            self.resolve,
            self.target,
            self.options,
            unreadable=self.unreadable,
            told_of=self.told_of,
        )

    def unwrapped(self, plain: Drafted | PlanError) -> Drafted:
        """Draft without wrappers: prefixes first, then segments inside of names; else what was found with them.

        Args:
            plain: the outcome for the names as they are.

        Raises:
            PlanError: nothing is drafted that makes any of the target; two prefixes fit equally well.
        """
        target = present(self.target, "a target")
        failed = plain if isinstance(plain, PlanError) else None
        reached = 0 if isinstance(plain, PlanError) else _wanted(plain[0], target)
        nearest = failed
        found: list[_Trial] = []
        for inside in chain([_AS_THEY_ARE], _insides(self)):
            bare = inside.names_without(self)
            for prefixes in _candidates(bare.specs, present(bare.target, "a target").specs):
                if inside is _AS_THEY_ARE and (reached or prefixes == _Prefixes("", "")):
                    continue  # that is the plain draft; and prefixes are not tried where some names fit as they are
                try:
                    plan, stage = inside.put_back(self, prefixes.around(bare).draft())
                except PlanError as error:
                    if nearest is not None and _unused(error) < _unused(nearest):
                        nearest = PlanError([*error.diagnostics, *prefixes.notes, *inside.notes])
                    continue
                if (made := _wanted(plan, target)) > reached:
                    found.append(_Trial(prefixes, inside, plan, stage, made))
            if any(t.reached == len(t.plan.specs) for t in found):
                break
        if found:
            return _best(found)
        if isinstance(plain, PlanError):
            raise nearest or plain
        return plain


def _best(found: Sequence[_Trial]) -> Drafted:
    """The trial that makes most of the target, with the least taken off its names.

    Raises:
        PlanError: two make as much of it, of different keys.
    """
    best = max(found, key=lambda t: (t.reached, -len(t.inside), -len(t.prefixes.source) - len(t.prefixes.target)))
    rivals = [t for t in found if t.reached == best.reached and len(t.inside) == len(best.inside)]
    rivals = [t for t in rivals if t.moves != best.moves]
    if rivals:
        raise PlanError(_ambiguous([best, *rivals]))
    notes = (*best.prefixes.notes, *best.inside.notes)
    return replace(best.plan, warnings=(*best.plan.warnings, *notes)), best.stage


@dataclass(frozen=True)
class _Prefixes:
    """What stands before all names that a recipe speaks of, on either side."""

    source: str
    target: str

    def around(self, drafting: _Drafting) -> _Drafting:
        """The recipe for the names with the prefixes: first they are taken off, and put on where they are wanted."""
        recipe, unread = drafting.recipe, drafting.unreadable
        inner = recipe.scoped(target=escape(self.target)) if self.target else recipe
        if self.source:
            bare = Scope(Recipe(rest="keep"), source=escape(self.source))
            inner = Recipe(rest="keep", scopes=[bare]).then(inner)
        unread = replace(unread, prefix=self.source) if unread is not None else None
        return replace(drafting, recipe=inner, unreadable=unread)

    @property
    def notes(self) -> tuple[Diagnostic, ...]:
        """A note about it, for people."""
        return (Diagnostic("wrapper-prefix", str(self), severity="note"),) if self.source or self.target else ()

    def __str__(self) -> str:
        if not self.target:
            return f"prefix {self.source!r} taken off: the recipe's rules match the names without it"
        put = f"prefix {self.target!r} put on what the recipe makes: the target shows it"
        return put if not self.source else f"prefix {self.source!r} taken off, and {put}"


@dataclass(frozen=True)
class _Inside:
    """Wrapper segments inside of names: key -> the key without them, on either side, where it has any."""

    source: Mapping[str, str] = field(default_factory=dict)
    target: Mapping[str, str] = field(default_factory=dict)
    wrappers: Wrappers = field(default_factory=Wrappers)

    def __len__(self) -> int:
        return len(self.wrappers.source) + len(self.wrappers.target)

    def names_without(self, drafting: _Drafting) -> _Drafting:
        """The arguments of a draft, with the names without wrappers."""
        if not len(self):
            return drafting
        mine, theirs, target = self.source, self.target, present(drafting.target, "a target")
        ties = [[mine.get(n, n) for n in names] for names in drafting.options.ties]
        held, told_of = {bare: key for key, bare in mine.items()}, drafting.told_of
        return replace(
            drafting,
            told_of=None if told_of is None else lambda key: told_of(held.get(key, key)),
            specs={mine.get(k, k): spec for k, spec in drafting.specs.items()},
            options=replace(drafting.options, ties=ties),
            target=replace(
                target,
                specs={theirs.get(k, k): spec for k, spec in target.specs.items()},
                ties=[[theirs.get(n, n) for n in names] for names in target.ties],
            ),
        )

    def put_back(self, drafting: _Drafting, drafted: Drafted) -> Drafted:
        """The plan in the names that source and target have.

        Raises:
            PlanError: what the recipe initialises has another name in the target.
        """
        plan, stage = drafted
        problems: list[Diagnostic] = []
        if self.source:
            bare = {k: self.source.get(k, k) for k in drafting.specs}
            plan = chained(renaming(drafting.specs, bare, _BARE), plan, problems)
        if self.target:
            if stage.inits:
                raise PlanError(Diagnostic("wrapper-prefix", f"[init] {stage.inits[0].text!r} names what is wrapped"))
            settled = settle(Offer(plan, stage), None)
            plan, stage, problems = settled.plan, Stage(), [*problems, *settled.problems]
            wrapped = {bare: key for key, bare in self.target.items()}
            plan = chained(plan, renaming(plan.specs, {k: wrapped.get(k, k) for k in plan.specs}, _WRAPPED), problems)
            plan = replace(plan, ties={wrapped.get(a, a): wrapped.get(b, b) for a, b in plan.ties.items()})
        if problems:
            raise PlanError(problems)
        return replace(plan, source=drafting.specs, recipe=drafting.recipe), stage

    @property
    def notes(self) -> tuple[Diagnostic, ...]:
        """A note about it, for people."""
        names = self.wrappers
        sides = (names.source, "taken out of the source's names"), (names.target, "put into the names that are made")
        texts = [f"{', '.join(map(repr, sorted(some)))} {what}" for some, what in sides if some]
        return (Diagnostic("wrapper-prefix", f"wrapper {' and '.join(texts)}", severity="note"),) if texts else ()


_AS_THEY_ARE = _Inside()
_BARE, _WRAPPED = "{a...}.WRAPPER.{b...} -> {a...}.{b...}", "{a...}.{b...} -> {a...}.WRAPPER.{b...}"


def _insides(drafting: _Drafting) -> Iterator[_Inside]:
    """Segments that may be wrappers inside of names, the likeliest first."""
    if drafting.unreadable is not None and drafting.unreadable.kinds:
        return  # these are asked for by the names that they have
    mine, theirs = dict.fromkeys(drafting.specs), dict.fromkeys(present(drafting.target, "a target").specs)
    pairs = list(product(_likely_wrappers(mine), _likely_wrappers(theirs)))
    for source, target in sorted(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))[: _MOST_INSIDES + 1]:
        sides = [_without(keys, names) for keys, names in ((mine, source), (theirs, target))]
        if (source or target) and None not in sides:
            yield _Inside(sides[0] or {}, sides[1] or {}, Wrappers(source, target))


def _likely_wrappers(keys: Iterable[str]) -> list[frozenset[str]]:
    """Sets of segments that may be wrappers: none, those with the underscore of wrappers, and another besides."""
    names = OnlyChildren(keys)
    counts: Counter[str] = Counter()
    total = 0
    for key in keys:
        segments = key.split(".")
        total += 1
        counts.update({segments[at] for at in names.places(segments) if at})  # in front it is a prefix
    own = frozenset(name for name in counts if name.startswith("_"))
    others = [n for n, many in counts.most_common(4) if n not in own and many >= _LEAST_SHARE * total][:2]
    return list(dict.fromkeys([frozenset(), own, *(own | {n} for n in others)]))


def _without(keys: Iterable[str], names: frozenset[str]) -> dict[str, str] | None:
    """The keys that have such segments -> without them; None where two keys would come to bear one name."""
    tree = OnlyChildren(keys) if names else None
    bare = {key: tree.bare(key, names) if tree else key for key in keys}
    if len(set(bare.values())) < len(bare):
        return None
    return {key: name for key, name in bare.items() if name != key}


@dataclass(frozen=True)
class _Trial:
    prefixes: _Prefixes
    inside: _Inside
    plan: Plan
    stage: Stage
    reached: int

    @property
    def moves(self) -> dict[str, tuple[str, ...]]:
        """Which source keys make each target key."""
        return {key: step.sources for step in self.plan.steps for key in step.targets}


def _unused(error: PlanError) -> int:
    """How many patterns of the recipe match nothing."""
    return sum(problem.code.startswith("unused") for problem in error.diagnostics)


def _wanted(plan: Plan, target: Target) -> int:
    return sum(key in target.specs for key in plan.specs)


def _candidates(source: Specs, target: Specs) -> Iterator[_Prefixes]:
    before = ["", *_prefixes(source)]
    # a wrapper around the target stands before all of it
    around = ["", *(p for p in _prefixes(target) if all(k.startswith(p) for k in target))]
    for b in around:
        for a in before:
            yield _Prefixes(a, b)


def _prefixes(keys: Iterable[str]) -> list[str]:
    """Prefixes of whole segments, none of them a number, that stand before a good part of the keys."""
    counts: Counter[str] = Counter()
    total = 0
    for key in keys:
        total += 1
        segments = key.split(".")[:-1]
        for n, segment in enumerate(segments[:_DEEPEST]):
            if segment.isdigit():
                break
            counts[".".join(segments[: n + 1]) + "."] += 1
    return [p for p, n in counts.items() if n >= _LEAST_SHARE * total]


def _ambiguous(found: Sequence[_Trial]) -> Diagnostic:
    notes = tuple(
        f"{t.prefixes.source or t.prefixes.target}  makes {counted(t.reached, 'key')} of the target" for t in found
    )
    named = next((t.prefixes.source for t in found if t.prefixes.source), "")
    return Diagnostic(
        "ambiguous-prefix",
        f"the recipe fits {len(found)} parts of the source equally well",
        notes=notes,
        remedies=(Remedy("subtree", named.rstrip(".")),) if named else (),
        advice=None if named else "name the keys in the recipe with their prefix",
    )
