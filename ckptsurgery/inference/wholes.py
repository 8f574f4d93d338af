"""Rules for tensors that several tensors of the other side fill: stacks, concatenations, groups, blocks of any of them.

`SliceTable` numbers a whole by the elements of its parts; here the numbers become axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from math import prod
from typing import TYPE_CHECKING, Any

from ..specs import TensorSpec
from .atoms import common_head
from .chunks import ChunkedMatch
from .digits import axes_of, digits_of
from .moves import TensorMove
from .slices import Numbering

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["WholeMoves", "axes_between", "completed", "moves_of"]

_CHANGED = 4  # parts of a whole that may have other values

Axes = tuple[str, str, dict[str, int]]


@dataclass(frozen=True)
class WholeMoves:
    """The moves that make a whole.

    Args:
        moves: with blocks, between the parts and the blocks.
        cut: the blocks; None where one rule makes the whole of its parts.
    """

    moves: tuple[TensorMove, ...]
    cut: ChunkedMatch | None = None


def moves_of(key: str, spec: TensorSpec, found: Numbering, forward: bool) -> WholeMoves | None:
    """The rules between a whole and its parts, written from source to target; None where no axes say it.

    Args:
        forward: whether the whole is the target.
    """
    move = _joined(key, found, forward)
    if move is not None:
        return WholeMoves((move,))
    for axis in range(found.numbers.ndim):
        made = _in_blocks(key, spec, found, axis, forward)
        if made is not None:
            return made
    return None


def completed(key: str, spec: TensorSpec, found: Numbering, free: Sequence[str], forward: bool) -> WholeMoves | None:
    """The rules between a whole and its parts where some parts were changed: they stand where the others leave room.

    Args:
        free: the keys of tensors of the parts' shape that could be the others.
    """
    import numpy as np

    flat, size = found.numbers.reshape(-1), prod(found.shapes[0])
    order = np.argsort(flat, kind="stable")
    hole, known = np.sort(order[: int((flat < 0).sum())]), order[int((flat < 0).sum()) :].reshape(-1, size)
    steps = known[0] - known[0, 0]
    if len(hole) != len(free) * size or len(free) > _CHANGED or not (known - known[:, :1] == steps).all():
        return None
    numbers = flat.copy()
    for n in range(len(free)):
        places = hole[0] + steps
        if not np.isin(places, hole).all():
            return None
        numbers[places] = (len(known) + n) * size + np.arange(size)
        hole = np.setdiff1d(hole, places)
    shapes = (*found.shapes, *found.shapes[:1] * len(free))
    for names in permutations(free):
        whole = Numbering(numbers.reshape(found.numbers.shape), (*found.parts, *names), shapes)
        move = _joined(key, whole, forward)
        if move is not None and (len(free) == 1 or move.fuse != "concat"):
            return WholeMoves((move,))
    return None


def axes_between(places: Array, source: Sequence[int], target: Sequence[int]) -> Axes | None:
    """The axes of a map from target places to source places; empty where the tensor moves as it is."""
    import numpy as np

    if tuple(source) == tuple(target) and np.array_equal(places, np.arange(len(places))):
        return "", "", {}
    digits = digits_of(places)
    return None if digits is None else axes_of(digits, tuple(source), tuple(target))


def _joined(key: str, found: Numbering, forward: bool) -> TensorMove | None:
    """Equal parts in the order in which their first elements appear in the whole."""
    import numpy as np

    if len(set(found.shapes)) != 1:
        return None
    numbers, size, shape = found.numbers.reshape(-1), prod(found.shapes[0]), found.shapes[0]
    firsts = np.flatnonzero(numbers % size == 0)
    order = (numbers[firsts] // size).tolist()
    parts = tuple(found.parts[n] for n in order)
    ranks = np.argsort(order)
    digits = digits_of(ranks[numbers // size] * size + numbers % size)
    axes = None if digits is None else axes_of(digits, (len(parts), *shape), found.numbers.shape)
    if axes is None:
        return None
    groups = re.findall(r"\([^)]*\)|\S+", axes[0][1:-1])
    counted, left, dims = groups[0].strip("()").split(), f"[{' '.join(groups[1:])}]", dict(axes[2])
    if len(counted) == 1:
        name, fuse = ("e", "stack") if _numbered(parts) else ("p", "concat")
        return _written(parts, key, left, axes[1], {counted[0]: name}, fuse, dims, len(parts), shape, forward)
    if len(counted) != 2:
        return None
    inner = len(parts) // dims.pop(counted[0])
    for names, listed in ((("e", "p"), parts), (("p", "e"), _turned(parts, inner))):
        count = inner if names[0] == "e" else len(parts) // inner
        if count > 1 and _is_grid(listed, count):
            return _written(
                listed,
                key,
                left,
                axes[1],
                dict(zip(counted, names)),
                "stack concat",
                dims,
                len(parts) // count,
                shape,
                forward,
            )
    return None


def _turned(parts: Sequence[str], inner: int) -> tuple[str, ...]:
    return tuple(part for n in range(inner) for part in parts[n::inner])


def _numbered(keys: Sequence[str]) -> bool:
    """Whether keys differ in one number alone, which counts from 0."""
    head = common_head(list(keys))
    head = head.rstrip("0123456789")
    tails = [re.match(r"(\d+)(.*)", k[len(head) :]) for k in keys]
    return all(m is not None and m[1] == str(n) for n, m in enumerate(tails)) and len({m[2] for m in tails if m}) == 1


def _is_grid(keys: Sequence[str], count: int) -> bool:
    """Whether keys are `count` parts under each of some numbers that count from 0."""
    return len(keys) > count and all(_numbered(keys[n::count]) for n in range(count))


def _written(
    parts: Sequence[str], key: str, left: str, right: str, names: Mapping[str, str], fuse: str, dims: dict[str, int],
    stacked: int, shape: Sequence[int], forward: bool,
) -> TensorMove:  # fmt: skip
    """The move with the names that a fused axis has."""
    taken = {"e", "p"} & {*re.findall(r"[a-z]\w*", left)}
    for name in sorted(taken):
        spare = {"e": "j", "p": "k"}[name]
        left, right = (re.sub(rf"\b{name}\b", spare, text) for text in (left, right))
        dims = {spare if k == name else k: n for k, n in dims.items()}
    right = re.sub(r"[a-z]\w*", lambda m: names.get(m[0], m[0]), right)
    sizes = tuple(dims.items())
    if not forward:
        known = {**_sizes(left, shape, dims), "e": stacked}
        inside = [n for group in re.findall(r"\(([^)]*)\)", right) for n in group.split()[:-1] if n != "p"]
        lasts = [n for group in re.findall(r"\(([^)]*\be)\)", right) for n in group.split()[-1:]]
        sizes = tuple((n, known[n]) for n in dict.fromkeys((*inside, *lasts)))
    if forward:
        return TensorMove(tuple(parts), (key,), left, right, fuse, dims=sizes)
    return TensorMove((key,), tuple(parts), right, left, fuse, dims=sizes)


def _sizes(axes: str, shape: Sequence[int], dims: Mapping[str, int]) -> dict[str, int]:
    """The size of each name in an axis list, of which all but the last in a group are known."""
    found = dict(dims)
    for group, size in zip(re.findall(r"\([^)]*\)|\S+", axes[1:-1]), shape):
        names = group.strip("()").split()
        found[names[-1]] = size // prod(found[n] for n in names[:-1])
    return found


def _in_blocks(key: str, spec: TensorSpec, found: Numbering, axis: int, forward: bool) -> WholeMoves | None:
    """Parts that have whole slices along an axis to themselves, block after block or in groups."""
    import numpy as np

    bases = np.array(found.bases)
    owners = np.searchsorted(bases, np.moveaxis(found.numbers, axis, 0).reshape(spec.shape[axis], -1), "right") - 1
    kinds: dict[tuple[int, ...], int] = {}
    labels = [kinds.setdefault(tuple(np.unique(row).tolist()), len(kinds)) for row in owners]
    if sum(map(len, kinds)) != len(found.parts):
        return None
    cut = ChunkedMatch.labelled(key, spec, axis, labels)
    if cut is None:
        return None
    moves: list[TensorMove] = []
    for members, piece, places in zip(kinds, cut.pieces, cut.places):
        block = np.take(found.numbers, places, axis=axis)
        move = _of_block(piece, block, [(found.parts[m], found.shapes[m], int(bases[m])) for m in members], forward)
        if move is None:
            return None
        moves.append(move)
    if any(move.left or move.fuse for move in moves):
        return WholeMoves(tuple(moves), cut)
    # The parts are the blocks: one rule is enough.
    whole, names = cut.move(not forward), tuple((m.sources if forward else m.targets)[0] for m in moves)
    sources, targets = (names, (key,)) if forward else ((key,), names)
    return WholeMoves((replace(whole, sources=sources, targets=targets),))


def _of_block(
    piece: str, block: Array, parts: Sequence[tuple[str, tuple[int, ...], int]], forward: bool
) -> TensorMove | None:
    """The move between one block of a whole and the parts that fill it."""
    import numpy as np

    if len(parts) > 1:
        numbers = np.empty_like(block)
        base = 0
        for _, shape, at in parts:
            mine = (block >= at) & (block < at + prod(shape))
            numbers[mine] = block[mine] - at + base
            base += prod(shape)
        keys, shapes = tuple(k for k, *_ in parts), tuple(s for _, s, _ in parts)
        return _joined(piece, Numbering(numbers, keys, shapes), forward)
    ((name, shape, base),) = parts
    places = (block - base).reshape(-1)
    if forward:
        axes = axes_between(places, shape, block.shape)
        return None if axes is None else TensorMove((name,), (piece,), axes[0], axes[1], dims=tuple(axes[2].items()))
    back = np.empty_like(places)
    back[places] = np.arange(len(places))
    axes = axes_between(back, block.shape, shape)
    return None if axes is None else TensorMove((piece,), (name,), axes[0], axes[1], dims=tuple(axes[2].items()))
