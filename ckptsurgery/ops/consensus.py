"""Ops that merge models by facts of whole tensors: `slerp`, `nuslerp`, `ties`, `breadcrumbs`, `della` and others.

As in `blending`, sources are the same tensor of several models, computed with in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from .base import OpError, Tensors
from .blending import Blending, elected, uniform_like, weights_of
from .keyed import At
from .over_axes import Integers, summed, weighted_sum
from .registry import op

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Breadcrumbs", "Della", "Karcher", "ModelStock", "Nuslerp", "Slerp", "Ties"]

_PARALLEL = 0.9995  # of a cosine from which on an arc is a line


@op
@dataclass(frozen=True)
class Slerp(Blending):
    """Interpolate between two tensors along an arc; sources: a, b.

    sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b, with θ the angle between the tensors as flat vectors (Shoemake,
    "Animating Rotation with Quaternion Curves", 1985). Where |cos θ| > 0.9995 it is `lerp`.

    >>> str(Slerp(0.3))
    'slerp(t=0.3)'

    Args:
        t: 0 gives a, 1 gives b; a formula or a table of the index gives each layer its own: `slerp(t:i)`.
        integers: as for `lerp`.

    The angle needs whole tensors. Computed in float32 (float64 for float64), norms and products in float64, and rounded
    once. There is no inverse.

    Raises:
        OpError: as for `lerp`.
    """

    name = "slerp"
    count = 2
    t: float
    integers: Integers = "error"

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        return _arc(tensors, self.t, _PARALLEL)


@op
@dataclass(frozen=True)
class Nuslerp(Blending):
    """Interpolate along an arc down to the smallest angles, from a base where there is one; sources: [base], a, b.

    As `slerp`, a line only where the tensors are parallel but for rounding. With three sources the first is a base, and
    base + nuslerp(a - base, b - base) is made.

    >>> str(Nuslerp(0.5))
    'nuslerp(t=0.5)'

    Args:
        t, integers: as for `slerp`.

    The angle needs whole tensors. Computed in float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: other than two or three sources, different shapes, or integers without a policy.
    """

    name = "nuslerp"
    t: float
    integers: Integers = "error"

    def check(self, count: int) -> None:
        if count > 3:
            raise OpError(f"nuslerp takes a and b, or a base, a and b; it was given {count} sources")

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        if len(tensors) == 2:
            return _arc(tensors, self.t, 1 - 1e-12)
        base, a, b = tensors
        return base + _arc((a - base, b - base), self.t, 1 - 1e-12)


@op
@dataclass(frozen=True)
class Ties(Blending):
    """Trim the deltas of tuned models, elect signs, and merge what agrees; sources: base, then tuned.

    Of each delta the `density` · n elements of largest magnitude are kept. The sign of an element is that of the
    weighted sum of the deltas. base + scale · Σ w[k] · delta[k] / Σ w[k], over the deltas of that sign (Yadav et al.,
    "TIES-Merging", 2023).

    >>> str(Ties(0.2))
    'ties(density=0.2)'

    Args:
        density: the share of elements that is kept, from 0 to 1.
        scale, w, integers: as for `task_arithmetic`.
        normalise: divide by the weights that agree; else the sum alone.

    The threshold needs whole tensors. Computed in float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: as for `task_arithmetic`; a density outside of its range.
    """

    name = "ties"
    density: float
    scale: float = 1.0
    w: tuple[float, ...] | None = None
    normalise: bool = True
    integers: Integers = "error"

    def __post_init__(self) -> None:
        _share(self.name, "density", self.density)

    def check(self, count: int) -> None:
        weights_of(self, self.w, count - 1)

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        base, *tuned = tensors
        deltas = [_largest(tensor - base, self.density) for tensor in tuned]
        return base + self.scale * elected(deltas, weights_of(self, self.w, len(tuned)), self.normalise)


@op
@dataclass(frozen=True)
class Breadcrumbs(Blending):
    """Leave out the largest and the smallest elements of the deltas; sources: base, then tuned.

    base + scale · Σ w[k] · mask[k] · (tuned[k] - base). The mask drops the `gamma` · n elements of largest magnitude,
    and of the others the smallest, until `density` · n are left (Davari and Belilovsky, "Model Breadcrumbs", 2024).

    >>> str(Breadcrumbs(0.9))
    'breadcrumbs(density=0.9)'

    Args:
        density, gamma: shares of the elements, from 0 to 1.
        scale, w, integers: as for `task_arithmetic`. elect: as for `dare`.

    The thresholds need whole tensors. Computed in float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: as for `ties`.
    """

    name = "breadcrumbs"
    density: float
    gamma: float = 0.01
    scale: float = 1.0
    w: tuple[float, ...] | None = None
    elect: bool = False
    integers: Integers = "error"

    def __post_init__(self) -> None:
        _share(self.name, "density", self.density)
        _share(self.name, "gamma", self.gamma)

    def check(self, count: int) -> None:
        weights_of(self, self.w, count - 1)

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        base, *tuned = tensors
        deltas = [self._crumbs(tensor - base) for tensor in tuned]
        weights = weights_of(self, self.w, len(tuned))
        return base + self.scale * (elected(deltas, weights) if self.elect else summed(deltas, weights))

    def _crumbs(self, delta: Tensor) -> Tensor:
        import torch

        if self.density >= 1:
            return delta
        count = delta.numel()
        kept, top = int(self.density * count), int(self.gamma * count)
        low = max(0, count - kept - top)
        order = delta.abs().flatten().argsort()[low : low + kept]
        mask = torch.zeros(count, dtype=delta.dtype)
        mask[order] = 1
        return delta * mask.reshape(delta.shape)


@op
@dataclass(frozen=True)
class Della(Blending):
    """Drop elements of the deltas at random, small ones more often, and rescale the others; sources: base, then tuned.

    In each row the elements are ranked by magnitude. The probability to keep one rises from density - epsilon for the
    smallest to density + epsilon for the largest, and what is kept is divided by it (Deep et al., "DELLA-Merging",
    2024). Then signs are elected and the deltas merged as in `ties`.

    >>> str(Della(0.4, 0.1))
    'della(density=0.4, epsilon=0.1)'

    Args:
        density, epsilon: with 0 < density - epsilon and density + epsilon < 1.
        scale, w, integers: as for `task_arithmetic`. elect: as for `dare`.

    The ranks need whole tensors; the draws are reproducible as those of `dare`. Computed in float32 (float64 for
    float64) and rounded once. There is no inverse.

    Raises:
        OpError: as for `ties`.
    """

    name = "della"
    density: float
    epsilon: float = 0.15
    scale: float = 1.0
    w: tuple[float, ...] | None = None
    elect: bool = True
    integers: Integers = "error"

    def __post_init__(self) -> None:
        if not (self.density - self.epsilon > 0 and self.density + self.epsilon < 1):
            raise OpError(f"della: density ± epsilon lies within 0 to 1, and {self.density} ± {self.epsilon} does not")

    def check(self, count: int) -> None:
        weights_of(self, self.w, count - 1)

    def run(self, tensors: Tensors, at: At | None = None) -> Tensors:
        return self.blended(tensors, at or At(""))

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        base, *tuned = tensors
        deltas = [self._dropped(tensor - base, at, n) for n, tensor in enumerate(tuned)]
        weights = weights_of(self, self.w, len(tuned))
        return base + self.scale * (elected(deltas, weights) if self.elect else summed(deltas, weights))

    def _dropped(self, delta: Tensor, at: At, number: int) -> Tensor:
        rows = delta.reshape(-1, delta.shape[-1]) if delta.dim() > 1 else delta.reshape(1, -1)
        ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(delta.dtype) / max(1, rows.shape[1] - 1)
        keep = (self.density - self.epsilon + 2 * self.epsilon * ranks).reshape(delta.shape)
        return delta * (uniform_like(delta, at, number) < keep) / keep


@op
@dataclass(frozen=True)
class ModelStock(Blending):
    """Move the mean of tuned models towards their base, by the angle between them; sources: base, then tuned.

    t · mean(tuned) + (1 - t) · base, with t = k cos θ / (1 + (k - 1) cos θ) for k models and cos θ the mean cosine
    between their deltas (Jang et al., "Model Stock", 2024).

    >>> str(ModelStock())
    'model_stock'

    Args:
        integers: as for `lerp`.

    The angle needs whole tensors. Computed in float32 (float64 for float64), products in float64, and rounded once.
    There is no inverse.

    Raises:
        OpError: fewer than three sources, different shapes, or integers without a policy.
    """

    name = "model_stock"
    integers: Integers = "error"

    def check(self, count: int) -> None:
        if count < 3:
            raise OpError(f"model_stock takes a base and two or more tuned models; it was given {count} sources")

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        base, *tuned = tensors
        deltas = [tensor - base for tensor in tuned]
        pairs = list(combinations(deltas, 2))
        cosine, count = sum(_cosine(a, b) for a, b in pairs) / len(pairs), len(tuned)
        divisor = 1 + (count - 1) * cosine
        t = count * cosine / divisor if abs(divisor) > 1e-6 else 0.0
        return weighted_sum((*tuned, base), (*(t / count,) * count, 1 - t))


@op
@dataclass(frozen=True)
class Karcher(Blending):
    """Average tensors along arcs, whatever their order: the Karcher mean of their directions; sources: two or more.

    The direction is the point on the sphere whose mean of logarithms is 0, found by iterating
    x <- exp_x(mean(log_x(u[k]))) over the normed sources u (Karcher, 1977). Its length is the mean of their norms.

    >>> str(Karcher())
    'karcher'

    Args:
        iterations: at most. tolerance: a step of this length ends them. integers: as for `lerp`.

    The angles need whole tensors. Computed in float32 (float64 for float64), products in float64, and rounded once.
    There is no inverse.

    Raises:
        OpError: different shapes, or integers without a policy.
    """

    name = "karcher"
    iterations: int = 10
    tolerance: float = 1e-5
    integers: Integers = "error"

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        norms = [_norm(tensor) for tensor in tensors]
        units = [tensor / norm for tensor, norm in zip(tensors, norms) if norm > self.tolerance]
        length = sum(norms) / len(norms)
        if not units:
            return tensors[0] * 0
        mean = weighted_sum(units, (1 / len(units),) * len(units))
        size = _norm(mean)
        mean = units[0].clone() if size < self.tolerance else mean / size
        for _ in range(self.iterations):
            tangent = self._tangent(mean, units)
            step = _norm(tangent)
            if step < self.tolerance:
                break
            mean = math.cos(step) * mean + math.sin(step) / step * tangent
            mean = mean / _norm(mean)
        return mean * length

    def _tangent(self, mean: Tensor, units: Sequence[Tensor]) -> Tensor:
        """The mean of the logarithms of the units at a point of the sphere."""
        tangent = mean * 0
        for unit in units:
            cosine = max(-1.0, min(1.0, _dot(mean, unit)))
            angle = math.acos(cosine)
            if angle >= self.tolerance:
                tangent = tangent + angle / math.sin(angle) / len(units) * (unit - cosine * mean)
        return tangent


def _share(name: str, what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise OpError(f"{name}: {what} is from 0 to 1, not {value}")


def _largest(delta: Tensor, density: float) -> Tensor:
    """The delta with zeros in place of all but the elements of largest magnitude."""
    kept = max(1, int(density * delta.numel())) if density > 0 and delta.numel() else 0
    if kept == delta.numel():
        return delta
    if not kept:
        return delta * 0
    size = delta.abs()
    least = size.flatten().kthvalue(delta.numel() - kept + 1).values
    return delta * (size >= least)


def _dot(a: Tensor, b: Tensor) -> float:
    """The product of two tensors as flat vectors, summed in float64 over blocks."""
    total = 0.0
    flat = a.reshape(-1), b.reshape(-1)
    for start in range(0, len(flat[0]), _BLOCK):
        x, y = (part[start : start + _BLOCK].double() for part in flat)
        total += float(x @ y)
    return total


_BLOCK = 1 << 20  # elements


def _norm(tensor: Tensor) -> float:
    return math.sqrt(_dot(tensor, tensor))


def _cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two tensors as flat vectors; 0 where one is 0."""
    norms = _norm(a) * _norm(b)
    return max(-1.0, min(1.0, _dot(a, b) / norms)) if norms else 0.0


def _arc(tensors: Tensors, t: float, parallel: float) -> Tensor:
    """The point at `t` of the arc between two tensors; of the line where they are parallel, or one is 0."""
    cosine = _cosine(*tensors)
    if not _norm(tensors[0]) or not _norm(tensors[1]) or abs(cosine) > parallel:
        return weighted_sum(tensors, (1 - t, t))
    angle = math.acos(cosine)
    if parallel == _PARALLEL:
        return summed(tensors, (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)))
    # The smallest angles: a quotient of two small numbers comes last.
    return summed(tensors, (math.sin((1 - t) * angle), math.sin(t * angle))).div_(math.sin(angle))
