"""From matched keys to groups: what one step reads, which indices are gathered, what is left without a partner."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, product, repeat
from operator import itemgetter

from ..errors import Diagnostic, RecipeError
from ..language.folding import fold
from ..language.grouping import KeyGroup
from ..language.keys import Capture, KeyPattern, is_index
from ..language.rules import Term
from .expanding import ResolvedRule
from .matching import MatchedColumns, match_group

__all__ = [
    "Group",
    "Partners",
    "Row",
    "Table",
    "Values",
    "canonical",
    "group_rows",
    "joined_tables",
    "partners_of",
    "spell_columns",
    "table_of",
]

Values = dict[str, int | str]
"""Bound names: the position of a choice as digits, else the captured text."""


Row = tuple[tuple[str, ...], tuple[int | str, ...]]
"""Source keys that meet before the rearrangement, and the values of the names that they bind."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows that bind the same names, in the same order."""

    names: tuple[str, ...]
    rows: list[Row]

    def by(self, names: Sequence[str]) -> dict[tuple[int | str, ...], list[Row]]:
        """The rows for each value of some of the names."""
        columns = [[values[at] for _, values in self.rows] for at in map(self.names.index, names)]
        found: dict[tuple[int | str, ...], list[Row]] = defaultdict(list)
        for place, row in zip(zip(*columns) if columns else repeat(()), self.rows):
            found[place].append(row)
        return dict(found)


@dataclass(slots=True)
class Group:
    """What one step reads.

    Args:
        values: the loop variables.
        rows: for each tensor that arrives at the target the keys of its rows, in the order of the gathered indices.
        bound: the gathered names of each.
        indices: the values of these names, row by row.
        extents: gathered name -> how many.
    """

    values: Values
    rows: list[list[tuple[str, ...]]] = field(default_factory=list)
    bound: list[tuple[str, ...]] = field(default_factory=list)
    indices: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    extents: dict[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """All source keys, in the order in which the program takes them."""
        return tuple(chain.from_iterable(chain.from_iterable(self.rows)))


def canonical(term: Term, matches: MatchedColumns) -> MatchedColumns:
    """The matches with choices as positions, written as digits, so that both sides speak of the same values."""
    columns = dict(matches.columns)
    for capture in term.pattern.firsts:
        if capture.choices is not None:
            place = {text: str(n) for n, text in enumerate(capture.choices)}
            column = columns[capture.name]
            columns[capture.name] = place[column] if isinstance(column, str) else [place[c] for c in column]
    return replace(matches, columns=columns)


def spell_columns(pattern: KeyPattern, matches: MatchedColumns, texts: Callable[[Capture, str], str]) -> list[str]:
    """The target key for every matched key at once."""
    parts: list[Iterable[str]] = []
    for piece in pattern.pieces:
        if not isinstance(piece, Capture):
            parts.append(repeat(piece.text, len(matches.keys)))
            continue
        column = matches.columns[piece.name]
        if isinstance(column, str):
            parts.append(repeat(texts(piece, column), len(matches.keys)))
        elif piece.choices is None and not piece.numeric:
            parts.append(column)
        else:
            spelled = {text: texts(piece, text) for text in dict.fromkeys(column)}
            parts.append(map(spelled.__getitem__, column))
    return list(map("".join, zip(*parts)))


def group_rows(
    terms: Sequence[Term],
    matched: Sequence[Sequence[MatchedColumns]],
    loops: Sequence[str],
    gathered: Sequence[str],
    joined: bool,
) -> tuple[list[Group], list[Diagnostic]]:
    """The groups of a rule: one for each value of its loop variables.

    Args:
        terms: the source terms.
        matched: for each term its matches, canonical.
        joined: whether the terms meet in an op before the rearrangement, row by row.
    """
    problems: list[Diagnostic] = []
    tables = [table_of(found) for found in matched]
    if joined and len(terms) > 1:
        alone: list[str] = []
        tables = [joined_tables(tables, alone)]
        if alone:
            problems.append(_alone(list(dict.fromkeys(alone)), terms))
    if not all(table.rows for table in tables):
        return [], problems or [_alone([keys[0] for table in tables for keys, _ in table.rows], terms)]
    gathering = _Gathering(terms, tables, tuple(gathered), problems)
    groups = [gathering.group(values, rows) for values, rows in _grouped(tables, loops, problems, terms)]
    gathering.report([g for g in groups if g is not None])
    return [g for g in groups if g is not None], problems


def table_of(found: Sequence[MatchedColumns]) -> Table:
    """The rows of matches that bind the same names."""
    names = tuple(found[0].columns) if found else ()
    rows: list[Row] = []
    for m in found:
        wide = [c if isinstance(c, list) else [c] * len(m.keys) for c in (m.columns[n] for n in names)]
        rows += zip(zip(m.keys), zip(*wide) if wide else [()] * len(m.keys))
    return Table(names, rows)


def joined_tables(tables: Sequence[Table], alone: list[str]) -> Table:
    """The rows of several tables that agree in the names they share, as rows of one table.

    Args:
        alone: receives the first key of each row without a partner.
    """
    current = tables[0]
    for table in tables[1:]:
        shared = [n for n in table.names if n in current.names]
        new = [i for i, n in enumerate(table.names) if n not in shared]
        left, right = current.by(shared), table.by(shared)
        alone += [keys[0] for place, rows in left.items() if place not in right for keys, _ in rows]
        alone += [keys[0] for place, rows in right.items() if place not in left for keys, _ in rows]
        at = [current.names.index(n) for n in shared]
        merged = [
            ((*keys, *others), (*values, *(more[i] for i in new)))
            for keys, values in current.rows
            for others, more in right.get(tuple(values[i] for i in at), ())
        ]
        current = Table((*current.names, *(table.names[i] for i in new)), merged)
    return current


def _alone(keys: list[str], terms: Sequence[Term]) -> Diagnostic:
    folded = [text for text, _ in fold(keys)]
    many = "source key has" if len(keys) == 1 else "source keys have"
    return Diagnostic(
        "missing-partner",
        f"{len(keys)} {many} no partner: {folded[0]}",
        notes=tuple(folded[1:8]),
        facts=(("joins", ", ".join(str(t.pattern) for t in terms)),),
        help="name those without a partner by a rule of their own, or drop them",
    )


def _grouped(
    tables: list[Table], loops: Sequence[str], problems: list[Diagnostic], terms: Sequence[Term]
) -> list[tuple[Values, list[list[Row]]]]:
    """The rows of every table for each value of the loop variables; a table that lacks some serves all."""
    own = [[n for n in loops if n in table.names] for table in tables]
    leader = max(range(len(tables)), key=lambda t: len(own[t]))
    by_place = [table.by(names) for table, names in zip(tables, own)]
    groups = [(dict(zip(own[leader], place)), place) for place in by_place[leader]]
    alone: list[str] = []
    for number, found in enumerate(by_place):
        at = [own[leader].index(n) for n in own[number] if n in own[leader]]
        places = {tuple(place[i] for i in at) for _, place in groups}
        alone += [keys[0] for place, rows in found.items() if place not in places for keys, _ in rows]
        alone += [by_place[leader][p][0][0][0] for _, p in groups if tuple(p[i] for i in at) not in found]
    if alone:
        problems.append(_alone(list(dict.fromkeys(alone)), terms))
        return []
    return [
        ({**values}, [found[tuple(values[n] for n in names)] for found, names in zip(by_place, own)])
        for values, _ in groups
    ]


class _Gathering:
    """Puts the rows of each group in the order of their indices; what is missing is told once for all groups."""

    def __init__(
        self, terms: Sequence[Term], tables: Sequence[Table], gathered: tuple[str, ...], problems: list[Diagnostic]
    ) -> None:
        self.terms, self.tables, self.problems = terms, tables, problems
        self.bound = [tuple(n for n in gathered if n in table.names) for table in tables]
        self.captures = {c.name: c for t in terms for c in t.pattern.captures}
        self.numbers: dict[str, dict[int | str, int]] = {n: {} for n in gathered}
        self.missing: list[str] = []
        self.no_numbers: dict[str, str] = {}

    def group(self, values: Values, tables: list[list[Row]]) -> Group | None:
        group = Group(values)
        for table, bound, rows in zip(self.tables, self.bound, tables):
            group.bound.append(bound)
            if not bound:
                group.rows.append([keys for keys, _ in rows])
                group.indices.append(((),) * len(rows))
                continue
            found = [self.indices(n, table.names.index(n), rows) for n in bound]
            columns = [column for column in found if column is not None]
            if len(columns) < len(bound):
                return None
            placed = dict(zip(zip(*columns), map(itemgetter(0), rows)))
            extents = [self.extent(n) or max(column) + 1 for n, column in zip(bound, columns)]
            full = tuple(product(*map(range, extents))) if math.prod(extents) <= len(placed) else ()
            gathered = [placed[index] for index in full if index in placed]
            if not full or len(gathered) < len(full):
                missing = list(islice((index for index in full or _indices(extents) if index not in placed), _TOLD))
                room = max(1, _TOLD - len(self.missing))
                self.missing += [self.key(table, rows[0], bound, index) for index in missing[:room]]
                return None
            group.rows.append(gathered)
            group.indices.append(full)
            group.extents.update(zip(bound, extents))
        return group

    def indices(self, name: str, at: int, rows: list[Row]) -> list[int] | None:
        """The indices that the captured texts of rows stand for; None where one of them is no number."""
        values = [captured[at] for _, captured in rows]
        known = self.numbers[name]
        for value, row in zip(values, rows) if not known.keys() >= set(values) else ():
            if value not in known:
                capture = self.captures.get(name)
                first = int(capture.span.first) if capture is not None and capture.span is not None else 0
                if not is_index(str(value)):
                    self.no_numbers.setdefault(name, row[0][0])
                    return None
                known[value] = int(value) - first
        return [known[value] for value in values]

    def extent(self, name: str) -> int | None:
        """How many indices the pattern itself asks for."""
        capture = self.captures.get(name)
        if capture is None or capture.span is None:
            return len(capture.choices) if capture is not None and capture.choices is not None else None
        return int(capture.span.last) - int(capture.span.first) + 1

    def key(self, table: Table, like: Row, bound: Sequence[str], index: Sequence[int]) -> str:
        """The key that should stand at an index, spelled after one that does."""
        values = {**dict(zip(table.names, like[1])), **dict(zip(bound, index))}
        texts: dict[str, str] = {}
        term = next((t for t in self.terms if set(bound) <= set(t.pattern.names)), self.terms[0])
        for capture in term.pattern.firsts:
            if capture.flat:
                return f"{term.pattern} at " + ", ".join(f"{n} = {values[n]}" for n in bound)
            value = values[capture.name]
            shift = int(capture.span.first) if capture.span is not None and capture.name in bound else 0
            texts[capture.name] = (
                capture.choices[int(value)] if capture.choices else str(int(value) + shift if shift else value)
            )
        return term.pattern.spell(texts)

    def report(self, groups: Sequence[Group]) -> None:
        """Say what is missing, and where the counts differ."""
        for name, key in self.no_numbers.items():
            self.problems.append(
                Diagnostic(
                    "not-a-number",
                    f"{{{name}}} is gathered, but in {key!r} it is no number without leading zeros",
                    help=f"give {{{name}}} its choices, in their order: {{{name}:a,b,…}}",
                )
            )
        if self.missing:
            self.problems.append(_missing(self.missing, "and a gathered index runs without gaps"))
        self.uneven(groups)

    def uneven(self, groups: Sequence[Group]) -> None:
        for name in dict.fromkeys(n for g in groups for n in g.extents):
            counts: dict[int, list[Group]] = {}
            for group in groups:
                counts.setdefault(group.extents[name], []).append(group)
            if len(counts) < 2:
                continue
            usual = max(counts, key=lambda n: len(counts[n]))
            odd = [g for n, found in counts.items() if n != usual for g in found]
            keys = [key for g in odd if g.extents[name] < usual for key in self.lacking(g, name, usual)]
            lines = tuple(f"{g.extents[name]} with {g.keys[0]!r}" for g in odd[1:6])
            self.problems.append(
                Diagnostic(
                    "uneven-gather",
                    f"{{{name}}} runs over {usual} in most groups, but over {odd[0].extents[name]} with "
                    f"{odd[0].keys[0]!r}",
                    notes=lines,
                    facts=(("missing", ", ".join(text for text, _ in fold(keys)[:6])),) if keys else (),
                    help="all groups have as many; a group that differs wants a rule of its own",
                )
            )

    def lacking(self, group: Group, name: str, usual: int) -> list[str]:
        """The keys that a group would have if it went as far as most."""
        for table, bound, keys in zip(self.tables, self.bound, group.rows):
            if name in bound:
                like = next(row for row in table.rows if row[0] == keys[0])
                ranges = [range(group.extents[n], usual) if n == name else range(group.extents[n]) for n in bound]
                return [self.key(table, like, bound, i) for i in islice(product(*ranges), _TOLD)]
        return []


_TOLD = 10_000  # missing keys that are folded into a message; a key of nine digits asks for a billion


def _indices(extents: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All indices within the extents, in order, made one by one: the extents may be any numbers."""
    for number in range(math.prod(extents)):
        index: list[int] = []
        for extent in reversed(extents):
            number, inner = divmod(number, extent)
            index.append(inner)
        yield tuple(reversed(index))


def _missing(keys: list[str], why: str) -> Diagnostic:
    folded = fold(keys)
    first, count = folded[0]
    return Diagnostic(
        "missing-index",
        f"{first} {'is' if count == 1 else 'are'} missing, {why}",
        notes=tuple(text for text, _ in folded[1:8]),
        help="an index counts from 0: {e:1..3} begins at 1, {e:0..3} gathers fewer; else the checkpoint is incomplete, "
        "or a choice misspelled",
    )


Partners = Mapping[tuple[int, int], frozenset[str]]
"""(rule, term) -> the keys of the term that have all of their partners; of rules that join by `&` only."""


def partners_of(rules: Sequence[ResolvedRule], groups: Sequence[KeyGroup]) -> Partners:
    """Return, for each source term of a rule that joins by `&`, the keys for which every other term has a key too.

    Two keys are partners where they bind the names that both terms capture to the same values. Where several such rules
    could take a key, the one that joins most terms takes it: a weight with a scale and a zero point is not one with a
    scale alone.
    """
    found: dict[tuple[int, int], frozenset[str]] = {}
    taken: set[str] = set()
    joined = {n: bound.rule.sources for n, bound in enumerate(rules) if bound.rule.joined}
    for size in sorted({len(terms) for terms in joined.values()}, reverse=True):
        here: set[str] = set()
        for number, terms in joined.items():
            if len(terms) != size:
                continue
            rows = [keys for keys in _complete(terms, groups) if taken.isdisjoint(keys)]
            columns = list(zip(*rows)) or [()] * size
            found |= {(number, place): frozenset(column) for place, column in enumerate(columns)}
            here.update(key for term, column in zip(terms, columns) if not term.shared for key in column)
        taken |= here
    return found


def _complete(terms: Sequence[Term], groups: Sequence[KeyGroup]) -> list[tuple[str, ...]]:
    """The keys that are partners, one for each term."""
    tables = [table_of([canonical(term, m) for m in _matched(term, groups)]) for term in terms]
    if not all(table.rows for table in tables):
        return []
    whole: Table = joined_tables(tables, [])
    return [keys for keys, _ in whole.rows]


def _matched(term: Term, groups: Sequence[KeyGroup]) -> list[MatchedColumns]:
    found: list[MatchedColumns] = []
    for group in groups:
        try:
            matches = match_group(group, term.pattern)
        except RecipeError:
            continue  # a key that can be read in two ways, which is reported where keys are handed out
        if matches is not None:
            found.append(matches)
    return found


def counts_of(matched: Iterable[Sequence[Sequence[MatchedColumns]]]) -> dict[str, set[int]]:
    """Captured name -> one more than the largest index, for each term in which all that it captures are indices."""
    counts: dict[str, set[int]] = {}
    for terms in matched:
        for found in terms:
            seen: dict[str, set[str]] = {}
            for matches in found:
                for name, column in matches.columns.items():
                    seen.setdefault(name, set()).update([column] if isinstance(column, str) else column)
            for name, texts in seen.items():
                if all(map(is_index, texts)):
                    counts.setdefault(name, set()).add(1 + max(map(int, texts)))
    return counts
