"""Flat indices: `{(s b)}` in a key is one number over several, and each stage may have its own extent."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import Diagnostic, RecipeError
from ..language.folding import fold
from ..language.keys import Capture, KeyPattern, is_index
from ..language.rules import Term
from .expanding import BoundRule
from .joining import FlatIndex, flat_extents
from .matching import Matches

__all__ = ["Counted", "Flattening"]

Places = dict[int, set[tuple[int, ...]]]
"""For each outer index the inner ones that were seen with it."""


@dataclass(frozen=True)
class Counted:
    """What the keys of a stage say about flat indices: how many inner ones each outer one has.

    Rules that spell a flat index behind the same text count together: one of them alone may pass over some blocks.
    """

    sources: Mapping[tuple[str, str], Places] = field(default_factory=dict)
    targets: Mapping[tuple[str, str], Places] = field(default_factory=dict)

    @classmethod
    def of(cls, rules: Iterable[tuple[BoundRule, Sequence[Sequence[Matches]]]], target_keys: Collection[str]) -> Counted:
        """Count where the indices stand apart: in the keys that rules matched, and in those of the target."""
        sources: dict[tuple[str, str], Places] = {}
        targets: dict[tuple[str, str], Places] = {}
        for bound, matched in rules:
            for name, flat, text in _flats(bound):
                _count(flat, _source_rows(matched), sources.setdefault((name, text), {}))
                _count(flat, _target_rows(bound.rule.targets, target_keys), targets.setdefault((name, text), {}))
        return cls(sources, targets)

    def flattening(self, bound: BoundRule) -> Flattening:
        """The flat indices of a rule, their extents from `dims`, else counted.

        Raises:
            RecipeError: nothing says how many there are.
        """
        found: dict[str, FlatIndex] = {}
        for name, flat, text in _flats(bound):
            counted = _extents(flat, self.sources[(name, text)]) or _extents(flat, self.targets[(name, text)])
            index = flat_extents(flat, bound.dims, counted)
            if index is None:
                raise RecipeError(
                    Diagnostic("unsolved-axis", f"{{{name}}}: nothing says how many {flat[1]} each {flat[0]} has",
                               help=f"--dim {flat[1]}=2,2,6,2")
                )  # fmt: skip
            found[name] = index
        return Flattening(found)


@dataclass(frozen=True)
class Flattening:
    """The flat indices of one rule, with their extents."""

    indices: Mapping[str, FlatIndex]

    def split(self, matches: Matches) -> Matches:
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
                    Diagnostic("wrong-extent", f"{folded[0]} lies beyond the end of {{{name}}}, which has {index.count} indices",
                               notes=tuple(folded[1:6]), help=f"--dim {index.names[1]}=… says how many each {index.names[0]} has")
                )  # fmt: skip
            columns = {n: c for n, c in matches.columns.items() if n != name}
            for level, inner in enumerate(index.names):
                texts = {text: str(part[level]) for text, part in known.items() if part is not None}
                columns[inner] = [texts[text] for text in wide]
            matches = replace(matches, columns=columns)
        return matches

    def join(self, pattern: KeyPattern, matches: Matches) -> Matches:
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
        """The flat index behind these values, as text.

        Raises:
            RecipeError: a value is no number, or lies beyond its extent.
        """
        index = self.indices[name]
        texts = [str(values[n]) for n in index.names]
        said = ", ".join(f"{n} = {t}" for n, t in zip(index.names, texts))
        if not all(map(is_index, texts)):
            raise RecipeError(Diagnostic("not-a-number", f"{{{name}}} counts, and {said} is no number without leading zeros"))
        number = index.join([int(t) for t in texts])
        if number is None:
            raise RecipeError(
                Diagnostic("wrong-extent", f"{said} lies beyond the extents of {{{name}}}: {index.shown}",
                           help=f"--dim {index.names[1]}=… says how many each {index.names[0]} has")
            )  # fmt: skip
        return str(number)


def _flats(bound: BoundRule) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Name, indices, and the text in front of each flat index of a rule."""
    for term in (*bound.rule.sources, *bound.rule.targets):
        text = ""
        for piece in term.pattern.pieces:
            if isinstance(piece, Capture) and piece.flat:
                yield piece.name, piece.flat, text
            text += f"{{{piece}}}" if isinstance(piece, Capture) else piece.text


def _source_rows(matched: Sequence[Sequence[Matches]]) -> Iterator[Mapping[str, str]]:
    return (values for matches in matched for m in matches for _, values in m.rows())


def _target_rows(terms: Sequence[Term], keys: Iterable[str]) -> Iterator[Mapping[str, str]]:
    for key in keys:
        for term in terms:
            for values in term.pattern.readings(key)[:1]:
                yield values


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
