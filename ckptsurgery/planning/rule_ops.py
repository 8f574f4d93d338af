"""The ops of a rule, and what planning asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from ..language.calls import Call, Expression, Indexed, Name, parts_of
from ..language.domains import numbers_of
from ..language.keys import is_index
from ..language.rules import Rule
from ..ops.base import Op, OpError, SourceNote
from ..ops.keyed import Seeded, asks_at
from ..ops.over_axes import Same
from ..ops.registry import find_op, make_op
from .arguments import Arguments, Captured
from .expanding import ResolvedRule
from .joining import Group

__all__ = ["Notes", "OpsOfRule", "RuleOps", "spellings"]

Notes = Callable[[str], SourceNote]
"""Called with the key of a source; gives facts about it beside its spec."""


@dataclass(frozen=True)
class RuleOps:
    """The ops of a rule, made from their calls."""

    before: tuple[Op, ...]
    after: tuple[Op, ...]

    @property
    def joined_before(self) -> bool:
        """Whether the sources meet in an op before the rearrangement."""
        return any(op.joins for op in self.before)

    @property
    def joined_after(self) -> bool:
        """Whether the arrivals meet in an op after it."""
        return any(op.joins for op in self.after)

    @property
    def keep_shapes(self) -> bool:
        """Whether the target's shapes are those that the rearrangement makes: no op after it changes them."""
        after = (op for op in self.after if op.axis_role not in ("reduce", "repeat"))
        return all(op.elementwise or isinstance(op, Same) for op in after)

    @property
    def reads_ahead(self) -> bool:
        """Whether an op asks for more of its sources than their specs."""
        return any(op.reads_ahead for op in (*self.before, *self.after))

    def told(self, group: Group, notes: Notes | None) -> RuleOps:
        """The ops with what they ask of the sources of a group.

        Args:
            notes: None where the sources are not at hand: then the ops stay as they are.

        Raises:
            OpError: a source that is not what an op takes; sources of one group that lead to different ops.
        """
        if notes is None or not self.reads_ahead:
            return self
        rows = [keys for term in group.rows for keys in term]
        before = tuple(_told(op, rows, notes) for op in self.before)
        return RuleOps(before, tuple(_told(op, [group.keys], notes) for op in self.after))

    def over(self, role: str) -> tuple[Op, ...]:
        """The ops over an axis, in order."""
        return tuple(op for op in (*self.before, *self.after) if op.axis_role == role)


def _told(op: Op, rows: Sequence[tuple[str, ...]], notes: Notes) -> Op:
    """An op with notes on the sources of each row that it is given; on each source alone where it does not join."""
    if not op.reads_ahead:
        return op
    given = rows if op.joins else [(key,) for keys in rows for key in keys]
    told = {op.told(tuple(_notes(op, keys, notes))): keys for keys in given}
    if len(told) > 1:
        (one, first), (other, second) = list(told.items())[:2]
        raise OpError(f"{first[0]} asks for {one}, {second[0]} for {other}: give them rules of their own")
    return next(iter(told), op)


def _notes(op: Op, keys: tuple[str, ...], notes: Notes) -> Iterator[SourceNote]:
    for place in op.reads_ahead:
        yield notes(keys[place]) if -len(keys) <= place < len(keys) else SourceNote()


@dataclass
class OpsOfRule:
    """Makes the ops of a rule; where an argument depends on what a key captures, for each value anew."""

    bound: ResolvedRule
    seed: int = 0
    made: dict[tuple[int | str | None, ...], RuleOps] = field(default_factory=dict)

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """The captured names on whose values arguments depend."""
        found: set[str] = set()
        for value in (v for call in (*self.bound.rule.before, *self.bound.rule.after) for v in parts_of(call)):
            if isinstance(value, Indexed):
                found.update(value.markers)
            elif isinstance(value, Name | Expression) and str(value) not in self.bound.data:
                found |= self.bound.dims.asked_by(value)
        return tuple(sorted(found & set(self.bound.signature.loops)))

    @cached_property
    def reads_ahead(self) -> bool:
        """Whether an op asks for more of its sources than their specs."""
        return any(find_op(call.name).reads_ahead for call in (*self.bound.rule.before, *self.bound.rule.after))

    def at(self, values: Mapping[str, int | str]) -> RuleOps:
        """The ops for these values of the loop variables.

        Raises:
            OpError: no such op, or arguments that it does not take.
        """
        place = tuple(values.get(name) for name in self.asked)
        if place not in self.made:
            captured = {n: _captured(self.bound.rule, n, values[n]) for n in self.asked if n in values}
            arguments = Arguments(self.bound.dims, self.bound.data, captured)
            sides = (self.bound.rule.before, self.bound.rule.after)
            self.made[place] = RuleOps(*(tuple(self._op(call, arguments) for call in calls) for calls in sides))
        return self.made[place]

    def picks(self) -> Iterator[tuple[str, set[str]]]:
        """Yield each table of dims that one captured name picks from, with the entries that its values can pick."""
        for value in (v for call in (*self.bound.rule.before, *self.bound.rule.after) for v in parts_of(call)):
            if isinstance(value, Indexed) and value.markers[0] in self.asked and len(value.markers) == 1:
                name, at = value.markers[0], self.asked.index(value.markers[0])
                found = (_captured(self.bound.rule, name, x) for made in self.made if (x := made[at]) is not None)
                picked = chain(chain.from_iterable(one.texts for one in found), *spellings(self.bound.rule, name))
                if isinstance(self.bound.dims.value(value.table), Mapping):
                    yield value.table, set(picked)

    def _op(self, call: Call, arguments: Arguments) -> Op:
        op = make_op(call.name, call.args, dict(call.keywords), arguments)
        if op.axis_role is not None:
            op = op.ordered(spellings(self.bound.rule, str(getattr(op, "axis", ""))))
        return Seeded(op, self.seed) if asks_at(op) else op


def _captured(rule: Rule, name: str, value: int | str) -> Captured:
    """A captured value: what its table entries may be called, and its number where it has one."""
    spelled = spellings(rule, name)
    if not spelled:
        return Captured((str(value),), int(value) if is_index(str(value)) else None)
    at, numbers = int(value), numbers_of(rule, name)
    texts = dict.fromkeys(choices[at] for choices in spelled if at < len(choices))
    return Captured(tuple(texts), numbers[at] if numbers is not None else None, at)


def spellings(rule: Rule, name: str) -> Sequence[tuple[str, ...]]:
    """The lists of choices of a name, wherever one is written."""
    found: list[tuple[str, ...]] = []
    for term in (*rule.sources, *rule.targets):
        found += [c.choices for c in term.pattern.captures if c.name == name and c.choices is not None]
        found += [a.choices for a in (term.axes.axes if term.axes else ()) if a.name == name and a.choices is not None]
    return found
