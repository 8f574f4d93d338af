"""Recipes from values: where both sides hold the same weights, what became of each is read off the data, and proved."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import CkptSurgeryError
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.places.opening import open as open_checkpoint
from .by_names import arranged, ordered
from .chunks import ChunkedMatch, chunks_of, runs_of
from .digits import axes_of, digits_of
from .matches import match
from .moves import TensorMove
from .recipe_stages import StagedCut, staged
from .siblings import casts, changed, differing
from .suggestion import Suggestion

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]

__all__ = ["by_values"]

_PROBES = 48


def by_values(source: Any, target: Any) -> Suggestion:
    """The exact recipe between two sides that hold the same weights.

    What names suggest is tried on the data first; what fails, or is open, is looked for by its values. Tensors are read
    one by one: what is held at a time is one of the target with what it is made of, whatever the sides' sizes.
    """
    with ExitStack() as opened:
        one, two = (_opened(side, opened) for side in (source, target))
        specs, wanted = arranged(one.specs), arranged(two.specs)
        found = match(list(specs.items()), list(wanted.items()), (ordered(specs), ordered(wanted)))
        equating = _Equating(one, two, specs, wanted)
        proved = [m for m in found.moves if equating.holds(m)]
        proved, ties = equating.complete(_whole(proved, found.moves))
        made, used = {k for m in proved for k in m.targets} | set(ties), {k for m in proved for k in m.sources}
        cut = equating.cut([k for k in wanted if k not in made], [k for k in specs if k not in used])
        done = {c.key for c in (*cut.splits, *cut.joins)} | {k for m in cut.moves for k in (*m.sources, *m.targets)}
        tuned = [m for m in changed(specs, wanted, proved, found.moves, ties) if not done & {*m.sources, *m.targets}]
        moves = [*proved, *tuned]
        made = {k for m in moves for k in m.targets} | set(ties) | done
        known = replace(found, moves=moves, ties=ties, questions=(), placed=frozenset())
        result = staged(specs, wanted, known, cut)
        open_ = [k for k in wanted if k not in made]
        taken = (*casts(one.specs, two.specs, proved), *differing(tuned))
        return replace(result, evidence="values", assumptions=taken, unmatched_target=tuple(open_))


def _opened(source: Any, opened: ExitStack) -> Checkpoint:
    """A side, closed with the stack if it was opened here."""
    checkpoint = open_checkpoint(source)
    if checkpoint is not source:
        opened.enter_context(checkpoint)
    return checkpoint


def _whole(proved: Sequence[TensorMove], tried: Sequence[TensorMove]) -> list[TensorMove]:
    """The proved moves, but for those that split a tensor of which another part was not proved."""
    lost = {k for m in tried if m not in proved for k in m.sources}
    return [m for m in proved if not (len(m.targets) > 1 and lost & set(m.sources))]


@dataclass
class _Equating:
    """Two checkpoints, with what was read of them; `specs` and `wanted` give the order in which keys are tried."""

    source: Checkpoint
    target: Checkpoint
    specs: Mapping[str, TensorSpec]
    wanted: Mapping[str, TensorSpec]

    def __post_init__(self) -> None:
        self.prints: dict[Any, dict[Any, list[str]]] = {}

    def holds(self, move: TensorMove) -> bool:
        """Whether a move makes exactly what the target holds."""
        from ..language.recipe import Recipe
        from ..planning.planner import make_plan
        from ..running.saving import state_dict_of

        atom = _as_rules(move)
        if atom is None:
            return False
        specs = {k: self.source.specs[k] for k in move.sources}
        part = open_checkpoint({k: self.source[k].load() for k in move.sources})
        try:
            made = state_dict_of(make_plan(specs, Recipe(**atom), lambda n: Recipe()), part)
        except CkptSurgeryError:
            return False
        return all(k in made and _same(made[k], self.target[k].load()) for k in move.targets)

    def complete(self, proved: list[TensorMove]) -> tuple[list[TensorMove], dict[str, str]]:
        """The proved moves, with what values alone show; targets that share a source are tied to the first."""
        made = {k for m in proved for k in m.targets}
        used = {k for m in proved for k in m.sources}
        left = [k for k in self.wanted if k not in made]
        ties: dict[str, str] = {}
        first = {m.sources[0]: m.targets[0] for m in proved if len(m.sources) == len(m.targets) == 1 and not m.left}
        for key in list(left):
            wanted = self.target[key].load()
            alike = self._alike(wanted)
            fresh = sorted((k for k in alike if k not in used), key=lambda k: -_shared(k, key))
            for candidate in (*fresh, *(k for k in alike if k in used)):
                axes = self._axes(candidate, key)
                if axes is None:
                    continue
                if candidate in used:
                    if candidate in first and not axes[0]:
                        ties[key] = first[candidate]
                        left.remove(key)
                    break
                left_text, right_text, dims = axes
                proved.append(TensorMove((candidate,), (key,), left_text, right_text, dims=tuple(dims.items())))
                used.add(candidate)
                first.setdefault(candidate, key)
                left.remove(key)
                break
        for key in list(left):
            move = self._as_others(key, proved)
            if move is not None:
                proved.append(move)
                used |= set(move.sources)
                left.remove(key)
        proved += self._assembled(left, [k for k in self.specs if k not in used])
        return proved, ties

    def _as_others(self, key: str, proved: Sequence[TensorMove]) -> TensorMove | None:
        """A tensor whose values repeat, rearranged as one that was proved: a bias as its weight's rows."""
        wanted = self.target[key].load()
        ways: dict[tuple[str, str, Any], None] = {}
        for move in proved:
            if move.left and not move.fuse:
                ways[move.left, move.right, move.dims] = None
                heads = [re.match(r"\[(\([^)]*\)|[^ \]]+)", text) for text in (move.left, move.right)]
                if all(heads):
                    ways["[" + heads[0][1] + "]", "[" + heads[1][1] + "]", move.dims] = None  # type: ignore[index]
        for candidate in self._alike(wanted):
            for left, right, dims in ways:
                move = TensorMove((candidate,), (key,), left, right, dims=dims)
                if self.holds(move):
                    return move
        return None

    def _alike(self, wanted: Tensor) -> list[str]:
        """The source tensors that hold the same values in any order, in the other's dtype."""
        if wanted.dtype not in self.prints:
            table: dict[Any, list[str]] = defaultdict(list)
            for key in self.specs:
                table[_fingerprint(self.source[key].load().to(wanted.dtype))].append(key)
            self.prints[wanted.dtype] = table
        return self.prints[wanted.dtype].get(_fingerprint(wanted), [])

    def _axes(self, source: str, target: str) -> tuple[str, str, dict[str, int]] | None:
        """The axes by which one tensor becomes another, empty where it moves as it is."""
        return _axes_between(self.source[source].load(), self.target[target].load())

    def cut(self, left: Sequence[str], free: Sequence[str]) -> StagedCut:
        """The moves of blocks of rows, for tensors of which each block goes its own way."""
        found = StagedCut([], [], [])
        probes = [
            {k: _probes(_flat(side[k].load())) for k in keys}
            for side, keys in ((self.source, free), (self.target, left))
        ]
        for side, keys, small, forward in ((self.source, free, probes[1], True), (self.target, left, probes[0], False)):
            other = self.target if forward else self.source
            for key, members in self._members(side, keys, small):
                whole = side[key].load()
                cut = chunks_of(key, side.specs[key], _flat(whole), {k: _flat(other[k].load()) for k in members})
                if cut is not None:
                    self._pieces(found, cut[0], cut[1], whole, forward)
        done = {k for m in found.moves for k in (*m.sources, *m.targets)}
        for key in (k for k in left if k not in done):
            wanted = self.target[key].load()
            for candidate in (k for k in self._alike(wanted) if k in free and k not in done):
                blocks = _swapped(
                    self.source.specs[candidate], self.target.specs[key], self.source[candidate].load(), wanted
                )
                if blocks is not None:
                    one, two, order = blocks
                    one, two = replace(one, key=candidate), replace(two, key=key)
                    found.splits.append(one)
                    found.joins.append(two)
                    found.moves.extend(TensorMove((one.pieces[n],), (piece,)) for n, piece in zip(order, two.pieces))
                    done |= {candidate, key}
                    break
        return found

    def _pieces(
        self, found: StagedCut, cut: ChunkedMatch, members: Sequence[str], whole: Tensor, forward: bool
    ) -> None:
        """Add the moves between the blocks of a tensor and the members that have their values, if each has one."""
        moves = []
        for piece, name, (low, high) in zip(cut.pieces, members, cut.bounds):
            block, other = whole[low:high], (self.target if forward else self.source)[name].load()
            axes = _axes_between(block, other) if forward else _axes_between(other, block)
            if axes is None:
                return
            ends = (piece, name) if forward else (name, piece)
            moves.append(TensorMove((ends[0],), (ends[1],), axes[0], axes[1], dims=tuple(axes[2].items())))
        (found.splits if forward else found.joins).append(cut)
        found.moves.extend(moves)

    def _assembled(self, left: Sequence[str], free: Sequence[str]) -> list[TensorMove]:
        """Targets that are made of several sources, or that several make of one: blocks, stacks, interleaved rows."""
        probes = [
            {k: _probes(_flat(side[k].load())) for k in keys}
            for side, keys in ((self.source, free), (self.target, left))
        ]
        found = [self._joined(members, key, True) for key, members in self._members(self.target, left, probes[0])]
        found += [self._joined(members, key, False) for key, members in self._members(self.source, free, probes[1])]
        return [move for move in found if move is not None]

    def _members(
        self, side: Checkpoint, keys: Sequence[str], probes: Mapping[str, tuple[int, Array]]
    ) -> Iterator[tuple[str, list[str]]]:
        """For each whole the tensors of the other side whose values are all in it, where together they fill it.

        One whole is held at a time; of the others, a few values each.
        """
        import numpy as np

        for key in keys:
            size = side.specs[key].numel
            small = [k for k, (length, _) in probes.items() if 0 < length < size]
            if sum(probes[k][0] for k in small) < size:
                continue
            every = np.concatenate([probes[k][1] for k in small])
            inside = np.isin(every, _flat(side[key].load()))
            ends = np.cumsum([len(probes[k][1]) for k in small])
            parts = np.split(inside, ends[:-1])
            members = [k for k, there in zip(small, parts) if there.all()]
            if members and sum(probes[k][0] for k in members) == size:
                yield key, members

    def _joined(self, members: Sequence[str], key: str, forward: bool) -> TensorMove | None:
        """Equal parts in the order in which they first appear in the whole, with the axes that place them there."""
        import numpy as np

        small, large = (self.source, self.target) if forward else (self.target, self.source)
        whole, parts = _flat(large[key].load()), {k: _flat(small[k].load()) for k in members}
        members = sorted(members, key=lambda k: int(np.flatnonzero(whole == parts[k][0])[0]))
        if len({len(parts[k]) for k in members}) != 1:
            return self._blocks(members, key, parts, whole, forward)
        shape = tuple(small[members[0]].spec.shape)
        places = _places(np.concatenate([parts[k] for k in members]), whole)
        digits = None if places is None else digits_of(places)
        axes = None if digits is None else axes_of(digits, (len(members), *shape), tuple(large[key].spec.shape))
        if axes is None:
            return self._blocks(members, key, parts, whole, forward)
        left, right, dims = axes
        first, _, rest = left[1:-1].partition(" ")
        right = right.replace(first, "p", 1) if first.isalnum() else right
        if not first.isalnum():
            return None
        return _either(members, key, f"[{rest}]", right, (), tuple(dims.items()), forward)

    def _blocks(
        self, members: Sequence[str], key: str, parts: Mapping[str, Array], whole: Array, forward: bool
    ) -> TensorMove | None:
        """Unequal parts along one axis: block after block, or in groups."""
        import numpy as np

        small, large = (self.source, self.target) if forward else (self.target, self.source)
        shapes = [tuple(small[k].spec.shape) for k in members]
        shape = tuple(large[key].spec.shape)
        for axis in range(len(shape)):
            if any(
                len(s) != len(shape) or s[:axis] + s[axis + 1 :] != shape[:axis] + shape[axis + 1 :] for s in shapes
            ):
                continue
            rows = [s[axis] for s in shapes]
            for groups in (g for g in range(1, min(rows) + 1) if all(r % g == 0 for r in rows)):
                pieces = [
                    parts[k].reshape(*s[:axis], groups, s[axis] // groups, *s[axis + 1 :])
                    for k, s in zip(members, shapes)
                ]
                if np.array_equal(np.concatenate(pieces, axis=axis + 1).reshape(-1), whole):
                    one, two = ("rows:p", "(p rows:p)") if groups == 1 else ("(g rows:p)", "(g p rows:p)")
                    dims = () if groups == 1 else (("g", groups),)
                    names = list("abcdefh"[: len(shape)])
                    one, two = (" ".join([*names[:axis], text, *names[axis + 1 :]]) for text in (one, two))
                    sizes = tuple(r // groups for r in rows)
                    return _either(members, key, f"[{one}]", f"[{two}]", sizes, dims, forward)
        return None


def _axes_between(one: Tensor, two: Tensor) -> tuple[str, str, dict[str, int]] | None:
    """The axes by which one tensor becomes another, empty where it moves as it is."""
    if one.shape == two.shape and _same(one, two):
        return "", "", {}
    one = one.to(two.dtype)
    places = _places(_flat(one), _flat(two))
    digits = None if places is None else digits_of(places)
    axes = None if digits is None else axes_of(digits, tuple(one.shape), tuple(two.shape))
    return axes or _by_rows(one, two)


def _swapped(
    spec: TensorSpec, other: TensorSpec, one: Tensor, two: Tensor
) -> tuple[ChunkedMatch, ChunkedMatch, list[int]] | None:
    """The same blocks of rows in both, and for each of the target's the number of the source's that it is."""
    if one.shape != two.shape:
        return None
    places = _places(_flat(one.to(two.dtype)), _flat(two))
    runs = None if places is None else runs_of(spec, places)
    if runs is None:
        return None
    ordered = sorted(runs)
    rows = [tuple(high - low for low, high in listed) for listed in (ordered, runs)]
    return ChunkedMatch("", spec, rows[0]), ChunkedMatch("", other, rows[1]), [ordered.index(r) for r in runs]


def _either(
    members: Sequence[str],
    key: str,
    one: str,
    two: str,
    sizes: tuple[int, ...],
    dims: tuple[tuple[str, int], ...],
    forward: bool,
) -> TensorMove:
    """The parts to the whole, or the whole to its parts."""
    if forward:
        return TensorMove(tuple(members), (key,), one, two, "concat", sizes, dims=dims)
    return TensorMove((key,), tuple(members), two, one, "concat", sizes, dims=dims)


def _as_rules(move: TensorMove) -> dict[str, Any] | None:
    """A recipe that is one move, its keys spelled out."""
    from .atoms import atoms

    never = lambda prefix: False  # noqa: E731
    try:
        listed = atoms([move], list(move.sources), (never, never), lambda p, v: tuple(v))
    except ValueError:
        return None
    rules = [f"{a.source} {a.left} -> {a.target} {a.right}".replace("  ", " ").strip() for a in listed]
    return {"rules": rules, "dims": {k: v for a in listed for k, v in a.dims.items()}}


def _flat(tensor: Tensor) -> Array:
    import torch

    tensor = tensor.detach().reshape(-1)
    array: Array = (tensor.to(torch.float64) if tensor.dtype.is_floating_point else tensor.to(torch.int64)).numpy()
    return array


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal, after one has been cast to the other's dtype where they differ."""
    import torch

    return one.shape == two.shape and bool(torch.equal(one.to(two.dtype), two))


def _fingerprint(tensor: Tensor) -> tuple[int, float, float, float]:
    """What no rearrangement changes: the size, and sums over the sorted values, always taken in the same order."""
    import numpy as np

    values = np.sort(_flat(tensor).astype(np.float32)) if tensor.numel() else np.zeros(0, np.float32)
    places = np.arange(1, len(values) + 1, dtype=np.float64)
    wide = values.astype(np.float64)
    return len(values), float(wide.sum()), float((wide * wide).sum()), float((wide * places).sum())


def _places(one: Array, two: Array) -> Array | None:
    """For each place of the second its place in the first; None where values repeat or differ."""
    import numpy as np

    if len(one) != len(two) or len(one) == 0:
        return None
    first, second = np.argsort(one, kind="stable"), np.argsort(two, kind="stable")
    values = one[first]
    if not np.array_equal(values, two[second]) or bool((values[1:] == values[:-1]).any()):
        return None
    result = np.empty(len(one), dtype=np.int64)
    result[second] = first
    return result


def _by_rows(one: Tensor, two: Tensor) -> tuple[str, str, dict[str, int]] | None:
    """The axes where values repeat but rows do not: rows in another order, and matrices turned."""
    import numpy as np

    first = _flat(one).reshape(one.shape[0] if one.dim() else 1, -1)
    for turned in (False, True) if one.dim() == 2 else (False,):
        other = two.t() if turned else two
        if other.shape != one.shape or one.dim() < 1:
            continue
        second = _flat(other.contiguous()).reshape(first.shape)
        places = _places(_hashed(first), _hashed(second))
        digits = None if places is None else digits_of(places)
        if places is None or digits is None or not np.array_equal(first[places], second):
            continue
        axes = axes_of(digits, first.shape[:1], first.shape[:1])
        if axes is None:
            continue
        rows, moved = axes[0][1:-1], axes[1][1:-1]
        if turned:
            return f"[{rows} b]", f"[b {moved}]", axes[2]
        tail = " ..." if one.dim() > 1 else ""
        return f"[{rows}{tail}]", f"[{moved}{tail}]", axes[2]
    return None


def _hashed(rows: Array) -> Array:
    """A number for each row, the same for the same row."""
    import hashlib

    import numpy as np

    digests = [hashlib.blake2b(np.ascontiguousarray(r).tobytes(), digest_size=7).digest() for r in rows]
    return np.array([int.from_bytes(d, "little") for d in digests], dtype=np.int64)


def _probes(values: Array) -> tuple[int, Array]:
    """How many values there are, and a few of them."""
    return len(values), values[:: max(1, len(values) // _PROBES)].copy()


def _shared(one: str, two: str) -> int:
    """How many segments two keys share: of tensors with the same values, the namesake is likelier."""
    return len(set(one.replace("/", ".").split(".")) & set(two.replace("/", ".").split(".")))
