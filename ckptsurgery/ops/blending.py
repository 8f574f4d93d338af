"""Ops that merge models element by element: `lerp`, `task_arithmetic`, `dare`, `ema`, `diff`, `apply`.

Sources are the same tensor of several models. They are computed with in float32 (float64 for float64) and rounded once,
to the first source's dtype. Integers, such as the counters of BatchNorm, have no mean: `integers` names what becomes of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..specs import DTYPES
from .base import Op, OpError, Specs, Tensors
from .keyed import At
from .numerics import has_data, narrow, specs_of
from .operands import arithmetic_float
from .over_axes import Integers, mixed_by, whole_numbers
from .registry import op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Apply",
    "Blending",
    "Dare",
    "Ema",
    "Lerp",
    "TaskArithmetic",
    "WeightDelta",
    "elected",
    "onto",
    "summed",
    "uniform_like",
    "weights_of",
    "widened",
]


@dataclass(frozen=True)
class Blending(Op):
    """Base of ops that make one tensor of several of one shape; a subclass says how in `blend`."""

    joins = True
    count: ClassVar[int | None] = None
    """How many sources there are; None for two or more."""

    def infer(self, specs: Specs) -> Specs:
        if len(specs) < 2 or (self.count is not None and len(specs) != self.count):
            raise OpError(f"{self.name} takes {self.count or 'two or more'} sources; it was given {len(specs)}")
        if len({spec.shape for spec in specs}) > 1:
            raise OpError(f"{self.name}: the sources differ in shape: {', '.join(map(str, specs))}")
        kinds = {DTYPES[spec.dtype].kind for spec in specs}
        if kinds == {"float"}:
            for spec in specs:
                arithmetic_float(self, spec)
        elif "float" in kinds or "complex" in kinds or len({spec.dtype for spec in specs}) > 1:
            raise OpError(f"{self.name}: the sources are not all floats: {', '.join(map(str, specs))}")
        elif self.policy == "error":
            raise OpError(
                f"{self.name} computes with floats, and the sources are {specs[0]}; integers=first passes those of the "
                "first source on, integers=max the largest ones"
            )
        self.check(len(specs))
        return specs[:1]

    @property
    def policy(self) -> str:
        """What becomes of integers."""
        return str(getattr(self, "integers", "error"))

    def check(self, count: int) -> None:
        """Raise an `OpError` where the arguments do not fit so many sources."""

    def run(self, tensors: Tensors) -> Tensors:
        return self.blended(tensors, At(""))

    def blended(self, tensors: Tensors, at: At) -> Tensors:
        """What `run` returns, for an op that asks where it runs too."""
        (spec,) = self.infer(specs_of(tensors))
        if not has_data(tensors[0]):
            return (tensors[0].clone(),)
        if DTYPES[spec.dtype].kind != "float":
            return (whole_numbers(tensors, self.policy),)
        result = self.blend(widened(tensors), at)
        return (narrow(result, spec.dtype, str(self), was_finite=lambda: _all_finite(tensors)),)

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        """The result, of float tensors of one dtype: copies in which it may be made, which spares fresh memory."""
        raise OpError(f"{self.name} does not say how it blends")


@op
@dataclass(frozen=True)
class Lerp(Blending):
    """Interpolate between two tensors along a line; sources: a, b.

    (1 - t) · a + t · b.

    >>> str(Lerp(0.3))
    'lerp(t=0.3)'

    Args:
        t: 0 gives a, 1 gives b; a formula of the index gives each layer its own: `lerp(i / (n - 1))`.
        integers: `error` refuses integers, `first` passes those of the first source on, `max` the largest ones.

    Computed in float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: other than two sources, different shapes, or integers without a policy.
    """

    name = "lerp"
    elementwise = True
    count = 2
    t: float
    integers: Integers = "error"

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        return mixed_by(tensors, (1 - self.t, self.t))


@op
@dataclass(frozen=True)
class Ema(Blending):
    """Move an average towards a tensor; sources: average, new.

    decay · average + (1 - decay) · new.

    >>> str(Ema(0.999))
    'ema(decay=0.999)'

    Args:
        decay: from 0 to 1. integers: as for `lerp`.

    Computed in float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: as for `lerp`; a decay outside of 0 to 1.
    """

    name = "ema"
    elementwise = True
    count = 2
    decay: float
    integers: Integers = "error"

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise OpError(f"ema: decay is from 0 to 1, not {self.decay}")

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        return mixed_by(tensors, (self.decay, 1 - self.decay))


@op
@dataclass(frozen=True)
class WeightDelta(Blending):
    """Subtract a base from a tensor: the delta that `apply` adds; sources: base, tuned.

    tuned - base.

    >>> str(WeightDelta())
    'diff'

    Args:
        integers: as for `lerp`.

    Computed in float32 (float64 for float64) and rounded once, to the base's dtype. In 16 bits the delta is rounded:
    `| cast(f32)` on the sources' side keeps all of it. There is no inverse.

    Raises:
        OpError: as for `lerp`.
    """

    name = "diff"
    elementwise = True
    count = 2
    integers: Integers = "error"

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        return tensors[1].sub_(tensors[0])


@op
@dataclass(frozen=True)
class Apply(Blending):
    """Add a delta, as `diff` makes it, to a tensor; sources: base, delta.

    base + scale · delta.

    >>> str(Apply(-1))
    'apply(scale=-1)'

    Args:
        scale: of the delta. integers: as for `lerp`.

    Computed in float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: as for `lerp`.
    """

    name = "apply"
    elementwise = True
    count = 2
    scale: float = 1.0
    integers: Integers = "error"

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        return onto(tensors[0], self.scale, tensors[1])


@op
@dataclass(frozen=True)
class TaskArithmetic(Blending):
    """Add the deltas of tuned models to their base; sources: base, then the tuned ones.

    base + scale · Σ w[k] · (tuned[k] - base) (Ilharco et al., "Editing Models with Task Arithmetic", 2023).

    >>> str(TaskArithmetic(0.5))
    'task_arithmetic(scale=0.5)'

    Args:
        scale: of the sum of deltas.
        w: a weight for each tuned model, in the order of the sources; 1 each where left out.
        integers: as for `lerp`.

    Computed in float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: different shapes, another number of weights, or integers without a policy.
    """

    name = "task_arithmetic"
    elementwise = True
    scale: float = 1.0
    w: tuple[float, ...] | None = None
    integers: Integers = "error"

    def check(self, count: int) -> None:
        weights_of(self, self.w, count - 1)

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        base, *tuned = tensors
        deltas = [tensor.sub_(base) for tensor in tuned]
        return onto(base, self.scale, summed(deltas, weights_of(self, self.w, len(tuned))))


@op
@dataclass(frozen=True)
class Dare(Blending):
    """Drop elements of the deltas at random, rescale the others, and add them to the base; sources: base, then tuned.

    base + scale · Σ w[k] · mask[k] · (tuned[k] - base) / keep, with mask 1 with probability `keep` (Yu et al.,
    "Language Models are Super Mario", 2024).

    >>> str(Dare(0.1))
    'dare(keep=0.1)'

    Args:
        keep: the probability that an element is kept, above 0 and up to 1.
        scale, w, integers: as for `task_arithmetic`.
        elect: keep only the deltas whose sign agrees with that of their weighted sum, as `ties` does, and divide by the
            sum of their weights.

    The draws depend on the plan's seed, the key and the place of the element alone: the same on any number of ranks, in
    blocks of any size. Computed in float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: as for `task_arithmetic`; a `keep` outside of its range.
    """

    name = "dare"
    elementwise = True
    keep: float
    scale: float = 1.0
    w: tuple[float, ...] | None = None
    elect: bool = False
    integers: Integers = "error"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise OpError(f"dare: keep is above 0 and up to 1, not {self.keep}")

    def check(self, count: int) -> None:
        weights_of(self, self.w, count - 1)

    def run(self, tensors: Tensors, at: At | None = None) -> Tensors:
        return self.blended(tensors, at or At(""))

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        base, *tuned = tensors
        masks = [uniform_like(base, at, number) < self.keep for number in range(len(tuned))]
        deltas = [tensor.sub_(base).mul_(mask).div_(self.keep) for tensor, mask in zip(tuned, masks)]
        weights = weights_of(self, self.w, len(tuned))
        mixed = elected(deltas, weights) if self.elect else summed(deltas, weights)
        return onto(base, self.scale, mixed)


def onto(base: Tensor, scale: float, total: Tensor) -> Tensor:
    """base + scale · total, in the memory of `total`: a block's tensors are to stay in the processor's cache."""
    return total.mul_(scale).add_(base)


def elected(deltas: Sequence[Tensor], weights: Sequence[float], normalise: bool = True) -> Tensor:
    """Σ w · delta over the deltas whose sign is that of the weighted sum, by the sum of their weights.

    Args:
        normalise: divide; else the sum alone.
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights)]
    positive = sum(weighted[1:], weighted[0]) >= 0
    total = divisor = None
    for part, weight in zip(weighted, weights):
        agrees = (part > 0) == positive
        agrees &= part != 0
        kept = part * agrees
        total = kept if total is None else total.add_(kept)
        share = agrees.to(part.dtype).mul_(weight)
        divisor = share if divisor is None else divisor.add_(share)
    if total is None or divisor is None:
        raise OpError("there are no deltas to elect")
    return total / divisor.masked_fill(divisor == 0, 1) if normalise else total


def widened(tensors: Tensors) -> Tensors:
    """Copies of float tensors as arithmetic wants them, all of one dtype."""
    import torch

    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.detach().to(dtype, copy=True) for t in tensors)


def summed(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ w · part, each product rounded before it is added; in the memory of the parts."""
    total = parts[0].mul_(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part.mul_(weight))
    return total


def _all_finite(tensors: Tensors) -> Tensor:
    finite = tensors[0].isfinite()
    for tensor in tensors[1:]:
        finite = finite & tensor.isfinite()
    return finite


def weights_of(op: Op, w: Sequence[float] | None, count: int) -> Sequence[float]:
    """The weights of so many sources behind the base; 1 each where none are given.

    Raises:
        OpError: another number of weights.
    """
    if w is None:
        return (1.0,) * count
    if len(w) != count:
        raise OpError(f"{op.name}: {len(w)} weights for {count} sources behind the base")
    return w


def uniform_like(tensor: Tensor, at: At, number: int) -> Tensor:
    """Numbers in [0, 1) for a source of an op, which do not depend on how tensors are cut into blocks."""
    import torch

    return torch.from_numpy(at.uniform(tensor.numel(), f"source {number}")).reshape(tensor.shape)
