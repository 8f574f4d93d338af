"""The sizes that are given for a rule's axes: by `dims`, by choices and ranges, and by what was gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..language.domains import numbers_of
from ..language.keys import Span
from .expanding import ResolvedRule
from .joining import Group
from .rule_ops import spellings

__all__ = ["GivenSizes"]


@dataclass(frozen=True)
class GivenSizes:
    """What is known of the sizes of one rule before any shape is looked at."""

    bound: ResolvedRule

    def size(self, name: str, value: int | None, group: Group, scattered: Sequence[str]) -> int | None:
        """The size of an axis, or None.

        Args:
            value: of the name on which the size depends, where it does.
            group: what one step reads. scattered: names that only the targets' keys bind.
        """
        signature = self.bound.signature
        if value is None and name in signature.counts:
            return signature.counts[name]
        if name in group.extents:
            return group.extents[name]
        known = self.bound.dims.get(name)
        if isinstance(known, int):
            return known
        if isinstance(known, tuple):
            stage = self._stage(name, group) if value is None else self._value(name, value)
            return known[stage] if stage is not None and stage < len(known) else None
        if isinstance(known, dict) and value is not None:
            return self._by_choice(known, name, value)
        if name in scattered and value is None and name in self.spans:
            return int(self.spans[name].last) - int(self.spans[name].first) + 1
        return None

    def _stage(self, name: str, group: Group) -> int | None:
        """The outermost index of the flat index that a name is part of, where the group fixes it."""
        for outer, *inner in self.bound.flats:
            if name in inner and outer in group.values:
                return int(group.values[outer])
        return None

    def _value(self, name: str, index: int) -> int:
        """The captured integer behind an index of the name that an axis depends on; of other choices the position."""
        signature = self.bound.signature
        for marker in self._markers_of(name):
            numbers = numbers_of(self.bound.rule, marker)
            if numbers is not None:
                return numbers[index] if index < len(numbers) else index
            span = self.spans.get(marker)
            if span is not None and marker in (*signature.gathered, *signature.scattered):
                return index + int(span.first)
        return index

    def _by_choice(self, table: Mapping[str, int], name: str, index: int) -> int | None:
        spelled = [spelling for marker in self._markers_of(name) for spelling in spellings(self.bound.rule, marker)]
        for spelling in spelled:
            if index < len(spelling) and spelling[index] in table:
                return table[spelling[index]]
        return None if spelled else table.get(str(self._value(name, index)))

    def _markers_of(self, name: str) -> list[str]:
        return sorted({str(axis.marker) for axis in self.bound.rule.marked if axis.name == name})

    @cached_property
    def spans(self) -> dict[str, Span]:
        """The range of each name that has one."""
        terms = (*self.bound.rule.sources, *self.bound.rule.targets)
        return {c.name: c.span for t in terms for c in t.pattern.captures if c.span is not None}
