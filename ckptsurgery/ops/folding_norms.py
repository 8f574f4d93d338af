"""Ops that fold a normalisation into the layer beside it: `fold_batchnorm` and `scale_by`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..specs import TensorSpec
from .base import Op, OpError, Specs, Tensors
from .numerics import narrow, specs_of, widen
from .operands import arithmetic_float, operands
from .registry import op

__all__ = ["FoldBatchnorm", "ScaleBy"]


@op
@dataclass(frozen=True)
class FoldBatchnorm(Op):
    """Fold a batch norm into the layer before it; sources: weight, [bias], gamma, beta, mean, var.

    >>> weight, each = TensorSpec([8, 3, 3, 3], "F32"), TensorSpec([8], "F32")
    >>> FoldBatchnorm().infer((weight, each, each, each, each))
    (TensorSpec(shape=(8, 3, 3, 3), dtype='F32'), TensorSpec(shape=(8,), dtype='F32'))

    Targets: weight, bias. With s = gamma / sqrt(var + eps): weight · s for each output, and beta + (bias - mean) · s,
    as the normalisation computes it in evaluation (Ioffe and Szegedy, 2015). A layer without bias has 0.

    Args:
        eps: of the normalisation; torch's default is 1e-5.

    Computed in float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: shapes that do not belong together.
    """

    name = "fold_batchnorm"
    joins = True
    eps: float = 1e-5

    def infer(self, specs: Specs) -> Specs:
        names = ["weight", "bias", "gamma", "beta", "mean", "var"]
        operands(self, specs, *(names if len(specs) == 6 else [name for name in names if name != "bias"]))
        weight, *others = specs
        for spec in specs:
            arithmetic_float(self, spec)
        if not weight.shape or any(spec.shape != weight.shape[:1] for spec in others):
            shown = ", ".join(map(str, others))
            raise OpError(f"{self.name}: beside weight {weight} the others have one number an output, not {shown}")
        return (weight, TensorSpec(weight.shape[:1], weight.dtype))

    def run(self, tensors: Tensors) -> Tensors:
        spec, other = self.infer(specs_of(tensors))
        weight = widen(tensors[0])
        gamma, beta, mean, var = (widen(tensor).to(weight.dtype) for tensor in tensors[-4:])
        bias = widen(tensors[1]).to(weight.dtype) if len(tensors) == 6 else mean.new_zeros(mean.shape)
        scale = gamma / (var + self.eps).sqrt()
        folded = weight * scale.reshape(-1, *(1 for _ in weight.shape[1:]))
        return narrow(folded, spec.dtype, str(self)), narrow(beta + (bias - mean) * scale, other.dtype, str(self))


@op
@dataclass(frozen=True)
class ScaleBy(Op):
    """Multiply the entries of a dim by a norm's weight, to fold it into the layer behind; sources: weight, factors.

    >>> specs = TensorSpec([8, 6], "BF16"), TensorSpec([6], "F32")
    >>> ScaleBy().infer(specs), str(ScaleBy(offset=1))
    ((TensorSpec(shape=(8, 6), dtype='BF16'),), 'scale_by(offset=1)')

    W[…, i, …] · (factors[i] + offset), along the dim.

    Args:
        dim: of the weight; -1 is the inputs of a linear layer.
        offset: 1 for norms that store w - 1.

    Computed in float32 (float64 for float64) and rounded once. There is no inverse: a factor may be 0.

    Raises:
        OpError: another number of factors than entries.
    """

    name = "scale_by"
    joins = True
    dim: int = -1
    offset: int | float = 0

    def infer(self, specs: Specs) -> Specs:
        weight, factors = operands(self, specs, "weight", "factors")
        for spec in specs:
            arithmetic_float(self, spec)
        rank = len(weight.shape)
        if not -rank <= self.dim < rank or math.prod(factors.shape) != weight.shape[self.dim]:
            raise OpError(f"{self.name}: {factors} is not one factor for each entry of dim {self.dim} of {weight}")
        return (weight,)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        weight = widen(tensors[0])
        shape = [1] * weight.dim()
        shape[self.dim] = -1
        factors = widen(tensors[1]).to(weight.dtype).flatten() + self.offset
        return (narrow(weight * factors.reshape(shape), spec.dtype, str(self)),)
