"""From the matches of one rule to its steps: keys spelled, groups formed, a program for each kind of group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress, count, repeat
from operator import is_not
from typing import Any

from ..errors import Diagnostic, RecipeError
from ..language.folding import fold
from ..language.keys import Capture, KeyPattern, is_index
from ..ops.base import OpError
from ..specs import TensorSpec
from .building import Built, ProgramBuilder
from .expanding import ResolvedRule
from .flattening import Flattening, no_place
from .joining import Group, Values, group_rows, spell_columns
from .matching import MatchedColumns
from .record import RuleUse, Target
from .rule_ops import Notes, OpsOfRule, RuleOps
from .solving import SizeError
from .steps import Program, Step, steps_of

__all__ = ["Draft", "RuleSteps"]


@dataclass
class Draft:
    """What planning one stage has found so far; problems are collected, never raised one by one.

    Args:
        steps: rule by rule. firsts: the first source of each.
        sizes: axis -> the sizes that were solved for it.
        shared: target key -> how many steps make it that share it with another rule.
        told_of: gives facts about a source beside its spec; None without a checkpoint.
    """

    specs: Mapping[str, TensorSpec]
    target: Target | None
    problems: list[Diagnostic]
    notes: list[Diagnostic]
    steps: list[Step] = field(default_factory=list)
    firsts: list[str] = field(default_factory=list)
    uses: list[RuleUse] = field(default_factory=list)
    shared: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, set[int]] = field(default_factory=dict)
    seed: int = 0
    told_of: Notes | None = None

    def problem(self, code: str, headline: str, bound: ResolvedRule, **more: Any) -> None:
        """Note what is wrong with a rule."""
        notes = () if bound.text in headline else (bound.text,)
        self.problems.append(Diagnostic(code, headline, place=bound.rule.place, notes=notes, **more))


@dataclass
class RuleSteps:
    """Turns the matches of one rule into steps of a draft."""

    draft: Draft
    bound: ResolvedRule
    ops: OpsOfRule
    joined_before: bool
    number: int
    flats: Flattening
    programs: dict[Any, Built | None] = field(default_factory=dict)
    copies: dict[int, Program] = field(default_factory=dict)
    kinds: dict[int, int] = field(default_factory=dict)
    values: dict[TensorSpec | None, int] = field(default_factory=dict)
    unspelled: dict[str, dict[str, Diagnostic]] = field(default_factory=dict)  # by code and source key

    def run(self, matched: list[list[MatchedColumns]]) -> None:
        """Add the steps, or say why there are none.

        Args:
            matched: for each source term its matches, canonical, flat indices split.
        """
        signature = self.bound.signature
        single = len(self.bound.rule.sources) == len(self.bound.rule.targets) == 1
        if single and not signature.gathered and not signature.scattered and not self.ops.reads_ahead:
            for matches in matched[0]:
                self._one_by_one(matches)
            self._tell_unspelled()
            return
        groups, problems = group_rows(
            self.bound.rule.sources, matched, signature.loops, signature.gathered, self.joined_before
        )
        self.draft.problems += [self._in_rule(p) for p in problems]
        if problems:
            return
        self._check_extents(groups)
        for text in self.flats.assumed:
            self._note(text)
        for group in groups:
            try:
                self._step(group)
            except RecipeError as error:
                self._not_spelled(group.keys[0], error)
        self._tell_unspelled()

    def _not_spelled(self, key: str, error: RecipeError) -> None:
        for problem in error.diagnostics:
            self.unspelled.setdefault(problem.code, {})[key] = problem

    def _tell_unspelled(self) -> None:
        """Report the target keys that cannot be spelled, once for all source keys of the rule."""
        for found in self.unspelled.values():
            folded = [text for text, _ in fold(list(found))]
            facts = (("at", ", ".join(folded[:6])),)
            self.draft.problems.append(replace(self._in_rule(next(iter(found.values()))), facts=facts))

    def _in_rule(self, problem: Diagnostic) -> Diagnostic:
        """The problem with the rule's text and place."""
        return replace(problem, place=problem.place or self.bound.rule.place, notes=(self.bound.text, *problem.notes))

    def _check_extents(self, groups: Sequence[Group]) -> None:
        for name in {n for g in groups for n in g.extents}:
            known = self.bound.dims.get(name)
            found = next(g.extents[name] for g in groups if name in g.extents)
            if isinstance(known, int) and known != found:
                self.draft.problem("wrong-extent", f"dims say {name} = {known}, the keys have {found}", self.bound)

    def _one_by_one(self, matches: MatchedColumns) -> None:
        """The quick way for rules that take one tensor to one: keys by column, programs by spec."""
        term = self.bound.rule.targets[0]
        try:
            joined = self.flats.join(term.pattern, matches) if self.flats.indices else matches
            keys = spell_columns(term.pattern, joined, _spell)
        except RecipeError:
            for key, values in matches.rows():
                try:
                    spell_columns(
                        term.pattern, self.flats.join(term.pattern, MatchedColumns([key], {**values})), _spell
                    )
                except RecipeError as error:
                    self._not_spelled(key, error)
            return
        specs = list(map(self.draft.specs.__getitem__, matches.keys))
        renames = self.bound.rule.only_renames
        programs = self._copying(specs) if renames else self._programs(matches, keys, specs)
        rows = zip(zip(matches.keys), zip(keys), programs, repeat((self.number,)))
        self.draft.steps += steps_of(compress(rows, programs))
        if term.shared:
            self.draft.shared.update(compress(keys, programs))
        self.draft.firsts += compress(matches.keys, programs)

    def _copying(self, specs: Sequence[TensorSpec]) -> list[Program]:
        """For each tensor the program that hands it on as it is, one for all of a kind."""
        starts, programs = _starts([specs]), list[Program]()
        for start, end, kind in zip(starts, [*starts[1:], len(specs)], self._kinds([specs[at] for at in starts])):
            if kind not in self.copies:
                self.copies[kind] = Program.of((specs[start],), ())
            programs += [self.copies[kind]] * (end - start)
        return programs

    def _programs(
        self, matches: MatchedColumns, keys: Sequence[str], specs: Sequence[TensorSpec]
    ) -> Sequence[Program | None]:
        """The program of each match; None where there is a problem."""
        target = self.draft.target.specs if self.draft.target else None
        wanted: list[TensorSpec | None] = [] if target is None else list(map(target.get, keys))
        markers = [matches.columns[n] for n in self._marker_names() if n in matches.columns]
        starts = _starts([specs, wanted, *(column for column in markers if isinstance(column, list))])
        places = zip(
            self._kinds([specs[at] for at in starts]),
            self._kinds([wanted[at] for at in starts]) if wanted else repeat(None),
            [tuple(column if isinstance(column, str) else column[at] for column in markers) for at in starts],
        )
        programs: list[Program | None] = []
        for start, end, place in zip(starts, [*starts[1:], len(keys)], places):
            if place not in self.programs:
                self.programs[place] = self._built_at(start, matches, specs[start], wanted[start] if wanted else None)
            built = self.programs[place]
            programs += [built.program if built else None] * (end - start)
        return programs

    def _built_at(self, at: int, matches: MatchedColumns, spec: TensorSpec, want: TensorSpec | None) -> Built | None:
        """What becomes of the tensor of one match."""
        values: Values = {n: c if isinstance(c, str) else c[at] for n, c in matches.columns.items()}
        group = Group(values, [[(matches.keys[at],)]], [()], [((),)])
        ops = self._ops(group, (spec,))
        return self._build(group, (spec,), ({(): want} if want else {},), ops) if ops is not None else None

    def _marker_names(self) -> list[str]:
        """The names on whose values sizes depend."""
        terms = (*self.bound.rule.sources, *self.bound.rule.targets)
        marked = {a.marker for t in terms if t.axes for a in t.axes.axes if a.marker}
        staged = {flat[0] for flat in self.bound.flats if any(isinstance(self.bound.dims.get(n), tuple) for n in flat)}
        return sorted(marked | staged | set(self.ops.asked))

    def _step(self, group: Group) -> None:
        keys = group.keys
        inputs = tuple(map(self.draft.specs.__getitem__, keys))
        wanted = [self._wanted(n, group) for n in range(len(self.bound.rule.targets))]
        ops = self._ops(group, inputs)
        if ops is None:
            return
        place = (
            self._kinds(inputs),
            tuple(group.extents.items()),
            tuple(group.values.get(n) for n in self._marker_names()),
            tuple(tuple(w.items()) for w in wanted),
            ops if self.ops.reads_ahead else None,
        )
        if place not in self.programs:
            self.programs[place] = self._build(group, inputs, wanted, ops)
        built = self.programs[place]
        if built is not None:
            made = self._made(group, built)
            self.draft.steps.append(Step(keys, tuple(chain.from_iterable(made)), built.program, (self.number,)))
            self.draft.firsts.append(keys[0])

    def _kinds(self, specs: Sequence[TensorSpec | None]) -> tuple[int, ...]:
        """A number for each spec, the same for equal ones."""
        # Most tensors share their spec object with others; to compare all of them by value takes longer than all else.
        objects = list(map(id, specs))
        for one, spec in dict(zip(objects, specs)).items():
            if one not in self.kinds:
                self.kinds[one] = self.values.setdefault(spec, len(self.values))
        return tuple(map(self.kinds.__getitem__, objects))

    def _ops(self, group: Group, inputs: Sequence[TensorSpec]) -> RuleOps | None:
        """The ops for a group; None, and a problem, where they do not take its sources."""
        try:
            return self.ops.at(group.values).told(group, self.draft.told_of)
        except OpError as error:
            self._refused(error, group, inputs)
            return None

    def _refused(self, error: OpError, group: Group, inputs: Sequence[TensorSpec]) -> None:
        if not any(p.code == "bad-op" and p.headline == str(error) for p in self.draft.problems):
            self.draft.problem("bad-op", str(error), self.bound, facts=(("reads", self._reads(group, inputs)),))

    def _build(
        self,
        group: Group,
        inputs: tuple[TensorSpec, ...],
        wanted: Sequence[Mapping[tuple[int, ...], TensorSpec]],
        ops: RuleOps,
    ) -> Built | None:
        targets = self.draft.target.specs if self.draft.target else None
        try:
            built = ProgramBuilder(self.bound, ops, targets).build(group, inputs, wanted)
        except SizeError as error:
            d = self._in_rule(error.diagnostic)
            if error.axis is not None:
                advice = self.bound.unmarked(error.axis)
                remedies = self.bound.remedies(error.axis) if advice is None else ()
                d = replace(d, remedies=remedies, help=None, advice=advice)
            said = {(p.code, p.headline, p.notes) for p in self.draft.problems}
            if (d.code, d.headline, d.notes) not in said:
                wants = [s for found in wanted for s in found.values()] if d.code in _BOTH_SIDES else []
                facts = (("reads", self._reads(group, inputs)), *_wants(wants), *self._lacking(), *d.facts)
                self.draft.problems.append(replace(d, facts=facts))
            return None
        except OpError as error:
            self._refused(error, group, inputs)
            return None
        for name, size in built.sizes.items():
            self.draft.sizes.setdefault(name, set()).add(size)
        for text in built.assumed:
            self._note(text)
        return built

    def _note(self, text: str) -> None:
        """Report what nothing but divisibility supports."""
        note = Diagnostic("assumed-split", text, place=self.bound.rule.place, severity="note", notes=(self.bound.text,))
        if note not in self.draft.notes:
            self.draft.notes.append(note)

    def _lacking(self) -> tuple[tuple[str, str], ...]:
        """Expressions over the config that stayed without a value."""
        names = {a.name for t in (*self.bound.rule.sources, *self.bound.rule.targets) if t.axes for a in t.axes.axes}
        missing = [(n, self.bound.dims.missing(n)) for n in sorted(names)]
        return tuple(("config", f"lacks what {n} = {text!r} needs") for n, text in missing if text)

    def _reads(self, group: Group, inputs: Sequence[TensorSpec]) -> str:
        pairs = [f"{k} {list(s.shape)}" for k, s in zip(group.keys, inputs)]
        return ", ".join(pairs[:4]) + (f", … ({len(pairs)} in all)" if len(pairs) > 4 else "")

    def _wanted(self, number: int, group: Group) -> dict[tuple[int, ...], TensorSpec]:
        """What the target wants of one term, by scattered index, as far as it has such keys without a gap."""
        target = self.draft.target
        if target is None:
            return {}
        term = self.bound.rule.targets[number]
        names = [n for n in self.bound.signature.scattered if n in term.pattern.names]
        found: dict[tuple[int, ...], TensorSpec] = {}
        self._probe(names, (), term.pattern, group, target, found)
        return found

    def _probe(
        self,
        names: list[str],
        index: tuple[int, ...],
        pattern: KeyPattern,
        group: Group,
        target: Target,
        found: dict[tuple[int, ...], TensorSpec],
    ) -> bool:
        if len(index) == len(names):
            try:
                key = self._spelled(pattern, {**group.values, **dict(zip(names, index))}, names)
            except RecipeError:  # beyond the end of a flat index
                return False
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

    def _made(self, group: Group, built: Built) -> Sequence[Sequence[str]]:
        terms = self.bound.rule.targets
        keys = [
            [self._spelled(t.pattern, {**group.values, **dict(zip(names, index))}, names) for index in indices]
            for t, (names, indices) in zip(terms, built.grids)
        ]
        self.draft.shared.update(k for t, row in zip(terms, keys) if t.shared for k in row)
        return list(zip(*keys)) if built.interleaved else keys

    def _spelled(self, pattern: KeyPattern, values: Mapping[str, int | str], scattered: Sequence[str]) -> str:
        texts: dict[str, str] = {}
        for capture in pattern.firsts:
            if capture.flat:
                texts[capture.name] = self.flats.joined(capture.name, values)
                continue
            value = values[capture.name]
            if capture.choices is not None:
                texts[capture.name] = _chosen(capture, str(value))
            elif capture.name in scattered and capture.span is not None:
                texts[capture.name] = str(int(value) + int(capture.span.first))
            else:
                texts[capture.name] = str(value)
        return pattern.spell(texts)


_BOTH_SIDES = {"size-mismatch", "indivisible"}  # problems that the target's shapes may have caused


def _wants(specs: Sequence[TensorSpec]) -> Sequence[tuple[str, str]]:
    more = f", … ({len(specs)} in all)" if len(specs) > 4 else ""
    return [("target wants", ", ".join(str(list(s.shape)) for s in specs[:4]) + more)] if specs else []


def _starts(columns: Sequence[Sequence[object]]) -> list[int]:
    """Where runs start over which every column holds one and the same object."""
    changes = (compress(count(1), map(is_not, column[1:], column)) for column in columns)
    return sorted({0}.union(*changes))


def _spell(capture: Capture, value: str) -> str:
    """The text of one capture in a key."""
    if capture.choices is not None:
        return capture.spell(_chosen(capture, value))
    if capture.span is not None and is_index(value) and int(value) not in capture.span:
        raise no_place(capture, value)
    return capture.spell(value)


def _chosen(capture: Capture, position: str) -> str:
    choices = capture.choices or ()
    if int(position) >= len(choices):
        raise no_place(capture, position)
    return choices[int(position)]
