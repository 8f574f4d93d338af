"""Programs whose one op works on runs of rows: made part by part, where an op on single elements is made by regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..ops.base import Op, OpPart, Specs
from ..specs import DTYPES
from .steps import ApplyOp, Move, Program

__all__ = ["RowParts", "row_parts_of"]

_FLOAT = 4  # bytes of the floats that ops compute with


@dataclass(frozen=True)
class RowParts:
    """A program as one op that can be done in parts, and ops on single elements after it.

    Args:
        op: the op.
        order: the number of the program's input that each of its sources is.
        specs: of its sources.
        chain: the ops that follow on each result.
    """

    op: Op
    order: tuple[int, ...]
    specs: Specs
    chain: tuple[Op, ...]

    def parts(self, limit: int) -> Iterator[OpPart]:
        """Yield the parts, each of which makes at most `limit` elements where the op's steps allow it."""
        return self.op.parts(self.specs, limit) or iter(())

    def held(self, part: OpPart) -> int:
        """Return the bytes that a task holds which makes a part: sources, results, and floats in between."""
        read = sum(run.spec.nbytes for run in part.sources)
        return read + sum(run.spec.nbytes + _FLOAT * run.spec.numel for run in part.results)


def row_parts_of(program: Program) -> RowParts | None:
    """Return how a program is done in parts, or None where it must be run on whole tensors."""
    if any(DTYPES[spec.dtype].bits % 8 for spec in (*program.inputs, *program.outputs)):
        return None
    order, specs = tuple(range(len(program.inputs))), program.inputs
    op: Op | None = None
    chain: list[Op] = []
    for instruction in program.instructions:
        match instruction:
            case Move(layout) if layout.copies is not None and (op is None or layout.copies == order[: len(specs)]):
                order = tuple(order[n] for n in layout.copies) if op is None else order
            case ApplyOp(first, groups) if op is None and groups == (tuple(range(len(specs))),):
                op, taken = first, specs
            case ApplyOp(later, groups) if op is not None and _on_each(later, groups, len(specs)):
                chain.append(later)
            case _:
                return None
        specs = instruction.after(specs)
    if op is None or op.parts(taken, 1) is None:
        return None
    return RowParts(op, order, taken, tuple(chain))


def _on_each(op: Op, groups: Sequence[tuple[int, ...]], count: int) -> bool:
    """Whether an op on single elements is applied to each of so many tensors."""
    return op.elementwise and op.axis_role is None and sorted(groups) == [(n,) for n in range(count)]
