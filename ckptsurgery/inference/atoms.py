"""From moves to rules: the fewest that say the same, with captures, choices, axes and a rest."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..narrowing import present
from .index_relations import IndexRelation, relate
from .moves import TensorMove

__all__ = ["Atom", "Flat", "atoms", "common_head", "escaped", "flats"]

_NUMBER = re.compile(r"(\d+)")
_SPECIAL = re.compile(r"->|[{}\[\],|?\\]")


@dataclass(frozen=True)
class Atom:
    """One rule before it is merged with others.

    Args:
        source, target: key patterns.
        left, right: axis lists, empty for none.
        free: captures that are variables, variable -> values it takes, None where it takes all there are.
        moves: indices of the moves it explains.
        dims: sizes that it needs.
    """

    source: str
    target: str
    left: str = ""
    right: str = ""
    free: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    moves: tuple[int, ...] = ()
    dims: Mapping[str, Any] = field(default_factory=dict)


def common_head(texts: Sequence[str]) -> str:
    """The longest text that all begin with.

    >>> common_head(["layer", "lay", "laid"])
    'la'
    """
    low, high = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), min(len(low), len(high)))
    return low[:length]


def escaped(text: str) -> str:
    """A literal as a pattern spells it."""
    return _SPECIAL.sub(lambda m: "\\" + m[0], text)


@dataclass(frozen=True)
class _KeySide:
    """One side of a move, cut at its numbers; where its keys differ stands a capture."""

    pieces: tuple[str, ...]
    digits: tuple[str, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the digits count."""
        return tuple(map(int, self.digits))


def _cut(keys: Sequence[str], fuse: str | None) -> _KeySide:
    """The keys as one text: a hole where they differ, the other numbers apart."""
    if len(keys) == 1:
        parts = _NUMBER.split(keys[0])
        return _KeySide(tuple(map(escaped, parts[::2])), tuple(parts[1::2]))
    head, holes, tail = _hole(keys, fuse)
    before, after = _NUMBER.split(head), _NUMBER.split(tail)
    pieces = [*map(escaped, before[::2])]
    pieces[-1] += holes + escaped(after[0])
    return _KeySide((*pieces, *map(escaped, after[2::2])), (*before[1::2], *after[1::2]))


def _hole(keys: Sequence[str], fuse: str | None) -> tuple[str, str, str]:
    if fuse == "stack concat":
        return _grid_hole(keys)
    head, mid, tail = _differ(keys)
    counted = fuse in ("stack", "concat index")
    return head, "{e}" if counted else "{p:" + ",".join(map(escaped, mid)) + "}", tail


def _grid_hole(keys: Sequence[str]) -> tuple[str, str, str]:
    """The same for as many parts under each index."""
    for count in range(2, len(keys)):
        first, index, rest = _differ(keys[::count])
        if len(keys) % count == 0 and all(n.isdigit() for n in index):
            break
    else:
        raise ValueError("the tensors that are stacked do not differ by an index")
    head, mid, tail = _differ(keys[:count])
    choices = "{p:" + ",".join(map(escaped, mid)) + "}"
    if len(head) >= len(first):
        return first, "{e}" + escaped(head[len(first) + len(index[0]) :]) + choices, tail
    between = tail[: len(tail) - len(rest) - len(index[0])]
    return head, choices + escaped(between) + "{e}", rest


def _differ(keys: Sequence[str]) -> tuple[str, list[str], str]:
    """What the keys share in front and behind, and what stands between; whole words and numbers only."""
    head = common_head(list(keys))
    while head and head[-1].isalnum():
        head = head[:-1]
    tail = common_head([k[len(head) :][::-1] for k in keys])[::-1]
    while tail and tail[0].isalnum():
        tail = tail[1:]
    return head, [k[len(head) : len(k) - len(tail)] for k in keys], tail


@dataclass(frozen=True)
class Flat:
    """A flat index on the source's side over stages and places on the target's, valid for all keys under it."""

    before: str
    nested: str
    between: str
    stages: tuple[int, ...]

    def nest(self, key: str) -> str:
        """A source key as it reads when the flat index is cut in two."""
        if not key.startswith(self.before):
            return key
        number = re.match(r"\d+", key[len(self.before) :])
        if number is None or int(number[0]) >= sum(self.stages):
            return key
        stage, place = 0, int(number[0])
        while place >= self.stages[stage]:
            place -= self.stages[stage]
            stage += 1
        return f"{self.nested}{stage}{self.between}{place}{key[len(self.before) + number.end() :]}"

    @property
    def rule(self) -> str:
        """The rule that does so for everything under it."""
        behind = "{stage}" + self.between + "{block}.{r...}"
        return f"{self.before}{{(stage block)}}.{{r...}} -> {self.nested}{behind}"


def flats(moves: Sequence[TensorMove], is_loop: tuple[Callable[[str], bool], Callable[[str], bool]]) -> list[Flat]:
    """The flat indices that meet nested ones, where stages and places add up."""
    groups, sides = _grouped(moves)
    listed = _related(groups, sides, is_loop)
    found = []
    for (forward, before, nested, between), stages in _extents(listed, sides).items():
        if forward and stages is not None and "{" not in before + nested:
            found.append(Flat(before, nested, between, stages))
    return found


_Groups = dict[tuple[Any, ...], list[int]]
_Listed = list[tuple[tuple[Any, ...], IndexRelation, tuple[int, ...]]]


def _grouped(moves: Sequence[TensorMove]) -> tuple[_Groups, list[tuple[_KeySide, _KeySide]]]:
    groups: _Groups = defaultdict(list)
    sides: list[tuple[_KeySide, _KeySide]] = []
    for n, move in enumerate(moves):
        one, two = _cut(move.sources, move.fuse), _cut(move.targets, move.fuse)
        sides.append((one, two))
        groups[one.pieces, two.pieces, move.left, move.right, move.sizes, move.dims].append(n)
    return groups, sides


def _related(
    groups: _Groups,
    sides: Sequence[tuple[_KeySide, _KeySide]],
    is_loop: tuple[Callable[[str], bool], Callable[[str], bool]],
    nest: bool = True,
) -> _Listed:
    listed: _Listed = []
    for pattern, members in groups.items():
        loops = (_loops(pattern[0], is_loop[0]), _loops(pattern[1], is_loop[1]))
        related = relate([sides[n][0].numbers for n in members], [sides[n][1].numbers for n in members], loops, nest)
        listed += [(pattern, relation, tuple(members[r] for r in relation.rows)) for relation in related]
    return listed


def atoms(
    moves: Sequence[TensorMove],
    source_keys: Sequence[str],
    is_loop: tuple[Callable[[str], bool], Callable[[str], bool]],
    values: Callable[[str, Sequence[int]], tuple[int, ...]],
) -> list[Atom]:
    """Return the moves as rules, one for each kind of tensor; no rule claims another's keys.

    Args:
        source_keys: all keys of the source, so that a rule which would claim too many is noticed.
        is_loop: for each side, whether the number behind a prefix counts layers; prefixes spell numbers `#`.
        values: called with a prefix and the numbers seen behind it; returns all numbers that they represent, where
            only some layers were compared.
    """
    groups, sides = _grouped(moves)
    claims = _KeyClaims(source_keys)
    listed = _related(groups, sides, is_loop)
    extents = _extents(listed, sides)
    # A flat number whose stages do not add up counts otherwise.
    again: _Groups = defaultdict(list)
    settled: _Listed = []
    for pattern, relation, rows in listed:
        if relation.nesting is not None and extents[_nest(pattern[0], pattern[1], relation)] is None:
            again[pattern] += rows
        else:
            settled.append((pattern, relation, rows))
    listed = settled + _related(again, sides, is_loop, nest=False)
    found: list[Atom] = []
    for (one, two, left, right, sizes, _), relation, rows in listed:
        base = Atom(_join(one, relation.source), _join(two, relation.target), left, right, moves=rows)
        base = replace(base, dims=_sizes(base, moves[rows[0]], sizes))
        own = {k for n in rows for k in moves[n].sources}
        if relation.nesting is not None:
            base = replace(base, dims={**base.dims, "block": list(extents[_nest(one, two, relation)] or ())})
        padded = _padded(base, relation, (one, two), [sides[n] for n in rows])
        if padded is not None:
            found += padded
            continue
        found += _restricted(base, relation, (one, two), [sides[n] for n in rows], own, claims, values)
    return found


def _nest(one: Sequence[str], two: Sequence[str], relation: IndexRelation) -> tuple[Any, ...]:
    """What a nesting is told apart by: the texts before the flat number and before the outer one."""
    forward, nesting = present(relation.nesting, "the nesting of a nested relation")
    flat, nested = (one, two) if forward else (two, one)
    numbers = (relation.source, relation.target) if forward else (relation.target, relation.source)
    before = _join(flat[: nesting.flat + 1], numbers[0][: nesting.flat])
    return forward, before, _join(nested[: nesting.outer + 1], numbers[1][: nesting.outer]), nested[nesting.inner]


def _extents(
    listed: _Listed, sides: Sequence[tuple[_KeySide, _KeySide]]
) -> dict[tuple[Any, ...], tuple[int, ...] | None]:
    """How many places each stage has, from all keys of a nesting; None where they do not add up to the flat numbers."""
    seen: dict[tuple[Any, ...], set[tuple[int, int, int]]] = defaultdict(set)
    for (one, two, *_), relation, rows in listed:
        if relation.nesting is None:
            continue
        forward, nesting = relation.nesting
        for n in rows:
            flat, nested = sides[n] if forward else sides[n][::-1]
            seen[_nest(one, two, relation)].add(
                (flat.numbers[nesting.flat], nested.numbers[nesting.outer], nested.numbers[nesting.inner])
            )
    found: dict[tuple[Any, ...], tuple[int, ...] | None] = {}
    for name, triples in seen.items():
        top = max(s for _, s, _ in triples)
        stages = tuple(1 + max((b for _, s, b in triples if s == k), default=-1) for k in range(top + 1))
        fits = all(x == sum(stages[:s]) + b for x, s, b in triples) and len(triples) == sum(stages)
        found[name] = stages if fits else None
    return found


def _each(
    base: Atom, pieces: tuple[Sequence[str], Sequence[str]], rows: Sequence[tuple[_KeySide, _KeySide]]
) -> list[Atom]:
    """Each key by itself."""
    found = []
    for n, sides in zip(base.moves, rows):
        one, two = (_join(p, side.digits) for p, side in zip(pieces, sides))
        found.append(replace(base, source=one, target=two, free={}, moves=(n,)))
    return found


def _padded(
    base: Atom,
    relation: IndexRelation,
    pieces: tuple[Sequence[str], Sequence[str]],
    rows: Sequence[tuple[_KeySide, _KeySide]],
) -> list[Atom] | None:
    """Numbers with leading zeros, which are spelled out: as choices where one varies; None if there are none."""
    if not any(d[0] == "0" < d for side in rows for part in side for d in part.digits):
        return None
    spelled: tuple[list[str], list[str]] = (list(relation.source), list(relation.target))
    free = dict.fromkeys(relation.variables)
    columns = [[list(dict.fromkeys(row[s].digits[k] for row in rows)) for k in range(len(spelled[s]))] for s in (0, 1)]
    for side in (0, 1):
        for k, values in enumerate(columns[side]):
            if spelled[side][k].isdigit() and len(values) == 1:
                spelled[side][k] = values[0]
    for name in relation.variables:
        i, j = (next((k for k, t in enumerate(texts) if re.search(rf"\b{name}\b", t)), -1) for texts in spelled)
        pairs = list(dict.fromkeys((row[0].digits[i], row[1].digits[j]) for row in rows))
        if not any(d[0] == "0" < d for pair in pairs for d in pair):
            continue
        if relation.nesting is not None or len({a for a, _ in pairs}) < len(pairs):
            return _each(base, pieces, rows)
        spelled[0][i] = f"{{{name}:{','.join(a for a, _ in pairs)}}}"
        same = all(a == b for a, b in pairs)
        spelled[1][j] = f"{{{name}}}" if same else f"{{{name}:{','.join(b for _, b in pairs)}}}"
        del free[name]
    if any(d[0] == "0" < d for texts in spelled for d in texts if d.isdigit() and len(d) > 1) and any(
        len(values) > 1 for side in (0, 1) for t, values in zip(spelled[side], columns[side]) if t.isdigit()
    ):
        return _each(base, pieces, rows)
    return [replace(base, source=_join(pieces[0], spelled[0]), target=_join(pieces[1], spelled[1]), free=free)]


def _sizes(atom: Atom, move: TensorMove, sizes: tuple[int, ...]) -> dict[str, Any]:
    """The sizes that no source shows: those of axes that are split, in equal parts or ragged."""
    if not sizes or len(move.targets) == 1:
        return dict(move.dims)
    choices = re.search(r"\{p:([^}]*)\}", atom.target)
    if choices is None:
        raise ValueError("the parts of a split have no list of choices")
    return {**dict(move.dims), "rows": dict(zip(choices[1].split(","), sizes))}


def _loops(pieces: Sequence[str], is_loop: Callable[[str], bool]) -> list[bool]:
    found, prefix = [], ""
    for piece in pieces[:-1]:
        prefix += piece
        found.append(is_loop(prefix))
        prefix += "#"
    return found


def _join(pieces: Sequence[str], numbers: Sequence[str]) -> str:
    return "".join(p + n for p, n in zip(pieces, (*numbers, "")))


class _KeyClaims:
    """Which keys a pattern of pieces and numbers would claim."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = keys
        self.by_pieces: dict[tuple[str, ...], list[tuple[tuple[int, ...], str]]] = defaultdict(list)
        for key in keys:
            parts = _NUMBER.split(key)
            self.by_pieces[tuple(map(escaped, parts[::2]))].append((tuple(map(int, parts[1::2])), key))

    def claimed(self, pieces: Sequence[str], numbers: Sequence[str]) -> list[tuple[tuple[int, ...], str]]:
        """The keys of one template whose literal numbers agree."""
        wanted = [int(n) if n.isdigit() else None for n in numbers]
        rows = self._holed(tuple(pieces)) if any("{" in p for p in pieces) else self.by_pieces.get(tuple(pieces), [])
        return [(row, key) for row, key in rows if all(w is None or w == n for w, n in zip(wanted, row))]

    def _holed(self, pieces: tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
        """The keys under any choice, and any index, of what is fused."""
        if pieces not in self.by_pieces:
            text = re.compile(r"(\d+)".join(map(_matching, pieces)))
            found = [(m, key) for key in self.keys if (m := text.fullmatch(key))]
            self.by_pieces[pieces] = [(tuple(map(int, m.groups())), key) for m, key in found]
        return self.by_pieces[pieces]


def _matching(piece: str) -> str:
    """A piece as an expression: choices one of their spellings, an index any digits."""

    def part(text: str) -> str:
        if text.startswith("{p:"):
            return "(?:" + "|".join(re.escape(c.replace("\\", "")) for c in text[3:-1].split(",")) + ")"
        if text == "{e}":
            return r"\d+"
        return re.escape(text.removeprefix("\\"))

    return "".join(map(part, re.split(r"(\{p:[^}]*\}|\{e\}|\\.)", piece)))


def _restricted(
    base: Atom,
    relation: IndexRelation,
    pieces: tuple[Sequence[str], Sequence[str]],
    rows: Sequence[tuple[_KeySide, _KeySide]],
    own: set[str],
    claims: _KeyClaims,
    values: Callable[[str, Sequence[int]], tuple[int, ...]],
) -> list[Atom]:
    """The rule with as few restrictions as keep it from other keys; split where no restriction does."""
    free: dict[str, tuple[int, ...] | None] = dict.fromkeys(relation.variables)
    strangers = [row for row, key in claims.claimed(pieces[0], relation.source) if key not in own]
    if not strangers:
        return [replace(base, free=free)]
    if relation.nesting is None:
        for name, (side, place) in relation.variables.items():
            seen = sorted({row[side].numbers[place] for row in rows})
            step = _source_value(relation, name)
            if step is None:
                continue
            mine = {row[0].numbers[step] for row in rows}
            if all(s[step] not in mine for s in strangers):
                prefix = "#".join(pieces[side][: place + 1])
                return [replace(base, free=free | {name: values(("s" if side == 0 else "t") + prefix, seen)})]
    return _each(base, pieces, rows)


def _source_value(relation: IndexRelation, name: str) -> int | None:
    """The place on the source's side where a variable stands."""
    for place, text in enumerate(relation.source):
        if re.fullmatch(r"\{(?:\d+\*|\d+-)?" + name + r"(?:[+-]\d+)?\}", text):
            return place
    return None
