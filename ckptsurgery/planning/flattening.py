"""Flat indices: `{(s b)}` in a key is one number over several, and each stage may have its own extent."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

from ..errors import Diagnostic, RecipeError, Remedy
from ..language.dims import Dims
from ..language.domains import numbers_of
from ..language.folding import fold
from ..language.keys import Capture, KeyPattern, is_index
from ..language.rules import Term
from .expanding import ResolvedRule
from .matching import MatchedColumns

__all__ = ["FlatIndex", "FlatIndexCounts", "Flattening", "no_place"]


@dataclass(frozen=True)
class FlatIndex:
    """One index over several: `(s b)` counts b within s, where each s may have its own number of b.

    >>> flat = FlatIndex(("s", "b"), (None, (2, 3)))
    >>> flat.split(3), flat.join((1, 2))
    ((1, 1), 4)
    """

    names: tuple[str, ...]
    extents: tuple[int | tuple[int, ...] | None, ...]

    @property
    def count(self) -> int | None:
        """How many flat indices there are, None where the outermost has no end."""
        return None if self.stages is None else self._before(self.stages)

    @cached_property
    def stages(self) -> int | None:
        """How many outermost indices there are, None where nothing says so."""
        known = [len(e) if isinstance(e, tuple) else e if n == 0 else None for n, e in enumerate(self.extents)]
        return min((k for k in known if k is not None), default=None)

    @property
    def shown(self) -> str:
        """The extents for a reader."""
        return ", ".join(
            f"{n} {e if isinstance(e, int) else list(e)}" for n, e in zip(self.names, self.extents) if e is not None
        )

    def split(self, number: int) -> tuple[int, ...] | None:
        """The indices behind a flat one, None beyond its end."""
        if not self._even:
            outer = bisect_right(self._starts, number) - 1  # past empty ones, which begin here too
            if outer == self.stages:
                return None
            return (outer, *self._unravel(number - self._starts[outer], outer))
        each = self._inner(0)
        if each < 1 or (self.stages is not None and number >= self.stages * each):
            return None
        outer, number = divmod(number, each)
        return (outer, *self._unravel(number, outer))

    def join(self, indices: Sequence[int]) -> int | None:
        """The flat index, None where one of the indices lies beyond its extent."""
        outer = indices[0]
        if (self.stages is not None and outer >= self.stages) or any(
            index >= self._extent(level, outer) for level, index in enumerate(indices[1:], 1)
        ):
            return None
        before = self._before(outer)
        inner = 0
        for level, index in enumerate(indices[1:], 1):
            inner = inner * self._extent(level, indices[0]) + index
        return before + inner

    def _extent(self, level: int, outer: int) -> int:
        extent = self.extents[level]
        if isinstance(extent, tuple):
            return extent[outer] if outer < len(extent) else 0
        return extent or 0

    @cached_property
    def _even(self) -> bool:
        """Whether each outermost index has as many inner ones."""
        return not any(isinstance(extent, tuple) for extent in self.extents[1:])

    def _before(self, outer: int) -> int:
        """How many flat indices lie before an outermost one."""
        return outer * self._inner(0) if self._even else self._starts[outer]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """How many flat indices lie before each outermost one that is listed, and how many there are in all."""
        return tuple(accumulate(map(self._inner, range(self.stages or 0)), initial=0))

    def _inner(self, outer: int) -> int:
        size = 1
        for level in range(1, len(self.names)):
            size *= self._extent(level, outer)
        return size

    def _unravel(self, number: int, outer: int) -> tuple[int, ...]:
        indices: list[int] = []
        for level in range(len(self.names) - 1, 0, -1):
            number, index = divmod(number, self._extent(level, outer))
            indices.append(index)
        return tuple(reversed(indices))


Places = dict[int, set[tuple[int, ...]]]
"""For each outer index the inner ones that were seen with it."""


@dataclass(frozen=True)
class Share:
    """How many flat indices one side of a rule has, and how many of some of its parts the other.

    Where a part occurs in no other key, since an op repeats or reduces it, these numbers give its extent.

    Args:
        seen: the values of the flat index and of each part that occurs in a key without the others.
    """

    seen: dict[str, set[int]] = field(default_factory=dict)

    def count(self, name: str, flat: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
        """Take in the captures of keys."""
        for values in rows:
            for capture in (name, *flat):
                if is_index(values.get(capture, "")):
                    self.seen.setdefault(capture, set()).add(int(values[capture]))

    def number(self, name: str) -> int | None:
        """How many values were seen; None where they leave gaps."""
        found = self.seen.get(name, set())
        return len(found) if found and max(found) + 1 == len(found) else None

    def extents(self, name: str, flat: Sequence[str], dims: Dims) -> dict[str, int | tuple[int, ...]]:
        """The extents of the inner indices that `dims` do not give; none where they are not whole numbers."""
        given = {part: dims.get(part) for part in flat}
        sizes = {part: self.number(part) if size is None else size for part, size in given.items()}
        known = {part: size for part, size in sizes.items() if isinstance(size, int)}
        total, each = self.number(name), math.prod(known.values())
        unknown = [part for part, size in sizes.items() if size is None]
        if all(part in known for part in flat[1:]):
            return {**known}
        if len(unknown) > 1 or len(known) < len(flat) - 1 or total is None or not each or total % each:
            return {}
        return {**known, unknown[0]: total // each}

    def shown(self, name: str, flat: Sequence[str]) -> str:
        """The numbers for a reader."""
        parts = [f"{len(self.seen[part])} of {{{part}}}" for part in flat if part in self.seen]
        return f"{len(self.seen[name])} keys for {' and '.join(parts)}" if parts and name in self.seen else ""


@dataclass(frozen=True)
class FlatIndexCounts:
    """What the keys of a stage say about flat indices: how many inner ones each outer one has.

    Rules that spell a flat index behind the same text count together: one of them alone may pass over some blocks.
    """

    sources: Mapping[tuple[str, str], Places] = field(default_factory=dict)
    targets: Mapping[tuple[str, str], Places] = field(default_factory=dict)
    shares: Mapping[tuple[str, str], Share] = field(default_factory=dict)

    @classmethod
    def of(
        cls, rules: Iterable[tuple[ResolvedRule, Sequence[Sequence[MatchedColumns]]]], target_keys: Collection[str]
    ) -> FlatIndexCounts:
        """Count where the indices stand apart: in the keys that rules matched, and in those of the target."""
        sources: dict[tuple[str, str], Places] = {}
        targets: dict[tuple[str, str], Places] = {}
        shares: dict[tuple[str, str], Share] = {}
        for bound, matched in rules:
            for name, flat, text in _flats(bound):
                share = shares.setdefault((name, text), Share())
                for places, rows in (
                    (sources.setdefault((name, text), {}), list(_source_rows(matched))),
                    (targets.setdefault((name, text), {}), list(_target_rows(bound.rule.targets, target_keys))),
                ):
                    _count(flat, rows, places)
                    share.count(name, flat, rows)
        return cls(sources, targets, shares)

    def flattening(self, bound: ResolvedRule) -> Flattening:
        """The flat indices of a rule, their extents from `dims`, else counted.

        Raises:
            RecipeError: nothing says how many there are.
        """
        found: dict[str, FlatIndex] = {}
        assumed: list[str] = []
        for name, flat, text in _flats(bound):
            counted = _extents(flat, self.sources[(name, text)]) or _extents(flat, self.targets[(name, text)])
            index = flat_extents(flat, bound.dims, counted)
            share = self.shares[(name, text)]
            if index is None:
                index = flat_extents(flat, bound.dims, share.extents(name, flat, bound.dims))
                if index is not None:
                    assumed.append(f"{{{name}}} counts {index.shown} in each {flat[0]}, as the numbers of keys divide")
            if index is None:
                raise RecipeError(
                    Diagnostic(
                        "unsolved-axis",
                        f"{{{name}}}: nothing says how many {flat[1]} each {flat[0]} has",
                        facts=(("keys", text),) if (text := share.shown(name, flat)) else (),
                        remedies=(Remedy.size(flat[1]),),
                        advice="one number for all, or a list with one for each",
                    )
                )
            found[name] = index
        parts = {part for index in found.values() for part in index.names}
        listed = {part: numbers_of(bound.rule, part) for part in parts}
        given = {part: values for part, values in listed.items() if values is not None}
        return Flattening(found, given, tuple(assumed))


@dataclass(frozen=True)
class Flattening:
    """The flat indices of one rule, with their extents.

    Args:
        listed: the values of parts whose domain is a list of integers, by position.
        assumed: extents that nothing but divisibility supports.
    """

    indices: Mapping[str, FlatIndex]
    listed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    def split(self, matches: MatchedColumns) -> MatchedColumns:
        """The matches with a column for each name of a flat index.

        Raises:
            RecipeError: an index lies beyond the end.
        """
        for name in [n for n in matches.columns if n in self.indices]:
            index = self.indices[name]
            column = matches.columns[name]
            wide = column if isinstance(column, list) else [column] * len(matches.keys)
            known = {text: index.split(int(text)) for text in set(wide)}
            beyond = [key for key, text in zip(matches.keys, wide) if known[text] is None]
            if beyond:
                folded = [text for text, _ in fold(beyond)]
                raise RecipeError(
                    Diagnostic(
                        "wrong-extent",
                        f"{folded[0]} lies beyond the end of {{{name}}}, which has {index.count} indices",
                        notes=tuple(folded[1:6]),
                        remedies=(_inner_size(index),),
                    )
                )
            columns = {n: c for n, c in matches.columns.items() if n != name}
            for level, inner in enumerate(index.names):
                texts = {text: self._placed(inner, part[level]) for text, part in known.items() if part is not None}
                columns[inner] = [texts[text] for text in wide]
            matches = replace(matches, columns=columns)
        return matches

    def _placed(self, name: str, value: int) -> str:
        """A part of a flat index as rules carry it: the position of a choice, else the value."""
        values = self.listed.get(name)
        if values is None:
            return str(value)
        if value not in values:
            raise no_place(f"{name}:{','.join(map(str, values))}", value)
        return str(values.index(value))

    def join(self, pattern: KeyPattern, matches: MatchedColumns) -> MatchedColumns:
        """The matches with a column for each flat index that `pattern` spells."""
        wanted = [c.name for c in pattern.captures if c.flat]
        if not wanted:
            return matches
        columns = dict(matches.columns)
        for name in wanted:
            names = self.indices[name].names
            parts = [columns[n] for n in names]
            wide = [p if isinstance(p, list) else [p] * len(matches.keys) for p in parts]
            columns[name] = [self.joined(name, dict(zip(names, row))) for row in zip(*wide)]
        return replace(matches, columns=columns)

    def joined(self, name: str, values: Mapping[str, int | str]) -> str:
        """Return the flat index of these values, as text.

        Raises:
            RecipeError: a value is not a number, or not below its extent.
        """
        index = self.indices[name]
        texts = [str(self.listed[n][int(values[n])] if n in self.listed else values[n]) for n in index.names]
        said = ", ".join(f"{n} = {t}" for n, t in zip(index.names, texts))
        if not all(map(is_index, texts)):
            raise RecipeError(
                Diagnostic("not-a-number", f"{{{name}}} counts, and {said} is no number without leading zeros")
            )
        number = index.join([int(t) for t in texts])
        if number is None:
            raise RecipeError(
                Diagnostic(
                    "wrong-extent",
                    f"{said} lies beyond the extents of {{{name}}}: {index.shown}",
                    remedies=(_inner_size(index),),
                )
            )
        return str(number)


def no_place(capture: object, value: object) -> RecipeError:
    """The error for an index outside of a domain: a flat index counts its parts freely, and leaves no keys out."""
    return RecipeError(
        Diagnostic(
            "wrong-extent",
            f"{{{capture}}} has no place for index {value}, which a flat index of the rule reaches",
            help="give it a place, or name the keys that are meant by a rule of their own",
        )
    )


def _inner_size(index: FlatIndex) -> Remedy:
    outer, inner = index.names[:2]
    return Remedy("dims", {inner: None}, f"says how many each {outer} has", kind="recipe")


def _flats(bound: ResolvedRule) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Name, indices, and the text in front of each flat index of a rule."""
    for term in (*bound.rule.sources, *bound.rule.targets):
        text = ""
        for piece in term.pattern.pieces:
            if isinstance(piece, Capture) and piece.flat:
                yield piece.name, piece.flat, text
            text += f"{{{piece}}}" if isinstance(piece, Capture) else piece.text


def _source_rows(matched: Sequence[Sequence[MatchedColumns]]) -> Iterator[Mapping[str, str]]:
    return (values for matches in matched for m in matches for _, values in m.rows())


def _target_rows(terms: Sequence[Term], keys: Iterable[str]) -> Iterator[Mapping[str, str]]:
    for key in keys:
        for term in terms:
            yield from term.pattern.readings(key)[:1]


def _count(flat: Sequence[str], rows: Iterable[Mapping[str, str]], places: Places) -> None:
    for values in rows:
        if all(n in values and is_index(values[n]) for n in flat):
            outer, *inner = (int(values[n]) for n in flat)
            places.setdefault(outer, set()).add(tuple(inner))


def _extents(flat: Sequence[str], places: Places) -> dict[str, int | tuple[int, ...]]:
    """The extents of the inner indices; none where the keys seen leave gaps, for then they do not tell."""
    stages: list[tuple[int, ...]] = []
    for outer in range(max(places, default=-1) + 1):
        seen = places.get(outer, set())
        sizes = tuple(max(level) + 1 for level in zip(*seen))
        count = 1
        for size in sizes:
            count *= size
        if not seen or len(seen) < count:
            return {}
        stages.append(sizes)
    return {name: tuple(s[level] for s in stages) for level, name in enumerate(flat[1:])} if stages else {}


def flat_extents(flat: Sequence[str], dims: Dims, counted: Mapping[str, int | tuple[int, ...]]) -> FlatIndex | None:
    """The flat index with its extents from `dims` or as counted in keys; None where one is unknown."""
    outer = dims.get(flat[0])
    extents: list[int | tuple[int, ...] | None] = [outer if isinstance(outer, int) else None]
    for name in flat[1:]:
        extent = dims.get(name)
        if extent is None or isinstance(extent, dict):
            extent = counted.get(name)
        if extent is None:
            return None
        extents.append(extent)
    return FlatIndex(tuple(flat), tuple(extents))
