"""Ops on matrices as a whole: `matmul` and `low_rank`."""

from __future__ import annotations

from dataclasses import dataclass

from ..specs import TensorSpec
from .base import Op, OpError, Specs, Tensors
from .numerics import narrow, specs_of, widen
from .operands import arithmetic_float, operands
from .registry import op

__all__ = ["LowRankFactors", "Matmul"]


@op
@dataclass(frozen=True)
class Matmul(Op):
    """Multiply two matrices; sources: a, b. One matrix may be read by many rules: `+ rotation`.

    a · b, with a [m, k] and b [k, n].

    >>> Matmul(turn_a=True).infer((TensorSpec([3, 4], "F32"), TensorSpec([3, 5], "BF16")))
    (TensorSpec(shape=(4, 5), dtype='F32'),)

    Args:
        turn_a, turn_b: the matrix is transposed first.
        like: the number of the source, 0 or 1, whose dtype the result has.

    Computed in float32 (float64 for float64) and rounded once. The op has no inverse: multiply by the inverse matrix.

    Raises:
        OpError: other than two matrices, or sizes that do not meet.
    """

    name = "matmul"
    joins = True
    turn_a: bool = False
    turn_b: bool = False
    like: int = 0

    def infer(self, specs: Specs) -> Specs:
        a, b = operands(self, specs, "a", "b")
        if self.like not in (0, 1):
            raise OpError(f"{self.name}: like is 0 or 1, not {self.like}")
        for spec in specs:
            arithmetic_float(self, spec)
        if len(a.shape) != 2 or len(b.shape) != 2:
            raise OpError(f"{self.name} takes two matrices, not {a} and {b}")
        rows, left = reversed(a.shape) if self.turn_a else a.shape
        right, columns = reversed(b.shape) if self.turn_b else b.shape
        if left != right:
            raise OpError(f"{self}: {a} and {b} do not meet: {left} against {right}")
        return (TensorSpec((rows, columns), specs[self.like].dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        (spec,) = self.infer(specs_of(tensors))
        a, b = map(widen, tensors)
        wide = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(wide), b.to(wide)
        return (narrow((a.t() if self.turn_a else a) @ (b.t() if self.turn_b else b), spec.dtype, str(self)),)


@op
@dataclass(frozen=True)
class LowRankFactors(Op):
    """Cut a matrix into two of a low rank; targets: B, A.

    W ≈ B · A, with W [out, in], B [out, r] and A [r, in]: the best of this rank by the singular values (Eckart and
    Young, 1936), whose square roots both factors get.

    >>> LowRankFactors(2).infer((TensorSpec([6, 4], "F32"),))
    (TensorSpec(shape=(6, 2), dtype='F32'), TensorSpec(shape=(2, 4), dtype='F32'))

    Args:
        rank: from 1 to the smaller side.

    Computed in float64 and rounded once. The smaller singular values are lost, so it has no exact inverse.

    Raises:
        OpError: not a matrix, or a rank that it does not have.
    """

    name = "low_rank"
    joins = True
    rank: int

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one matrix")
        arithmetic_float(self, spec)
        if len(spec.shape) != 2 or not 1 <= self.rank <= min(spec.shape):
            raise OpError(f"{self} takes a matrix of at least this rank, not {spec}")
        out, inside = spec.shape
        return TensorSpec((out, self.rank), spec.dtype), TensorSpec((self.rank, inside), spec.dtype)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        first, second = self.infer(specs_of(tensors))
        left, values, right = torch.linalg.svd(tensors[0].double(), full_matrices=False)
        root = values[: self.rank].sqrt()
        up, down = left[:, : self.rank] * root, root[:, None] * right[: self.rank]
        return narrow(up, first.dtype, str(self)), narrow(down, second.dtype, str(self))
