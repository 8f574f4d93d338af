"""Flat indices: `{(s b)}` in a key is one number over several, and each stage may have its own extent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import Diagnostic
from ..language.keys import KeyPattern
from ..language.rules import Term
from .expanding import BoundRule
from .joining import FlatIndex, flat_extents
from .matching import Matches

__all__ = ["Flattening"]


@dataclass(frozen=True)
class Flattening:
    """The flat indices of one rule, with their extents."""

    indices: Mapping[str, FlatIndex]

    @classmethod
    def of(
        cls, bound: BoundRule, matched: Sequence[Sequence[Matches]], target_keys: Iterable[str], problems: list[Diagnostic]
    ) -> Flattening | None:  # fmt: skip
        """Find the extents: from `dims`, or counted where the indices stand apart, in source keys or in target keys."""
        rule = bound.rule
        flats = {c.name: c.flat for t in (*rule.sources, *rule.targets) for c in t.pattern.captures if c.flat}
        if not flats:
            return cls({})
        found: dict[str, FlatIndex] = {}
        for name, flat in flats.items():
            counted: dict[str, int | tuple[int, ...]] = {}
            for rows in (_source_rows(matched), _target_rows(rule.targets, target_keys)):
                counted = counted or _counted(flat, rows)
            index = flat_extents(flat, bound.dims, counted)
            if index is None:
                problems.append(
                    Diagnostic("unsolved-axis", f"{{{name}}}: nothing says how many {flat[1]} each {flat[0]} has",
                               place=rule.place, notes=(bound.text,), help=f"--dim {flat[1]}=2,2,6,2")
                )  # fmt: skip
                return None
            found[name] = index
        return cls(found)

    def split(self, matches: Matches) -> Matches:
        """The matches with a column for each name of a flat index; what lies beyond its end is no match."""
        for name in [n for n in matches.columns if n in self.indices]:
            index = self.indices[name]
            column = matches.columns[name]
            wide = column if isinstance(column, list) else [column] * len(matches.keys)
            parts = [index.split(int(text)) for text in wide]
            kept = [n for n, part in enumerate(parts) if part is not None]
            columns = {n: c if isinstance(c, str) else [c[i] for i in kept] for n, c in matches.columns.items() if n != name}
            for level, inner in enumerate(index.names):
                columns[inner] = [str(part[level]) for part in parts if part is not None]
            matches = replace(matches, keys=[matches.keys[i] for i in kept], columns=columns)
        return matches

    def join(self, pattern: KeyPattern, matches: Matches) -> Matches:
        """The matches with a column for each flat index that `pattern` spells."""
        wanted = [c.name for c in pattern.captures if c.flat]
        if not wanted:
            return matches
        columns = dict(matches.columns)
        for name in wanted:
            parts = [columns[n] for n in self.indices[name].names]
            wide = [p if isinstance(p, list) else [p] * len(matches.keys) for p in parts]
            columns[name] = [str(self.indices[name].join([int(v) for v in row])) for row in zip(*wide)]
        return replace(matches, columns=columns)

    def joined(self, name: str, values: Mapping[str, int | str]) -> str:
        """The flat index behind these values, as text."""
        index = self.indices[name]
        return str(index.join([int(values[n]) for n in index.names]))


def _source_rows(matched: Sequence[Sequence[Matches]]) -> Iterator[Mapping[str, str]]:
    return (values for matches in matched for m in matches for _, values in m.rows())


def _target_rows(terms: Sequence[Term], keys: Iterable[str]) -> Iterator[Mapping[str, str]]:
    patterns = [t.pattern for t in terms]
    for key in keys:
        for pattern in patterns:
            values = pattern.match(key)
            if values is not None:
                yield values


def _counted(flat: Sequence[str], rows: Iterable[Mapping[str, str]]) -> dict[str, int | tuple[int, ...]]:
    """The extents of the inner indices, where the rows bind all of them apart."""
    seen: dict[int, list[int]] = {}
    for values in rows:
        if not all(n in values and values[n].isdigit() for n in flat):
            return {}
        outer = int(values[flat[0]])
        sizes = seen.setdefault(outer, [0] * (len(flat) - 1))
        for level, name in enumerate(flat[1:]):
            sizes[level] = max(sizes[level], int(values[name]) + 1)
    if not seen:
        return {}
    stages = [seen.get(o, [0] * (len(flat) - 1)) for o in range(max(seen) + 1)]
    return {name: tuple(s[level] for s in stages) for level, name in enumerate(flat[1:])}
