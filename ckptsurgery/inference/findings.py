"""Findings about some tensors: the moves between them, and the blocks that some are cut into or joined of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..specs import TensorSpec
from .chunks import ChunkedMatch
from .moves import TensorMove
from .units import read_units, split_path

__all__ = ["Finding", "Known", "UnitLeaves", "companions"]

Specs = Mapping[str, TensorSpec]

_UNNAMED = frozenset({"one of two", "the other"})


@dataclass(frozen=True)
class Finding:
    """Moves that belong together.

    Args:
        moves: between tensors, or between blocks of them.
        splits: sources that are cut into blocks.
        joins: targets that are joined of blocks.
    """

    moves: tuple[TensorMove, ...]
    splits: tuple[ChunkedMatch, ...] = ()
    joins: tuple[ChunkedMatch, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The source's tensors, blocks left out."""
        inner = {piece: cut.key for cut in self.splits for piece in cut.pieces}
        return tuple(dict.fromkeys(inner.get(k, k) for m in self.moves for k in m.sources))

    @property
    def targets(self) -> tuple[str, ...]:
        """The target's tensors, blocks left out."""
        inner = {piece: cut.key for cut in self.joins for piece in cut.pieces}
        return tuple(dict.fromkeys(inner.get(k, k) for m in self.moves for k in m.targets))

    def renamed(
        self, sources: Mapping[str, str], targets: Mapping[str, str], specs: Specs, wanted: Specs
    ) -> Finding | None:
        """The same between other tensors; None where one of them cannot be cut so."""
        splits, joins = _cuts(self.splits, sources, specs), _cuts(self.joins, targets, wanted)
        if splits is None or joins is None:
            return None
        ends = []
        for cuts, table in ((self.splits, sources), (self.joins, targets)):
            inner = {p: table[c.key] + p[len(c.key) :] for c in cuts for p in c.pieces}
            ends.append({**table, **inner})
        moves = tuple(
            replace(m, sources=tuple(ends[0][k] for k in m.sources), targets=tuple(ends[1][k] for k in m.targets))
            for m in self.moves
        )
        return Finding(moves, splits, joins)


def _cuts(cuts: Sequence[ChunkedMatch], names: Mapping[str, str], specs: Specs) -> tuple[ChunkedMatch, ...] | None:
    found = []
    for cut in cuts:
        spec = specs[names[cut.key]]
        axis = cut.axis if len(spec.shape) == len(cut.spec.shape) else 0
        if len(spec.shape) <= axis or spec.shape[axis] != sum(cut.rows):
            return None
        found.append(replace(cut, key=names[cut.key], spec=spec, axis=axis))
    return tuple(found)


@dataclass
class Known:
    """The findings so far."""

    findings: list[Finding] = field(default_factory=list)
    ties: dict[str, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def add(self, finding: Finding) -> None:
        """Take a finding on."""
        self.findings.append(finding)
        self.made.update(finding.targets)
        self.used.update(finding.sources)

    def takes(self, finding: Finding) -> bool:
        """Whether nothing else makes its targets, or uses its sources."""
        return not self.made & {*finding.targets} and not self.used & {*finding.sources}

    @property
    def moves(self) -> list[TensorMove]:
        """All moves between whole tensors."""
        return [m for f in self.findings if not f.splits and not f.joins for m in f.moves]


class UnitLeaves:
    """The tensors of a side by the unit that they belong to."""

    def __init__(self, specs: Specs) -> None:
        units = read_units(specs.items())
        self.roles = {k: (u.path, role) for u in units for role, leaf in u.leaves.items() for k in leaf.keys}
        self.roles |= _unspoken([k for u in units for k in u.weight.keys if k == u.path], specs)
        self.units: dict[str, dict[str, str]] = {}
        for key, (path, role) in self.roles.items():
            self.units.setdefault(path, {})[role] = key

    def beside(self, key: str, role: str) -> str | None:
        """Return the tensor that has `role` in the unit of `key`, or None.

        In a unit of two tensors whose names do not tell their roles, it is the other one.
        """
        path, own = self.roles.get(key, ("", ""))
        unit = self.units.get(path, {})
        if role in unit and role != own:
            return unit[role]
        others = [k for k in unit.values() if k != key]
        return others[0] if len(others) == 1 and (own in _UNNAMED or role in _UNNAMED) else None

    def others(self, key: str) -> Iterator[str]:
        """The other roles in a tensor's unit."""
        path, own = self.roles.get(key, ("", ""))
        return (role for role in self.units.get(path, ()) if role != own)

    def beside_all(self, keys: Sequence[str]) -> list[str]:
        """The other roles in the units of tensors that have the same role; none where they have not."""
        return list(self.others(keys[0])) if len({self.roles.get(k, ("", ""))[1] for k in keys}) == 1 else []


def _unspoken(lone: Sequence[str], specs: Specs) -> dict[str, tuple[str, str]]:
    """The roles of tensors whose last words mean nothing: of two in one module, the one of fewer axes is the bias."""
    pairs: dict[str, list[str]] = {}
    for key in lone:
        pairs.setdefault(split_path(key)[0], []).append(key)
    words: Counter[tuple[str, str]] = Counter()
    two = {path: keys for path, keys in pairs.items() if path and len(keys) == 2}
    for keys in two.values():
        thin, wide = sorted(keys, key=lambda k: len(specs[k].shape))
        if len(specs[thin].shape) < len(specs[wide].shape):
            words[split_path(wide)[1], split_path(thin)[1]] += 1
    found: dict[str, tuple[str, str]] = {}
    for path, keys in two.items():
        for wide, thin in (keys, keys[::-1]):
            here = split_path(wide)[1], split_path(thin)[1]
            if words[here] > words[here[::-1]]:
                found |= {wide: (path[:-1], "weight"), thin: (path[:-1], "bias")}
            elif not words[here] and not words[here[::-1]]:
                found |= dict(zip((wide, thin), ((path[:-1], role) for role in sorted(_UNNAMED))))
    return found


def companions(
    finding: Finding,
    leaves: tuple[UnitLeaves, UnitLeaves],
    specs: Specs,
    wanted: Specs,
    holds: Callable[[Finding], bool],
    free: Callable[[Finding], bool],
    done: Container[str],
) -> Iterator[Finding]:
    """Return the neighbours of the tensors of a finding, moved as they are: a bias as its weight's rows."""
    for role in leaves[1].beside_all(finding.targets):
        names: list[dict[str, str]] = []
        for side, keys in zip(leaves, (finding.sources, finding.targets)):
            beside = {k: side.beside(k, role) for k in keys}
            names.append({k: v for k, v in beside.items() if v is not None})
        if len(names[0]) < len(finding.sources) or len(names[1]) < len(finding.targets):
            continue
        if any(k in done for k in names[1].values()):
            continue
        twin = finding.renamed(names[0], names[1], specs, wanted)
        if twin is None or not free(twin):
            continue
        for way in _fewer_axes(twin, specs, wanted):
            if holds(way):
                yield way
                break


def _fewer_axes(finding: Finding, specs: Specs, wanted: Specs) -> Iterator[Finding]:
    """The moves as they are, and without one axis that is alone on both sides."""
    inner = {k: s for c in (*finding.splits, *finding.joins) for k, s in c.specs.items()}
    choices: list[list[TensorMove]] = []
    for move in finding.moves:
        ranks = [
            len((inner.get(k) or table[k]).shape) for k, table in ((move.sources[0], specs), (move.targets[0], wanted))
        ]
        choices.append([way for way in _ways(move) if _fits(way, ranks)])
        if not choices[-1]:
            return
    for n in range(max(map(len, choices))):
        yield replace(finding, moves=tuple(ways[min(n, len(ways) - 1)] for ways in choices))


def _ways(move: TensorMove) -> Iterator[TensorMove]:
    yield move
    one, two = (re.findall(r"\([^)]*\)|\S+", text[1:-1]) for text in (move.left, move.right))
    for name in (n for n in one if n in two and n.isalnum()):
        left, right = ([x for x in side if x != name] for side in (one, two))
        plain = left == right and len(left) < 2 and not move.fuse
        texts = (
            ("", "") if plain and all(x.isalnum() for x in left) else (f"[{' '.join(left)}]", f"[{' '.join(right)}]")
        )
        yield replace(move, left=texts[0], right=texts[1])


def _fits(move: TensorMove, ranks: Sequence[int]) -> bool:
    if not move.left:
        return ranks[0] == ranks[1]
    return all(
        len(re.findall(r"\([^)]*\)|\S+", text[1:-1])) == rank for text, rank in zip((move.left, move.right), ranks)
    )
