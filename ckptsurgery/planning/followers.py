"""How a tensor that belongs to a parameter follows a plan: copies of its values, its moments, its factored moments.

A copy of the values, such as an average, undergoes what the parameter undergoes. A moment is a running mean of
gradients: if a rule only moves a parameter's elements, the gradient's elements move in the same way, and so do the
moment's. Entries that a rule adds start at zero, as an optimizer starts them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from ..ops.arithmetic import Cast
from ..ops.base import Specs, Unchanged
from ..ops.initialisers import Initialiser
from ..ops.keyed import Draw
from .layout import Layout, Piece, run_piece
from .steps import ApplyOp, Instruction, Make, Move, Parallel, Program, Select, Step

__all__ = ["CannotFollow", "factors_following", "moments_following", "read_twice", "values_following"]

_COPIES = "each copy of a parameter has a gradient of its own"


class CannotFollow(Exception):
    """A tensor beside the model cannot follow its parameter; the text gives the reason."""


def values_following(program: Program, inputs: Specs) -> Program:
    """Return what becomes of copies of the parameters' values, in dtypes of their own.

    >>> from ckptsurgery.specs import TensorSpec
    >>> program = Program.of((TensorSpec([2], "BF16"),), [ApplyOp(Cast("F16"), ((0,),))])
    >>> values_following(program, (TensorSpec([2], "F32"),)).outputs
    (TensorSpec(shape=(2,), dtype='F32'),)

    Raises:
        OpError: an op that does not take their dtype.
    """
    return _following(program, inputs, moments=False)


def moments_following(program: Program, inputs: Specs) -> Program:
    """Return what becomes of moments where `program` is what becomes of their parameters.

    Raises:
        CannotFollow: the program computes values, or makes copies.
    """
    return _following(program, inputs, moments=True)


def _following(program: Program, inputs: Specs, moments: bool) -> Program:
    if tuple(s.shape for s in inputs) != tuple(s.shape for s in program.inputs):
        raise CannotFollow("its shape is not that of the parameter")
    made = Program.of(inputs, ())
    for instruction in program.instructions:
        for one in _followed(instruction, made.outputs, moments):
            made = made.then(one)
    return made


def _followed(instruction: Instruction, specs: Specs, moments: bool) -> Iterable[Instruction]:
    match instruction:
        case Move(layout):
            if moments and any(0 in p.source_strides for p in layout.pieces):
                raise CannotFollow(_COPIES)
            return [Move(layout, _dtypes(layout, specs))]
        case Select(indices):
            if moments and len(set(indices)) < len(indices):
                raise CannotFollow(_COPIES)
            return [instruction]
        case Parallel():
            shares = instruction.shares(specs)
            return [Parallel(tuple(_following(part, share, moments) for part, share in shares))]
        case Make(op):
            (spec,) = op.infer(())
            return [Make(Draw(Initialiser.of("zeros", (), {}), spec))] if moments else [instruction]
        case ApplyOp(Cast()):
            return []
        case ApplyOp(op, groups):
            other = op.on_moments() if moments else op
            if other is None:
                raise CannotFollow(f"'{op}' computes new values")
            return [] if isinstance(other, Unchanged) else [ApplyOp(other, groups)]


def _dtypes(layout: Layout, specs: Specs) -> tuple[str, ...]:
    """The dtype of each target: that of a tensor that goes into it."""
    into = {piece.target: piece.source for piece in layout.pieces}
    kinds = {n: {specs[p.source].dtype for p in layout.into(n)} for n in into}
    for found in kinds.values():
        if len(found) > 1:
            raise CannotFollow(f"tensors of different dtypes ({', '.join(sorted(found))}) become one")
    return tuple(specs[into.get(n, 0)].dtype for n in range(len(layout.targets)))


def read_twice(steps: Iterable[Step], first: Mapping[str, str]) -> set[str]:
    """Return the sources that steps read elements of more than once, so that copies of a parameter are made.

    Args:
        first: a tied name -> the name that is used for all of them.
    """
    read: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    counts: dict[int, tuple[int, ...]] = {}
    for step in steps:
        program = step.program
        if id(program) not in counts:
            counts[id(program)] = _elements_read(program)
        for key, spec, count in zip(step.sources, program.inputs, counts[id(program)]):
            read[first.get(key, key)] += count
            sizes[first.get(key, key)] = math.prod(spec.shape)
    return {key for key, count in read.items() if count > sizes[key]}


def _elements_read(program: Program) -> tuple[int, ...]:
    layout = program.moves
    if layout is None:
        return tuple(math.prod(spec.shape) for spec in program.inputs)
    counts = Counter[int]()
    for piece in layout.pieces:
        counts[piece.source] += piece.numel
    return tuple(counts[n] for n in range(len(program.inputs)))


def factors_following(program: Program) -> tuple[Layout, Layout, bool]:
    """Return how row factors and column factors move, where whole matrices move, and whether the two are exchanged.

    A factored second moment keeps, for a tensor [..., r, c], the means over its columns [..., r] and over its rows
    [..., c] (Shazeer and Stern, "Adafactor", 2018). These follow where every matrix stays whole, or is transposed:
    a part of a matrix has other means, and a matrix of several parts does not have theirs.

    >>> stack = Layout(((2, 3), (2, 3)), ((2, 2, 3),), (run_piece(0, 0, 6), run_piece(1, 0, 6, 0, 6)))
    >>> from ckptsurgery.specs import TensorSpec
    >>> program = Program.of((TensorSpec([2, 3], "F32"),) * 2, [Move(stack, ("F32",))])
    >>> rows, columns, swapped = factors_following(program)
    >>> rows.targets, columns.targets, swapped
    (((2, 2),), ((2, 3),), False)

    Returns:
        Layout from the sources' row factors, layout from their column factors, and whether the first makes column
        factors and the second row factors.

    Raises:
        CannotFollow: a matrix is cut, joined or computed.
    """
    layout = program.moves
    if layout is None:
        raise CannotFollow("its factors are means over the whole matrix, and the rule computes values")
    shapes = (*layout.sources, *layout.targets)
    if any(len(shape) < 2 for shape in shapes):
        raise CannotFollow("its moment is factored on one side of the rule only")
    rows, columns = layout.sources[0][-2:]
    swapped = {_is_swapped(piece, rows, columns) for piece in layout.pieces}
    ways: set[tuple[int, ...]] = {(rows, columns)} if swapped == {False} else {(columns, rows)}
    if len(swapped) != 1 or {s[-2:] for s in layout.sources} != {(rows, columns)} or not _trail(layout, ways):
        raise CannotFollow("its factors are means over the whole matrix, and the rule cuts or joins matrices")
    turned = swapped == {True}
    size = rows * columns
    ends = (-2, -1) if turned else (-1, -2)
    made = []
    for width, (gone_before, gone_after) in ((rows, (-1, ends[0])), (columns, (-2, ends[1]))):
        pieces = tuple(
            run_piece(
                p.source, p.target, p.numel // size * width,
                p.source_offset // size * width, p.target_offset // size * width,
            )
            for p in layout.pieces
        )  # fmt: skip
        sources = tuple(_without(shape, gone_before) for shape in layout.sources)
        made.append(Layout(sources, tuple(_without(shape, gone_after) for shape in layout.targets), pieces))
    return made[0], made[1], turned


def _is_swapped(piece: Piece, rows: int, columns: int) -> bool:
    size = rows * columns
    whole = not any(n % size for n in (piece.numel, piece.source_offset, piece.target_offset))
    if whole and piece.contiguous:
        return False
    turned = (columns, rows), (1, columns), (rows, 1)
    if whole and (piece.shape, piece.source_strides, piece.target_strides) == turned:
        return True
    raise CannotFollow("its factors are means over the whole matrix, and the rule cuts or joins matrices")


def _trail(layout: Layout, wanted: set[tuple[int, ...]]) -> bool:
    return {shape[-2:] for shape in layout.targets} <= wanted


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    kept = list(shape)
    del kept[dim]
    return tuple(kept)
