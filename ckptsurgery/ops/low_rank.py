"""Ops that merge low-rank updates: several at once, with a magnitude, and into stacked experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..specs import TensorSpec
from .base import Op, OpError, Specs, Tensors
from .low_rank_pairs import alpha_divisor, check_pair, low_rank_update
from .numerics import narrow, specs_of, widen
from .operands import arithmetic_float, operands
from .registry import op

__all__ = ["BlockDiagonal", "DoraMerge", "LoraAdd", "LoraMergeExperts"]


@op
@dataclass(frozen=True)
class BlockDiagonal(Op):
    """Put matrices on the diagonal of one, with zeros beside them; sources: two or more.

    >>> BlockDiagonal().infer((TensorSpec([8, 2], "F32"), TensorSpec([4, 3], "F32")))
    (TensorSpec(shape=(12, 5), dtype='F32'),)

    The update of tensors that are joined along their outputs: [B1·A1; B2·A2] = diag(B1, B2) · [A1; A2]. Dims after the
    first two, as those of convolutions, are the same in all sources. Nothing is computed. It has no inverse, since the
    sizes of the parts are lost.

    Raises:
        OpError: fewer than two dims, or other dtypes or sizes behind these.
    """

    name = "block_diagonal"
    joins = True

    def infer(self, specs: Specs) -> Specs:
        if not specs or any(len(spec.shape) < 2 for spec in specs):
            raise OpError(f"{self.name} takes matrices, not {', '.join(map(str, specs)) or 'nothing'}")
        if len({(spec.dtype, spec.shape[2:]) for spec in specs}) > 1:
            raise OpError(f"{self.name}: dtypes or sizes behind the matrices differ: {', '.join(map(str, specs))}")
        rows, columns = (sum(spec.shape[dim] for spec in specs) for dim in (0, 1))
        return (TensorSpec((rows, columns, *specs[0].shape[2:]), specs[0].dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (spec,) = self.infer(specs_of(tensors))
        made = tensors[0].new_zeros(spec.shape)
        row = column = 0
        for tensor in tensors:
            made[row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor
            row, column = row + tensor.shape[0], column + tensor.shape[1]
        return (made,)


@op
@dataclass(frozen=True)
class LoraAdd(Op):
    """Add several low-rank updates to a weight; sources: weight, then A and B of each.

    >>> specs = TensorSpec([8, 6], "BF16"), TensorSpec([2, 6], "F32"), TensorSpec([8, 2], "F32")
    >>> LoraAdd((0.5,)).infer(specs), str(LoraAdd((0.5, 2.0)))
    ((TensorSpec(shape=(8, 6), dtype='BF16'),), 'lora_add(scales=[0.5, 2.0])')

    W + Σ scales[k] · B[k]·A[k], with shapes as for `lora_merge`. The ranks may differ.

    Args:
        scales: of each update, its weight times its alpha / r.
        fan_in_fan_out: W is stored as [in, out].

    Computed in float32 (float64 for a float64 weight) and rounded once, to the weight's dtype. There is no inverse.

    Raises:
        OpError: shapes that do not belong together, or another number of scales.
    """

    name = "lora_add"
    joins = True
    scales: tuple[float, ...]
    fan_in_fan_out: bool = False

    def infer(self, specs: Specs) -> Specs:
        if len(specs) != 1 + 2 * len(self.scales) or not self.scales:
            raise OpError(f"{self.name} takes a weight, then A and B for each of {len(self.scales)} scales")
        weight = specs[0]
        for a, b in zip(specs[1::2], specs[2::2]):
            check_pair(self, weight, a, b, self.fan_in_fan_out)
        return (weight,)

    def run(self, tensors: Tensors) -> Tensors:
        (weight, *pairs), (spec,) = tensors, self.infer(specs_of(tensors))
        result = widen(weight)
        for scale, a, b in zip(self.scales, pairs[::2], pairs[1::2]):
            result = result + scale * low_rank_update(result, a, b, self.fan_in_fan_out)
        return (narrow(result, spec.dtype, str(self)),)


@op
@dataclass(frozen=True)
class DoraMerge(Op):
    """Add a low-rank update to a weight and give its rows a learnt norm; sources: weight, A, B, magnitude.

    >>> specs = [TensorSpec(shape, "F32") for shape in ([8, 6], [2, 6], [8, 2], [8])]
    >>> DoraMerge(16).infer(tuple(specs)), str(DoraMerge(16))
    ((TensorSpec(shape=(8, 6), dtype='F32'),), 'dora_merge(alpha=16)')

    V = W + (alpha / r) · B·A, then m · V / ‖V‖, with the norm of each output (Liu et al., "DoRA", 2024). The magnitude
    has one number for each output: [out], or [1, out, 1, 1] for a convolution.

    Args:
        alpha: the scaling's numerator.
        fan_in_fan_out: W is stored as [in, out].
        rslora: scale by alpha / sqrt(r).

    Computed in float32 (float64 for a float64 weight) and rounded once, to the weight's dtype. There is no inverse.

    Raises:
        OpError: shapes that do not belong together.
    """

    name = "dora_merge"
    joins = True
    alpha: int | float
    fan_in_fan_out: bool = False
    rslora: bool = False

    def infer(self, specs: Specs) -> Specs:
        weight, a, b, magnitude = operands(self, specs, "weight", "A", "B", "magnitude")
        check_pair(self, weight, a, b, self.fan_in_fan_out)
        arithmetic_float(self, magnitude, "magnitude")
        out = weight.shape[1 if self.fan_in_fan_out else 0]
        if magnitude.numel != out or max(magnitude.shape, default=1) != out:
            raise OpError(f"{self.name}: the magnitude has one number for each of {out} outputs, not {magnitude}")
        return (weight,)

    def run(self, tensors: Tensors) -> Tensors:
        (weight, a, b, magnitude), (spec,) = tensors, self.infer(specs_of(tensors))
        wide = widen(weight)
        scale = float(self.alpha) / alpha_divisor(a.shape[0], self.rslora)
        total = wide + scale * low_rank_update(wide, a, b, self.fan_in_fan_out)
        rows = total.t() if self.fan_in_fan_out else total
        factor = widen(magnitude).to(wide.dtype).flatten() / rows.flatten(1).norm(dim=1)
        rows = rows * factor.reshape(-1, *(1 for _ in rows.shape[1:]))
        return (narrow(rows.t() if self.fan_in_fan_out else rows, spec.dtype, str(self)),)


@op
@dataclass(frozen=True)
class LoraMergeExperts(Op):
    """Add a low-rank update to each of stacked experts; sources: weight, A, B.

    >>> specs = [TensorSpec(shape, "F32") for shape in ([4, 8, 6], [12, 6], [8, 12])]
    >>> LoraMergeExperts(16).infer(tuple(specs)), str(LoraMergeExperts(16, order="in_out"))
    ((TensorSpec(shape=(4, 8, 6), dtype='F32'),), 'lora_merge_experts(alpha=16, order=in_out)')

    W[e] + (alpha / r) · B[e]·A[e], with A [experts · r, in] by expert, and B [out, r · experts] with the expert as the
    last index, as PEFT stores both for a parameter [experts, out, in], or [experts, in, out]. A and B may be apart by
    expert too: A [experts, r, in], B [experts, out, r].

    Args:
        alpha: the scaling's numerator.
        order: of the weight's last two dims, `out_in` or `in_out`.
        rslora: scale by alpha / sqrt(r).

    Computed in float32 (float64 for a float64 weight) and rounded once, to the weight's dtype. There is no inverse.

    Raises:
        OpError: shapes that do not belong together.
    """

    name = "lora_merge_experts"
    joins = True
    alpha: int | float
    order: Literal["out_in", "in_out"] = "out_in"
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("out_in", "in_out"):
            raise OpError(f"{self.name}: order is out_in or in_out, not {self.order!r}")

    def infer(self, specs: Specs) -> Specs:
        weight, a, b = operands(self, specs, "weight", "A", "B")
        for spec, what in ((weight, "weight"), (a, "A"), (b, "B")):
            arithmetic_float(self, spec, what)
        if len(weight.shape) != 3 or len(a.shape) != len(b.shape) or len(a.shape) not in (2, 3):
            raise OpError(f"{self.name} wants a weight [experts, ., .], A and B of 2 dims, not {weight}, {a}, {b}")
        experts, *sides = weight.shape
        out, inside = sides if self.order == "out_in" else reversed(sides)
        if len(a.shape) == 3:
            rank = a.shape[1]
            if not rank or a.shape != (experts, rank, inside) or b.shape != (experts, out, rank):
                raise OpError(
                    f"{self.name}: beside weight {list(weight.shape)}, {self.order}, A is [{experts}, r, {inside}] and "
                    f"B is [{experts}, {out}, r]; they are {list(a.shape)} and {list(b.shape)}"
                )
            return (weight,)
        total = a.shape[0]
        if not total or total % experts or a.shape[1] != inside or b.shape != (out, total):
            raise OpError(
                f"{self.name}: beside weight {list(weight.shape)}, {self.order}, A is [{experts}·r, {inside}] and B is "
                f"[{out}, r·{experts}]; they are {list(a.shape)} and {list(b.shape)}"
            )
        return (weight,)

    def run(self, tensors: Tensors) -> Tensors:
        import torch

        (weight, a, b), (spec,) = tensors, self.infer(specs_of(tensors))
        experts = weight.shape[0]
        rank = a.shape[-2] if a.dim() == 3 else a.shape[0] // experts
        scale = float(self.alpha) / alpha_divisor(rank, self.rslora)
        result = torch.empty(spec.shape, dtype=weight.dtype, device=weight.device)
        downs = a.reshape(experts, rank, -1)
        ups = b.permute(1, 2, 0) if b.dim() == 3 else b.reshape(b.shape[0], rank, experts)
        # One expert at a time: float32 copies of all of them would be several times the weight.
        for e in range(experts):
            wide = widen(weight[e])
            update = widen(ups[:, :, e]).to(wide.dtype) @ widen(downs[e]).to(wide.dtype)
            total = wide + scale * (update if self.order == "out_in" else update.t())
            result[e] = narrow(total, spec.dtype, str(self))
        return (result,)
