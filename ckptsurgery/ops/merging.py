"""Ops that join what belongs together: `lora_merge`, `fold_weight_norm` and `unfold_weight_norm`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..specs import DTYPES, TensorSpec
from .base import Op, OpError, Specs, Tensors
from .low_rank_pairs import alpha_divisor, check_pair, low_rank_update
from .numerics import has_data, narrow, specs_of, widen
from .operands import arithmetic_float, operands
from .registry import op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FoldWeightNorm", "LoraMerge", "UnfoldWeightNorm"]


@op
@dataclass(frozen=True)
class LoraMerge(Op):
    """Add a low-rank update to a weight; sources: weight, A, B, and alpha where the file stores it.

    >>> specs = TensorSpec([8, 6], "BF16"), TensorSpec([2, 6], "F32"), TensorSpec([8, 2], "F32")
    >>> LoraMerge(16).infer(specs), str(LoraMerge(16, r=2))
    ((TensorSpec(shape=(8, 6), dtype='BF16'),), 'lora_merge(alpha=16, r=2)')
    >>> LoraMerge().infer((*specs, TensorSpec([], "F32")))
    (TensorSpec(shape=(8, 6), dtype='BF16'),)

    W + (alpha / r) · B·A, with W [out, in], A [r, in] and B [out, r] (Hu et al., "LoRA", 2021). A convolution has W
    [out, in, h, w], A [r, in, h, w] and B [out, r, 1, 1]. A and B are also called down and up.

    Args:
        alpha: the scaling's numerator; left out where a fourth source, a tensor of one element, holds it.
        r: the rank; A's rows where left out, and checked against them where given.
        fan_in_fan_out: W is stored as [in, out].
        rslora: scale by alpha / sqrt(r) (Kalajdzievski, 2023).

    Computed in float32 (float64 for a float64 weight) and rounded once, to the weight's dtype. The three parts cannot
    be told apart again: there is no inverse.

    Raises:
        OpError: shapes that do not belong together; alpha given twice, or not at all.
    """

    name = "lora_merge"
    joins = True
    alpha: int | float | None = None
    r: int | None = None
    fan_in_fan_out: bool = False
    rslora: bool = False

    def infer(self, specs: Specs) -> Specs:
        weight, a, b = self._checked_alpha(specs)
        rank = check_pair(self, weight, a, b, self.fan_in_fan_out)
        if self.r not in (None, rank):
            raise OpError(f"{self.name}: A {a} has rank {rank}, not {self.r}")
        return (weight,)

    def run(self, tensors: Tensors) -> Tensors:
        (weight, a, b, *stored), (spec,) = tensors, self.infer(specs_of(tensors))
        wide = widen(weight)
        update = low_rank_update(wide, a, b, self.fan_in_fan_out)
        # A tensor without dims, as a number does, leaves the dtype of the update as it is.
        alpha = stored[0].reshape(()).double() if stored else float(self.alpha or 0)
        scale = alpha / alpha_divisor(a.shape[0], self.rslora)
        return (narrow(wide + scale * update, spec.dtype, str(self)),)

    def _checked_alpha(self, specs: Specs) -> Specs:
        """The specs of weight, A and B, alpha being given once: as an argument or as the fourth source."""
        if len(specs) != 4:
            found = operands(self, specs, "weight", "A", "B")
            if self.alpha is None:
                raise OpError(f"{self.name} needs alpha: {self.name}(alpha=16), or a fourth source that holds it")
            return found
        alpha = specs[3]
        if self.alpha is not None:
            raise OpError(f"{self}: alpha is given twice, as {self.alpha} and as the fourth source; leave one out")
        if math.prod(alpha.shape) != 1:
            raise OpError(f"{self.name}: alpha, the fourth source, is one number, not {alpha}")
        if DTYPES[alpha.dtype].kind not in ("int", "uint"):
            arithmetic_float(self, alpha, "alpha")
        return specs[:3]


@op
@dataclass(frozen=True)
class FoldWeightNorm(Op):
    """Multiply a direction by its magnitude, into a plain weight; sources: g, v.

    >>> FoldWeightNorm().infer((TensorSpec([8, 1, 1], "F32"), TensorSpec([8, 4, 3], "F32")))
    (TensorSpec(shape=(8, 4, 3), dtype='F32'),)

    w = g · v / ‖v‖, with the norm over all dims but `dim`, no epsilon (Salimans and Kingma, 2016). g and v are
    `weight_g` and `weight_v` of torch's `weight_norm`, `original0` and `original1` of its parametrization.

    Args:
        dim: the dim that g spans, or none for one norm over all, where g is a scalar.

    Computed in float32 (float64 for float64) and rounded once. The inverse, but for rounding, is
    `unfold_weight_norm(dim)`.

    Raises:
        OpError: shapes that do not belong together; at run time a direction of norm 0.
    """

    name = "fold_weight_norm"
    joins = True
    dim: int | None = 0

    def infer(self, specs: Specs) -> Specs:
        g, v = operands(self, specs, "g", "v")
        arithmetic_float(self, v, "v")
        wants = _magnitude(self, v, self.dim)
        if g.shape != wants.shape or g.dtype != v.dtype:
            raise OpError(f"{self.name}: beside v {v}, g is {wants}, not {g}")
        return (v,)

    def run(self, tensors: Tensors) -> Tensors:
        (g, v), (spec,) = tensors, self.infer(specs_of(tensors))
        norm = _norm(widen(v), self.dim)
        if has_data(v) and not norm.all():
            raise OpError(f"{self}: {int((norm == 0).sum())} of {norm.numel()} directions of v have norm 0")
        return (narrow(widen(v) * (widen(g) / norm), spec.dtype, str(self)),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return UnfoldWeightNorm(self.dim) if inputs is None else None


@op
@dataclass(frozen=True)
class UnfoldWeightNorm(Op):
    """Take a weight apart into magnitude and direction, as weight norm begins; targets: g, v.

    >>> UnfoldWeightNorm().infer((TensorSpec([8, 4, 3], "F32"),))
    (TensorSpec(shape=(8, 1, 1), dtype='F32'), TensorSpec(shape=(8, 4, 3), dtype='F32'))

    g = ‖w‖, with the norm over all dims but `dim`, and v = w, untouched. One tensor becomes two, hence `joins`: the
    op owns its side of the rule, and its results go to the targets in order.

    Args:
        dim: the dim that g spans, or none for one norm over all, where g is a scalar.

    The norm is computed in float32 (float64 for float64) and rounded once. The inverse, but for rounding, is
    `fold_weight_norm(dim)`.

    Raises:
        OpError: no such dim, or no floats.
    """

    name = "unfold_weight_norm"
    joins = True
    dim: int | None = 0

    def infer(self, specs: Specs) -> Specs:
        (spec,) = operands(self, specs, "one tensor")
        arithmetic_float(self, spec)
        return _magnitude(self, spec, self.dim), spec

    def run(self, tensors: Tensors) -> Tensors:
        g, _ = self.infer(specs_of(tensors))
        return narrow(_norm(widen(tensors[0]), self.dim), g.dtype, str(self)), tensors[0]

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return FoldWeightNorm(self.dim) if inputs is None else None


def _magnitude(op: Op, spec: TensorSpec, dim: int | None) -> TensorSpec:
    if dim is None:
        return TensorSpec((), spec.dtype)
    if not 0 <= dim < len(spec.shape):
        raise OpError(f"{op}: {spec} has no dim {dim}; dim=none takes one norm over all")
    return TensorSpec([n if i == dim else 1 for i, n in enumerate(spec.shape)], spec.dtype)


def _norm(tensor: Tensor, dim: int | None) -> Tensor:
    import torch

    over = [i for i in range(tensor.dim()) if i != dim]
    # An empty list of dims would mean all of them.
    return torch.linalg.vector_norm(tensor, dim=over, keepdim=dim is not None) if over else tensor.abs()
