"""Ops on convolution kernels: `adapt_input_conv`, `resize_patch_embed`, `inflate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..specs import TensorSpec
from .base import Op, OpError, Specs, Tensors
from .numerics import bits, compute, has_data, narrow, specs_of, widen
from .operands import arithmetic_float, operands, pair, whole_elements
from .registry import op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdaptInputConv", "Inflate", "ResizePatchEmbed"]

_INPUT_MODES = ("timm", "repeat", "sum", "mean", "zero_new")


@op
@dataclass(frozen=True)
class AdaptInputConv(Op):
    """Give a convolution another number of input channels.

    >>> AdaptInputConv(4).infer((TensorSpec([64, 3, 7, 7], "F32"),))
    (TensorSpec(shape=(64, 4, 7, 7), dtype='F32'),)

    Takes [out, in, ...] with one to three spatial dims. An equal number passes untouched.

    Args:
        channels: the new number, n; the old one is c.
        mode: `timm` (its `adapt_input_conv`): for n = 1 the sum over the old channels, otherwise the old ones in turn,
            times c / n; for three channels of noise that keeps the response's size, and its value only where c
            divides n. `repeat`: the old ones in turn, each divided by the number of its copies, so an input that
            repeats its channels in the same turn gets the same response. `sum`: each new channel has the sum over the
            old ones, divided by n, so a grey image gets the same response. `mean`: each new channel has the mean over
            the old ones. `zero_new`: old channels stay and new ones are zero, bit for bit; downwards it cuts channels
            that are zero, and refuses others.

    Computed in float32 (float64 for float64) and rounded once. `zero_new` is its own inverse with the old number; the
    others have none.

    Raises:
        OpError: not such a kernel; at run time a channel that `zero_new` would cut though it is not zero.
    """

    name = "adapt_input_conv"
    channels: int
    mode: Literal["timm", "repeat", "sum", "mean", "zero_new"] = "timm"

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise OpError(f"{self.name} wants 1 channel or more, not {self.channels}")
        if self.mode not in _INPUT_MODES:
            raise OpError(f"{self.name}: mode is one of {', '.join(_INPUT_MODES)}, not {self.mode!r}")

    def infer(self, specs: Specs) -> Specs:
        spec = _kernel(self, specs, (3, 4, 5))
        if spec.shape[1] != self.channels and self.mode != "zero_new":
            arithmetic_float(self, spec)
        return (TensorSpec((spec.shape[0], self.channels, *spec.shape[2:]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (kernel,), (spec,) = tensors, self.infer(specs_of(tensors))
        if kernel.shape[1] == self.channels:
            return tensors
        if self.mode == "zero_new":
            return (self._zero_new(kernel, spec),)
        wide = widen(kernel)
        return (narrow(self._adapted(wide, kernel.shape[1]).expand(spec.shape), spec.dtype, str(self)),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        if inputs is None or (self.mode != "zero_new" and inputs[0].shape[1] != self.channels):
            return None
        return AdaptInputConv(inputs[0].shape[1], self.mode)

    def _adapted(self, kernel: Tensor, old: int) -> Tensor:
        import torch

        new = self.channels
        if self.mode == "mean":
            return kernel.mean(1, keepdim=True)
        if self.mode == "sum" or (self.mode == "timm" and new == 1):
            return kernel.sum(1, keepdim=True) / new
        turn = [i % old for i in range(new)]
        repeated = kernel.index_select(1, torch.tensor(turn, device=kernel.device))
        if self.mode == "timm":
            return repeated * (old / new)
        copies = torch.tensor([turn.count(i) for i in turn], dtype=kernel.dtype, device=kernel.device)
        return repeated / copies.reshape(1, new, *[1] * (kernel.dim() - 2))

    def _zero_new(self, kernel: Tensor, spec: TensorSpec) -> Tensor:
        kept = min(kernel.shape[1], self.channels)
        lost = kernel[:, self.channels :]
        if has_data(lost) and bits(lost.contiguous()).any():
            cut = f"channels {kept} to {kernel.shape[1] - 1}"
            raise OpError(f"{self}: {cut} are not zero, and cutting them would lose them")
        result = kernel.new_zeros(spec.shape)
        result[:, :kept] = kernel[:, :kept]
        return result


@op
@dataclass(frozen=True)
class ResizePatchEmbed(Op):
    """Resample patch embedding kernels to another patch size, so that a resized image gives the old embedding.

    >>> ResizePatchEmbed(8).infer((TensorSpec([64, 3, 16, 16], "F32"),))
    (TensorSpec(shape=(64, 3, 8, 8), dtype='F32'),)

    With B the matrix that resizes a patch, the new kernel is pinv(B)ᵀ w: then <B x, new w> = <x, w>, exactly where the
    patch grows and in least squares where it shrinks. After Beyer et al., "FlexiViT: One Model for All Patch Sizes"
    (2023).

    Args:
        size: the new patch, [rows, columns], or one number for a square.
        mode: how images are resized. `timm` (its `resample_patch_embed`): bicubic with antialias. `flexivit`
            (big_vision, tf.image.resize): bilinear without.

    The matrix is inverted in float64; kernels are computed in float32 (float64 for float64) and rounded once. An
    equal size passes untouched; otherwise nothing brings the old values back.

    Raises:
        OpError: no [out, in, rows, columns] kernel.
    """

    name = "resize_patch_embed"
    size: int | tuple[int, int]
    mode: Literal["timm", "flexivit"] = "timm"

    def __post_init__(self) -> None:
        if self.mode not in ("timm", "flexivit"):
            raise OpError(f"{self.name}: mode is timm or flexivit, not {self.mode!r}")
        pair(self, self.size, "size")

    def infer(self, specs: Specs) -> Specs:
        spec = arithmetic_float(self, _kernel(self, specs, (4,)))
        if 0 in spec.shape[2:]:
            raise OpError(f"{self.name}: {spec} has no patch")
        return (TensorSpec((*spec.shape[:2], *pair(self, self.size, "size")), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (kernel,), (spec,) = tensors, self.infer(specs_of(tensors))
        if spec.shape == tuple(kernel.shape):
            return tensors
        wide = widen(kernel).flatten(2)
        resized = wide @ self._matrix(kernel).to(wide)
        return (narrow(resized.reshape(spec.shape), spec.dtype, str(self)),)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return self if inputs is not None and self.infer(inputs) == inputs else None

    def _matrix(self, kernel: Tensor) -> Tensor:
        """pinv(B): [old pixels, new pixels]."""
        import torch
        from torch.nn.functional import interpolate

        rows, columns = kernel.shape[2:]
        units = torch.eye(rows * columns, dtype=torch.float64).reshape(-1, 1, rows, columns)
        mode, antialias = ("bicubic", True) if self.mode == "timm" else ("bilinear", False)
        resized = interpolate(units, size=pair(self, self.size, "size"), mode=mode, antialias=antialias)
        inverse: Tensor = torch.linalg.pinv(resized.flatten(1).t())
        return inverse


@op
@dataclass(frozen=True)
class Inflate(Op):
    """Turn 2D kernels into 3D ones, by a depth axis between channels and rows.

    >>> Inflate(3).infer((TensorSpec([64, 3, 7, 7], "F32"),))
    (TensorSpec(shape=(64, 3, 3, 7, 7), dtype='F32'),)

    Args:
        depth: slices along the new axis.
        mode: `average` gives each slice w / depth, so that a still video gets the image's response (Carreira and
            Zisserman, "Quo Vadis, Action Recognition?", 2017); `center` gives slice depth // 2 the kernel and zeros
            to the others (Arnab et al., "ViViT", 2021), bit for bit.

    `average` is computed in float32 (float64 for float64) and rounded once. The way back needs an axis that is no more
    there, so there is no inverse.

    Raises:
        OpError: no [out, in, rows, columns] kernel.
    """

    name = "inflate"
    depth: int
    mode: Literal["average", "center"] = "average"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise OpError(f"{self.name} wants a depth of 1 or more, not {self.depth}")
        if self.mode not in ("average", "center"):
            raise OpError(f"{self.name}: mode is average or center, not {self.mode!r}")

    def infer(self, specs: Specs) -> Specs:
        spec = _kernel(self, specs, (4,))
        if self.mode == "average":
            arithmetic_float(self, spec)
        return (TensorSpec((*spec.shape[:2], self.depth, *spec.shape[2:]), spec.dtype),)

    def run(self, tensors: Tensors) -> Tensors:
        (kernel,), (spec,) = tensors, self.infer(specs_of(tensors))
        if self.mode == "average":
            return (compute(kernel, lambda t: t / self.depth, str(self))[:, :, None].expand(spec.shape),)
        result = kernel.new_zeros(spec.shape)
        result[:, :, self.depth // 2] = kernel
        return (result,)


def _kernel(op: Op, specs: Specs, dims: tuple[int, ...]) -> TensorSpec:
    (spec,) = operands(op, specs, "one tensor")
    if len(spec.shape) not in dims:
        raise OpError(f"{op.name} wants a kernel of {' or '.join(map(str, dims))} dims, [out, in, ...], not {spec}")
    return whole_elements(op, spec)
