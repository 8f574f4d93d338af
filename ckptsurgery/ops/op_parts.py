"""How an op on whole tensors is made of ops on runs of their rows, so that it is done a megabyte at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..specs import TensorSpec
from .base import ElementRun, Op, OpPart

__all__ = ["RunsOf", "parts_of_rows"]


@dataclass(frozen=True, slots=True)
class RunsOf:
    """How a tensor is cut into rows that belong together.

    Args:
        spec: the tensor, as rows: `[rows, ...]`.
        step: how many of them belong to one step of the op; None where every part takes all of it.
    """

    spec: TensorSpec
    step: int | None = 1

    def run(self, first: int, last: int) -> ElementRun:
        """Return the rows of the steps from the first to before the last."""
        if self.step is None:
            return ElementRun(0, self.spec)
        rows, *row = self.spec.shape
        start, stop = min(first * self.step, rows), min(last * self.step, rows)
        return ElementRun(start * math.prod(row), TensorSpec((stop - start, *row), self.spec.dtype))


def parts_of_rows(op: Op, sources: Sequence[RunsOf], results: Sequence[RunsOf], limit: int) -> Iterator[OpPart]:
    """Yield the parts of an op that works row by row.

    >>> from ckptsurgery.ops import make_op
    >>> rows = RunsOf(TensorSpec([5, 34], "U8")), RunsOf(TensorSpec([5, 32], "F32"))
    >>> [part.results[0].start for part in parts_of_rows(make_op("gguf_dequant", ("Q8_0",)), rows[:1], rows[1:], 64)]
    [0, 64, 128]

    Args:
        op: what makes a part.
        limit: elements of a result's run, at least one step.
    """
    stepped = [(runs.spec, runs.step) for runs in results if runs.step is not None]
    steps = max((-(-spec.shape[0] // step) for spec, step in stepped), default=0)
    row = max((step * math.prod(spec.shape[1:]) for spec, step in stepped), default=1)
    count = max(1, limit // max(row, 1))
    for first in range(0, steps, count):
        last = min(first + count, steps)
        taken, made = (tuple(runs.run(first, last) for runs in side) for side in (sources, results))
        yield OpPart(op, taken, made)
