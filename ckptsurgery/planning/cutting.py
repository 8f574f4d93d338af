"""Cutting a program into regions: runs of a target that can be made alone, from the parts of the sources they need.

What only rearranges, and what works element by element after that, need not be done tensor by tensor: a stack of
experts is made an expert at a time, a cast a megabyte at a time. The cut is known from shapes, before anything
runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..ops.base import Op
from ..specs import DTYPES, TensorSpec
from .layout import Layout, Piece, run_piece, side_by_side
from .steps import ApplyOp, Instruction, Make, Move, Parallel, Program, Select, compose_layouts

__all__ = [
    "Cut",
    "Region",
    "blocks_of",
    "chains_of",
    "copies_bytes",
    "cut_of",
    "extent_of",
    "panels_of",
    "regions_of",
    "row_region",
    "run_length",
    "surveys_of",
]

_SHORT_RUN = 16 << 10
_MANY_RUNS = 4096
# Elements. A part of a matrix that is turned: so much lies in a core's cache beside what it becomes, and its rows make
# whole lines of the memory that they are columns of.
_PANEL = 1 << 16
_LARGEST_PANEL = 1 << 19
_ROWS = 64
_Chain = tuple[Op, ...]


@dataclass(frozen=True)
class Cut:
    """A program as one rearrangement, and ops on single elements after it.

    Args:
        layout: where each element comes from.
        chains: for each target the ops that follow, in order.
        joins: for each target the rows of equal length that its first op takes, each a target of the layout and the
            element of it where the row begins; None where no op takes several, and the layout's targets are those made.
    """

    layout: Layout
    chains: tuple[_Chain, ...]
    joins: tuple[tuple[tuple[int, int], ...], ...] | None = None

    @property
    def rows(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The rows of each target, of which there is one where no op takes several."""
        return self.joins or tuple(((n, 0),) for n in range(len(self.chains)))


@dataclass(frozen=True, slots=True)
class Region:
    """A run of one target's elements, `[start, stop)`, and the pieces that fill it exactly, each to be read at once."""

    target: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]


def copies_bytes(program: Program) -> bool:
    """Whether to move bytes from file to file, with no tensor in between: not where runs are many and short."""
    layout = program.moves
    if layout is None:
        return False
    if layout.copies is not None:
        return True
    if any(DTYPES[s.dtype].bits % 8 for s in program.outputs):
        return False
    count = sum(p.numel // run_length(p) for p in layout.pieces)
    return count <= _MANY_RUNS or sum(s.nbytes for s in program.outputs) >= count * _SHORT_RUN


def run_length(piece: Piece) -> int:
    """Elements that lie next to each other on both sides of a piece."""
    along = piece.shape and piece.source_strides[-1] == piece.target_strides[-1] == 1
    return piece.shape[-1] if along else 1


def cut_of(program: Program) -> Cut | None:
    """How to cut a program; None where it must be run on whole tensors.

    That is where an op looks at more than one element, and where pieces of one source overlap in what they span (a
    fused tensor split by turns), so that cutting would read it several times.
    """
    cut = chains_of(program)
    if cut is None:
        return None
    if cut.joins is not None and not cut.layout.contiguous:
        return None  # a block of a row that is turned would have to be looked for
    spanned = sum(extent_of(p.shape, p.source_strides) for p in cut.layout.pieces)
    used = {p.source for p in cut.layout.pieces}
    return cut if spanned <= sum(math.prod(cut.layout.sources[n]) for n in used) else None


def chains_of(program: Program) -> Cut | None:
    """A program as one rearrangement and ops on single elements after it; None where it is more than that."""
    if any(DTYPES[s.dtype].bits % 8 for s in (*program.inputs, *program.outputs)):
        return None
    return _cut(program)


def _cut(program: Program) -> Cut | None:
    shapes = [s.shape for s in program.inputs]
    cut: Cut | None = Cut(Layout.identity(shapes), ((),) * len(shapes))
    for instruction in program.instructions:
        cut = _after(cut, instruction) if cut is not None else None
    return cut


def _after(cut: Cut, instruction: Instruction) -> Cut | None:
    match instruction:
        case Move(layout):
            return _moved(cut, Cut(layout, ((),) * len(layout.targets)))
        case Select(indices) if cut.joins is not None:
            return Cut(cut.layout, tuple(cut.chains[i] for i in indices), tuple(cut.joins[i] for i in indices))
        case Select(indices):
            picked = [replace(p, target=n) for n, i in enumerate(indices) for p in cut.layout.pieces if p.target == i]
            targets = tuple(cut.layout.targets[i] for i in indices)
            return Cut(Layout(cut.layout.sources, targets, tuple(picked)), tuple(cut.chains[i] for i in indices))
        case Parallel(programs):
            cuts = [_cut(p) for p in programs]
            known = [c for c in cuts if c is not None]
            if len(known) < len(cuts):
                return None
            return _moved(cut, _beside(known))
        case Make():
            return None
        case ApplyOp(op, groups):
            if not op.elementwise:
                return None
            if op.axis_role == "reduce" or any(len(group) > 1 for group in groups):
                return _joined_cut(cut, op, groups)
            wanted = {i for group in groups for i in group}
            return replace(cut, chains=tuple((*c, op) if i in wanted else c for i, c in enumerate(cut.chains)))


def _joined_cut(cut: Cut, op: Op, groups: Sequence[tuple[int, ...]]) -> Cut | None:
    """The cut with an op that takes several rows: several tensors, or the slices of one along its first axis."""
    if cut.joins is not None or any(cut.chains) or sum(map(len, groups)) < len(cut.chains):
        return None
    rows: list[tuple[tuple[int, int], ...]] = []
    for group in sorted(groups):
        shapes = [cut.layout.targets[i] for i in group]
        if op.axis_role == "reduce":
            count, size = shapes[0][0], math.prod(shapes[0][1:])
            rows.append(tuple((group[0], n * size) for n in range(count)))
        else:
            rows.append(tuple((i, 0) for i in group))
    if not all(rows):
        return None
    return Cut(cut.layout, ((op,),) * len(groups), tuple(rows))


def _beside(cuts: Sequence[Cut]) -> Cut:
    layout = side_by_side([c.layout for c in cuts])
    chains = sum((c.chains for c in cuts), ())
    if all(c.joins is None for c in cuts):
        return Cut(layout, chains)
    joins: list[tuple[tuple[int, int], ...]] = []
    first = 0
    for one in cuts:
        joins += [tuple((target + first, start) for target, start in row) for row in one.rows]
        first += len(one.layout.targets)
    return Cut(layout, chains, tuple(joins))


def _moved(first: Cut, second: Cut) -> Cut | None:
    """One cut after another; ops stay where they are only if whole tensors are handed on after them."""
    copies = second.layout.copies
    if first.joins is not None and second.joins is None and copies is not None:
        chains = tuple((*first.chains[i], *later) for i, later in zip(copies, second.chains))
        return Cut(first.layout, chains, tuple(first.joins[i] for i in copies))
    if first.joins is not None or (second.joins is not None and any(first.chains)):
        return None
    if copies is None and any(first.chains):
        return None
    layout = compose_layouts(first.layout, second.layout)
    if layout is None:
        return None
    if second.joins is not None:
        return Cut(layout, second.chains, second.joins)
    before = [first.chains[i] for i in copies] if copies is not None else [()] * len(second.chains)
    return Cut(layout, tuple((*a, *b) for a, b in zip(before, second.chains)))


def extent_of(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last that a box touches, both included.

    >>> extent_of((2, 3), (10, 1)), extent_of((), ())
    (13, 1)
    """
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides))


def row_region(layout: Layout, target: int, start: int, stop: int) -> Region:
    """The elements `[start, stop)` of a target that is made of runs, as a region."""
    pieces: list[Piece] = []
    for piece in layout.into(target):
        low, high = max(start, piece.target_offset), min(stop, piece.target_offset + piece.numel)
        if low < high:
            source = piece.source_offset + low - piece.target_offset
            pieces.append(run_piece(piece.source, target, high - low, source, low))
    return Region(target, start, stop, tuple(pieces))


def surveys_of(program: Program, cut: Cut, output: int) -> int:
    """How often a program reads the sources of a target before it makes the target in blocks."""
    rows = [cut.layout.into(target) for target, _ in cut.rows[output]]
    if cut.joins is None or not all(rows):
        return 0
    specs = tuple(TensorSpec((), program.inputs[pieces[0].source].dtype) for pieces in rows)
    return cut.chains[output][0].surveys(specs)


def blocks_of(count: int, limit: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `limit` elements that make up `count` elements.

    >>> list(blocks_of(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, count, limit):
        yield start, min(start + limit, count)


def regions_of(layout: Layout, limit: int) -> Iterator[Region]:
    """The regions of every target, of at most `limit` elements where the pieces allow it, in order.

    Args:
        limit: neighbouring regions are joined, and pieces split, up to this many elements.
    """
    by_target: dict[int, list[Piece]] = {}
    for piece in layout.pieces:
        by_target.setdefault(piece.target, []).extend(_split(piece, limit))
    for target in sorted(by_target):
        pieces = sorted(by_target[target], key=lambda p: p.target_offset)
        yield from _joined(target, pieces, limit)


def _split(piece: Piece, limit: int) -> Iterator[Piece]:
    """Parts of a piece along its outermost axes, as long as the parts span disjoint runs of both sides."""
    if piece.numel <= limit or not piece.shape or not _apart(piece, 0):
        yield from panels_of(piece)
        return
    count = max(1, limit // math.prod(piece.shape[1:]))
    for start in range(0, piece.shape[0], count):
        part = _part(piece, 0, start, min(start + count, piece.shape[0]))
        yield from _split(part, limit) if count == 1 else panels_of(part)


def panels_of(piece: Piece) -> Iterator[Piece]:
    """Parts of a piece that is turned, along its outermost axis in the source; what is not turned is one part."""
    if piece.numel <= _PANEL or piece.source_strides == piece.target_strides:
        yield piece
        return
    axis = max(range(len(piece.shape)), key=lambda n: piece.source_strides[n])
    row = _within(piece.shape, piece.source_strides, axis)
    if row > piece.source_strides[axis]:
        yield piece
        return
    count = max(1, min(max(_ROWS, _PANEL // row), _LARGEST_PANEL // row))
    for start in range(0, piece.shape[axis], count):
        yield _part(piece, axis, start, min(start + count, piece.shape[axis]))


def _apart(piece: Piece, axis: int) -> bool:
    """Whether parts along an axis span disjoint runs of both sides."""
    both = piece.source_strides, piece.target_strides
    return all(_within(piece.shape, strides, axis) <= strides[axis] for strides in both)


def _within(shape: Sequence[int], strides: Sequence[int], axis: int) -> int:
    """Elements from the first to the last that one step along an axis touches."""
    return extent_of(shape, strides) - (shape[axis] - 1) * strides[axis]


def _part(piece: Piece, axis: int, start: int, stop: int) -> Piece:
    """The elements `[start, stop)` along an axis; an axis of one is left out."""
    kept = [axis] if stop - start > 1 else []
    axes = sorted([*kept, *(n for n in range(len(piece.shape)) if n != axis)])
    return Piece(
        piece.source,
        piece.target,
        tuple(stop - start if n == axis else piece.shape[n] for n in axes),
        piece.source_offset + start * piece.source_strides[axis],
        tuple(piece.source_strides[n] for n in axes),
        piece.target_offset + start * piece.target_strides[axis],
        tuple(piece.target_strides[n] for n in axes),
    )


def _joined(target: int, pieces: Sequence[Piece], limit: int) -> Iterator[Region]:
    """Pieces whose spans overlap in the target belong to one region; small regions are joined."""
    held: list[Piece] = []
    start = stop = 0
    for at, piece in enumerate(pieces):
        end = piece.target_offset + extent_of(piece.shape, piece.target_strides)
        if held and piece.target_offset >= stop and _next_stop(pieces, at) - start > limit:
            yield Region(target, start, stop, tuple(held))
            held = []
        if not held:
            start = piece.target_offset
        held.append(piece)
        stop = max(stop, end)
    if held:
        yield Region(target, start, stop, tuple(held))


def _next_stop(pieces: Sequence[Piece], at: int) -> int:
    """Where the run of overlapping pieces that begins at `pieces[at]` ends."""
    stop = start = pieces[at].target_offset
    for number in range(at, len(pieces)):  # a slice would copy all that follows, for each region anew
        piece = pieces[number]
        if piece.target_offset >= stop > start:
            break
        stop = max(stop, piece.target_offset + extent_of(piece.shape, piece.target_strides))
    return stop
