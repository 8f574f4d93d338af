"""The whole of matching: fuse, gather evidence, solve, doubt, look again at what is left, find what is tied."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..specs import TensorSpec
from ..wording import brief, counted, listed
from .agreement import Agreement
from .assignment import VOTES, Solution, Voters, solve
from .evidence import WEIGHTS, Evidence, gather
from .fusion import fused
from .moves import TensorMove, resolve
from .placement import Placement, Pool
from .shared_tensors import shared
from .sides import UnitSide
from .units import Unit, read_units

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["Candidate", "Matched", "Question", "match"]

_LEAST = 2.0  # a pair for which less speaks than this is no pair
_DOUBTS = 6  # how often the question is asked again, with other weights
_ASKED = 3  # how many candidates an open question lists
_NOISE = 0.1  # what is added to scores then
_LARGEST = 4_000_000  # pairs that are looked at together, at most: some twenty matrices of so many numbers
_NAMES = frozenset({"name", "spelling", "exclusive", "balance", "role"})  # the evidence that names give
_TOLD = 0.3  # names that speak by less than this for one than for another do not tell them apart
_SPREAD = 0.45  # by how much the weights differ then: the standard deviation of their logarithms


@dataclass(frozen=True, repr=False)
class Candidate:
    """What a target tensor might be made of, and what speaks for it."""

    sources: tuple[str, ...]
    score: float
    evidence: Mapping[str, float]

    def __repr__(self) -> str:
        return brief("Candidate", listed(self.sources), f"{self.score:.2f}")


@dataclass(frozen=True, repr=False)
class Question:
    """A target tensor that could not be decided, with what it may be made of; a layer may speak for those like it."""

    target: str
    candidates: tuple[Candidate, ...]

    def __repr__(self) -> str:
        return brief("Question", self.target, counted(len(self.candidates), "candidate"))

    @property
    def said(self) -> str:
        """The candidates in a line."""
        return " or ".join(f"{'+'.join(c.sources)} ({c.score:.1f})" for c in self.candidates) or "no candidate"


@dataclass(frozen=True)
class Matched:
    """What was found between two sides.

    Args:
        a, b: the sides, fused.
        moves: what makes what.
        ties: target key -> the target key it shares its tensor with.
        questions: what was left open.
        placed: targets that names alone would not have told from others of their shape.
        placement: the stacks of both sides.
        shared: targets that are made of one source together.
    """

    a: UnitSide
    b: UnitSide
    moves: list[TensorMove]
    ties: dict[str, str] = field(default_factory=dict)
    questions: tuple[Question, ...] = ()
    placed: frozenset[str] = frozenset()
    placement: Placement = field(default_factory=Placement, repr=False)
    shared: frozenset[str] = frozenset()


def match(
    source: Sequence[tuple[str, TensorSpec]],
    target: Sequence[tuple[str, TensorSpec]],
    ordered: tuple[bool, bool],
    weights: Mapping[str, float] = WEIGHTS,
    votes: Mapping[str, float] = VOTES,
) -> Matched:
    """Match two sides by names, shapes and structure.

    Args:
        ordered: for each side, whether it lists its keys in the order of definition.
        weights, votes: what each kind of evidence is worth.
    """
    first, second = read_units(source), read_units(target)
    placement = Placement.of(first, second)
    one, two = fused(first, second, ordered, placement)
    a, b = (UnitSide(units, ordered[n], placement.prefixes(n)) for n, units in enumerate((one, two)))
    moves: list[TensorMove] = []
    parts = []
    for x, y in _manageable(a, b):
        part = _MatchPart.of(x, y, placement, weights, votes)
        moves += part.moves
        parts.append(part)
    # Where nothing else matches, an embedding of the same size is not enough.
    added, ties = shared(dict(source), dict(target), moves, placement) if moves else ([], {})
    moves += added
    settled = {k for m in moves for k in (*m.sources, *m.targets)} | set(ties)
    questions = tuple(q for part in parts for q in part.questions(weights, settled))
    placed = frozenset(k for part in parts for k in part.placed(weights))
    several = {k for m in added for k in m.targets}
    several |= {k for k, made in ties.items() if made in several}
    return Matched(a, b, moves, ties, questions, placed, placement, frozenset(several))


def _manageable(a: UnitSide, b: UnitSide) -> list[tuple[UnitSide, UnitSide]]:
    """Both sides whole; or, where their matrices would fill the memory, in parts of which no two can have a pair.

    Of tensors of one size of which there are too many even so, those are looked at that both sides call alike.
    """
    if not len(a) or not len(b):
        return []
    if len(a) * len(b) <= _LARGEST:
        return [(a, b)]
    sizes: dict[int, tuple[list[Unit], list[Unit]]] = defaultdict(lambda: ([], []))
    for side, whole in enumerate((a, b)):
        for unit in whole.units:
            sizes[math.prod(unit.weight.shape)][side].append(unit)
    found: list[tuple[list[Unit], list[Unit]]] = []
    for one, two in sorted(sizes.values(), key=lambda g: len(g[0]) * len(g[1])):
        if not one or not two:
            continue
        if len(one) * len(two) > _LARGEST:
            there, step = {u.path: u for u in two}, math.isqrt(_LARGEST)
            both = [u for u in one if u.path in there]
            cuts = [both[at : at + step] for at in range(0, len(both), step)]
            found += [(cut, [there[u.path] for u in cut]) for cut in cuts]
            continue
        if found and (len(found[-1][0]) + len(one)) * (len(found[-1][1]) + len(two)) <= _LARGEST:
            found[-1][0].extend(one)
            found[-1][1].extend(two)
        else:
            found.append(([*one], [*two]))
    return [(UnitSide(one, a.ordered, a.counted), UnitSide(two, b.ordered, b.counted)) for one, two in found]


@dataclass(frozen=True)
class _MatchPart:
    """What was found between two sides, or between what of them can be looked at together."""

    a: UnitSide
    b: UnitSide
    moves: list[TensorMove]
    sure: list[tuple[int, int]]
    doubted: set[tuple[int, int]]
    solution: Solution
    evidence: Evidence
    late: Sequence[TensorMove] = ()

    @classmethod
    def of(
        cls, a: UnitSide, b: UnitSide, placement: Placement, weights: Mapping[str, float], votes: Mapping[str, float]
    ) -> _MatchPart:
        """Gather evidence, solve, doubt, and look again at what is left."""
        evidence, voters = gather(a, b, placement), Voters.of(a, b)
        pool = placement.pool(a, b)
        solution = solve(evidence, voters, weights, votes, pool=pool)
        sure, doubted = _doubt(solution, evidence, voters, weights, votes, pool)
        agreement = Agreement.of(a, b, {p: solution.pairs[p] for p in sure})
        only = evidence.features["only"] > 0
        broken = [p for p in sure if not only[p] and agreement.breaks(*p)]
        kept = [p for p in sure if p not in broken]
        broken += placement.unclaimed(a, b, kept, doubted)
        sure, doubted = [p for p in sure if p not in set(broken)], [*doubted, *broken]
        moves = resolve(a, b, sure)
        late = _left_over(a, b, sure, moves, agreement, placement) if sure or not broken else []
        return cls(a, b, [*moves, *late], sure, set(doubted), solution, evidence, late)

    def placed(self, weights: Mapping[str, float]) -> Iterator[str]:
        """The targets whose names speak as loudly for another tensor of their shape, or whose number nothing shows."""
        import numpy as np

        yield from (key for move in self.late for key in move.targets)
        named = self.evidence.total({k: w for k, w in weights.items() if k in _NAMES})
        possible = self.evidence.mask > 0
        families = [np.unique(side.families, return_inverse=True)[1] for side in (self.a, self.b)]
        for i, j in self.sure:
            rivals = possible[:, j] & (families[0] != families[0][i])
            others = possible[i] & (families[1] != families[1][j])
            best = max(named[rivals, j].max(initial=-np.inf), named[i, others].max(initial=-np.inf))
            kin = possible[:, j] & (families[0] == families[0][i])
            counted = max(self.evidence.features[k][i, j] for k in ("loops", "series"))
            if named[i, j] - best < _TOLD or (kin.sum() > 1 and counted <= 0):
                yield from (k for leaf in self.b.units[j].leaves.values() for k in leaf.keys)

    def questions(self, weights: Mapping[str, float], settled: set[str]) -> tuple[Question, ...]:
        """What is open."""
        return _questions(self.a, self.b, self.doubted, self.solution, self.evidence, weights, settled)


def _doubt(
    solution: Solution,
    evidence: Evidence,
    voters: Voters,
    weights: Mapping[str, float],
    votes: Mapping[str, float],
    pool: Pool,
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The pairs that stay when everything is weighed differently, and those that do not."""
    import numpy as np

    random = np.random.default_rng(0)
    kept: Counter[tuple[int, int]] = Counter()
    drawn: dict[str, float] = {}
    for turn in range(_DOUBTS):
        # Every second time what weighed more weighs less: the chances of a draw even out.
        drawn = {k: -v for k, v in drawn.items()} if turn % 2 else {k: random.normal() for k in (*weights, *votes)}
        drawn["exclusive"] = abs(drawn.get("exclusive", 0.0))  # what contradicts never weighs less
        other, heard = (
            {k: v * float(np.exp(_SPREAD * drawn[k])) for k, v in kind.items()} for kind in (weights, votes)
        )
        # Equals stay equal however they are weighed: a little noise tells that nothing decides between them.
        noise = np.asarray(random.normal(size=evidence.mask.shape)) * _NOISE
        kept.update(solve(evidence, voters, other, heard, rounds=4, noise=noise, pool=pool).pairs.keys())
    sure: list[tuple[int, int]] = []
    doubted: list[tuple[int, int]] = []
    for pair, score in solution.pairs.items():
        if score < _LEAST and (score < _LEAST / 2 or not _alone(pair, solution)):
            continue
        (sure if kept[pair] >= _DOUBTS - 1 else doubted).append(pair)
    return sure, doubted


def _alone(pair: tuple[int, int], solution: Solution) -> bool:
    """Whether nothing else comes near a pair, for neither of the two."""
    i, j = pair
    if solution.soft[pair] >= 0.6:
        return True
    row, column = solution.score[i].copy(), solution.score[:, j].copy()
    row[j] = column[i] = -math.inf
    return bool(solution.score[pair] - max(row.max(), column.max()) > 0.75)


def _questions(
    a: UnitSide, b: UnitSide, doubted: set[tuple[int, int]], solution: Solution, evidence: Evidence,
    weights: Mapping[str, float], settled: set[str],
) -> tuple[Question, ...]:  # fmt: skip
    """Every open target that something could make: what is free and fits, and what was thought of and doubted."""
    import numpy as np

    found = []
    for j, unit in enumerate(b.units):
        for role, leaf in unit.leaves.items():
            keys = [k for k in leaf.keys if k not in settled]
            if not keys:
                continue
            rows: list[Candidate] = []
            for i in map(int, np.argsort(-solution.score[:, j], kind="stable")):
                if not evidence.mask[i, j] or len(rows) == _ASKED:
                    break
                other = a.units[i].leaves.get(role)
                if other is not None and ((i, j) in doubted or not settled & set(other.keys)):
                    said = {
                        k: round(float(m[i, j]) * weights.get(k, 0.0), 2)
                        for k, m in evidence.features.items()
                        if m[i, j] or k == "shape"
                    }
                    rows.append(Candidate(other.keys, round(float(solution.score[i, j]), 2), said))
            found += [Question(key, tuple(rows)) for key in keys if rows]
    return tuple(found)


def _left_over(
    a: UnitSide, b: UnitSide, pairs: Sequence[tuple[int, int]], moves: Sequence[TensorMove], agreement: Agreement,
    placement: Placement,
) -> list[TensorMove]:  # fmt: skip
    """Tensors of units that were fused in one role only, or whose roles go by other names: matched once more, alone."""
    import numpy as np

    used = {k for m in moves for k in (*m.sources, *m.targets)}
    one, alone, own = _rest(a, used)
    two, apart, its = _rest(b, used)
    if not one or not two or len(one) * len(two) > _LARGEST:
        return []
    x, y = UnitSide(one, a.ordered, a.counted), UnitSide(two, b.ordered, b.counted)
    evidence = gather(x, y, placement)
    agreed, size = _agreed_paths(a, b, pairs)
    found: list[tuple[int, int]] = []
    score = evidence.total(WEIGHTS)
    fits = evidence.mask > 0
    for i, u in enumerate(x.units):
        for j, v in enumerate(y.units):
            if not alone[i] and not apart[j]:
                evidence.mask[i, j] = 0.0  # both belong to a module whose weight went elsewhere
            if not fits[i, j]:
                continue
            near = [
                agreed[p, q] / max(size[0, p], size[1, q])
                for p in (*x.prefixes[i], u.path) for q in (*y.prefixes[j], v.path)
                if agreed[p, q] and size[0, p] < 0.5 * len(a)
            ]  # fmt: skip
            score[i, j] += 4.0 * max(near, default=0.0)
    seen = np.where(evidence.mask > 0, score, -np.inf)
    best = np.maximum(seen.max(axis=1, keepdims=True), seen.max(axis=0, keepdims=True))
    for i, j in map(tuple, np.argwhere((seen >= best) & (seen > -np.inf)).tolist()):
        others = np.sort(np.concatenate([seen[i], seen[:, j]]))[:-2]
        lone = evidence.features["only"][i, j] == 1.0 and score[i, j] >= _LEAST
        clear = lone or (score[i, j] >= 2 * _LEAST and (not len(others) or score[i, j] - others[-1] > 1.0))
        if clear and not agreement.breaks(own[i], its[j]):
            found.append((i, j))
    met = {(own[i], its[j]) for i, j in found}
    taken = [{p[side] for p in found} for side in (0, 1)]
    for i in range(len(one)):
        for j in range(len(two)):
            # What stands beside a weight goes with it.
            if fits[i, j] and (own[i], its[j]) in met and i not in taken[0] and j not in taken[1]:
                found += [(i, j)] if one[i].leaves.keys() == two[j].leaves.keys() else []
    return resolve(x, y, found)


def _agreed_paths(
    a: UnitSide, b: UnitSide, pairs: Sequence[tuple[int, int]]
) -> tuple[Counter[tuple[str, str]], Counter[tuple[int, str]]]:
    """How many pairs lie below two paths, one of each side; and how many below a path of one side, 0 or 1."""
    agreed: Counter[tuple[str, str]] = Counter()
    size: Counter[tuple[int, str]] = Counter()
    for i, j in pairs:
        for p in (*a.prefixes[i], a.units[i].path):
            size[0, p] += 1
            for q in (*b.prefixes[j], b.units[j].path):
                agreed[p, q] += 1
        for q in (*b.prefixes[j], b.units[j].path):
            size[1, q] += 1
    return agreed, size


def _rest(side: UnitSide, used: set[str]) -> tuple[list[Unit], list[bool], list[int]]:
    """What is left, tensor by tensor; whether each stands alone, or is its module's weight; and its unit's number."""
    found: list[Unit] = []
    alone: list[bool] = []
    own: list[int] = []
    for number, unit in enumerate(side.units):
        for role, leaf in unit.leaves.items():
            if used & set(leaf.keys) or role == "batches":
                continue
            # A unit may have lost some of its parts to others: what is fused is taken apart again.
            for part in leaf.parts:
                path = unit.path if not leaf.fuse else part.key.rpartition(".")[0] or part.key
                single = replace(leaf, shape=part.shape, parts=(part,), fuse=None)
                found.append(Unit(path, {role: single}, unit.order, (), unit.roles))
                alone.append(role == "weight" or "weight" not in unit.leaves)
                own.append(number)
    return found, alone, own
