"""Ops that merge models by the angles between their tensors: `slerp`, `nuslerp`, `model_stock`, `karcher`.

As in `blending`, sources are the same tensor of several models, computed with in float32 and rounded once. Each result
is a sum of multiples of the sources, whose weights follow from their inner products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from .base import BlockFacts, OpError, Tensors
from .blending import summed
from .keyed import At
from .over_axes import Integers, mixed_by
from .registry import op
from .surveying import Surveying, added, products

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Matrix = np.ndarray[Any, np.dtype[np.float64]]

__all__ = ["Karcher", "ModelStock", "Nuslerp", "Slerp"]

_PARALLEL = 0.9995  # of a cosine from which on an arc is a line


@op
@dataclass(frozen=True)
class Slerp(Surveying):
    """Interpolate between two tensors along an arc; sources: a, b.

    sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b, with θ the angle between the tensors as flat vectors (Shoemake,
    "Animating Rotation with Quaternion Curves", 1985). Where |cos θ| > 0.9995 it is `lerp`.

    >>> str(Slerp(0.3))
    'slerp(t=0.3)'

    Args:
        t: 0 gives a, 1 gives b; a formula or a table of the index gives each layer its own: `slerp(t:i)`.
        integers: as for `lerp`.

    The angle takes a pass over the tensors of its own. Computed in float32 (float64 for float64), norms and products
    in float64 but for sums of 64 elements, and rounded once. There is no inverse.

    Raises:
        OpError: as for `lerp`.
    """

    name = "slerp"
    count = 2
    t: float
    integers: Integers = "error"

    def facts(self, tensors: Tensors, known: Sequence[Any]) -> BlockFacts:
        return products(tensors)

    def finding(self, facts: Any, known: Sequence[Any]) -> Any:
        return _Angle.of(added(facts, 2))

    def mixed(self, tensors: Tensors, at: At, known: Sequence[Any]) -> Tensor:
        return _arc(tensors, self.t, known[0], _PARALLEL)


@op
@dataclass(frozen=True)
class Nuslerp(Surveying):
    """Interpolate along an arc down to the smallest angles, from a base where there is one; sources: [base], a, b.

    As `slerp`, a line only where the tensors are parallel but for rounding. With three sources the first is a base, and
    base + nuslerp(a - base, b - base) is made.

    >>> str(Nuslerp(0.5))
    'nuslerp(t=0.5)'

    Args:
        t, integers: as for `slerp`.

    The angle takes a pass over the tensors of its own. Computed in float32 (float64 for float64) and rounded once.
    There is no inverse.

    Raises:
        OpError: other than two or three sources, different shapes, or integers without a policy.
    """

    name = "nuslerp"
    t: float
    integers: Integers = "error"

    def check(self, count: int) -> None:
        if count > 3:
            raise OpError(f"nuslerp takes a and b, or a base, a and b; it was given {count} sources")

    def facts(self, tensors: Tensors, known: Sequence[Any]) -> BlockFacts:
        return products(_ends(tensors))

    def finding(self, facts: Any, known: Sequence[Any]) -> Any:
        return _Angle.of(added(facts, 2))

    def mixed(self, tensors: Tensors, at: At, known: Sequence[Any]) -> Tensor:
        made = _arc(_ends(tensors), self.t, known[0], 1 - 1e-12)
        return made if len(tensors) == 2 else made.add_(tensors[0])


@op
@dataclass(frozen=True)
class ModelStock(Surveying):
    """Move the mean of tuned models towards their base, by the angle between them; sources: base, then tuned.

    t · mean(tuned) + (1 - t) · base, with t = k cos θ / (1 + (k - 1) cos θ) for k models and cos θ the mean cosine
    between their deltas (Jang et al., "Model Stock", 2024).

    >>> str(ModelStock())
    'model_stock'

    Args:
        integers: as for `lerp`.

    The angle takes a pass over the tensors of its own. Computed in float32 (float64 for float64), products as for
    `slerp`, and rounded once. There is no inverse.

    Raises:
        OpError: fewer than three sources, different shapes, or integers without a policy.
    """

    name = "model_stock"
    integers: Integers = "error"

    def check(self, count: int) -> None:
        if count < 3:
            raise OpError(f"model_stock takes a base and two or more tuned models; it was given {count} sources")

    def facts(self, tensors: Tensors, known: Sequence[Any]) -> BlockFacts:
        base, *tuned = tensors
        return products([tensor - base for tensor in tuned])

    def finding(self, facts: Any, known: Sequence[Any]) -> Any:
        count = len(facts[0])
        inner = added(facts, count)
        pairs = list(combinations(range(count), 2))
        cosine = sum(_cosine(inner[a][a], inner[a][b], inner[b][b]) for a, b in pairs) / len(pairs)
        divisor = 1 + (count - 1) * cosine
        return count * cosine / divisor if abs(divisor) > 1e-6 else 0.0

    def mixed(self, tensors: Tensors, at: At, known: Sequence[Any]) -> Tensor:
        base, *tuned = tensors
        (t,), count = known, len(tuned)
        return mixed_by((*tuned, base), (*(t / count,) * count, 1 - t))


@op
@dataclass(frozen=True)
class Karcher(Surveying):
    """Average tensors along arcs, in any order: the Karcher mean of their directions; sources: two or more.

    The direction is the point on the sphere whose mean of logarithms is 0, found by iterating
    x <- exp_x(mean(log_x(u[k]))) over the normed sources u (Karcher, 1977). Its length is the mean of their norms.

    >>> str(Karcher())
    'karcher'

    Args:
        iterations: at most. tolerance: a step of this length ends them. integers: as for `lerp`.

    The angles take a pass over the tensors of their own. Computed in float32 (float64 for float64), products as for
    `slerp`, the iteration in float64, and rounded once. There is no inverse.

    Raises:
        OpError: different shapes, or integers without a policy.
    """

    name = "karcher"
    iterations: int = 10
    tolerance: float = 1e-5
    integers: Integers = "error"

    def facts(self, tensors: Tensors, known: Sequence[Any]) -> BlockFacts:
        return products(tensors)

    def finding(self, facts: Any, known: Sequence[Any]) -> Any:
        """The weight of each tensor: every point of the iteration is a sum of multiples of them."""
        import numpy as np

        count = len(facts[0])
        inner = np.array(added(facts, count))
        norms = np.sqrt(inner.diagonal())
        of = np.flatnonzero(norms > self.tolerance)
        if not len(of):
            return (0.0,) * count
        cosines = inner[np.ix_(of, of)] / np.outer(norms[of], norms[of])
        weights = np.zeros(count)
        weights[of] = self._mean(cosines) / norms[of] * norms.mean()
        return tuple(weights.tolist())

    def _mean(self, cosines: Matrix) -> Matrix:
        """The mean's coordinates along units, by their cosines."""
        import numpy as np

        def length(point: Matrix) -> float:
            return math.sqrt(max(0.0, float(point @ cosines @ point)))

        count = len(cosines)
        mean = np.full(count, 1 / count)
        size = length(mean)
        mean = np.eye(count)[0] if size < self.tolerance else mean / size
        for _ in range(self.iterations):
            along = np.clip(cosines @ mean, -1, 1)
            angles = np.arccos(along)
            pull = np.zeros(count)
            far = angles >= self.tolerance
            pull[far] = angles[far] / np.sin(angles[far]) / count
            tangent = pull - (pull @ along) * mean
            step = length(tangent)
            if step < self.tolerance:
                break
            mean = math.cos(step) * mean + math.sin(step) / step * tangent
            mean = mean / length(mean)
        return mean

    def mixed(self, tensors: Tensors, at: At, known: Sequence[Any]) -> Tensor:
        return mixed_by(tensors, known[0])


@dataclass(frozen=True, slots=True)
class _Angle:
    """The angle between two tensors as flat vectors; None where one of them is 0."""

    cosine: float | None

    @classmethod
    def of(cls, inner: Sequence[Sequence[float]]) -> _Angle:
        (a, product), (_, b) = inner
        return cls(_cosine(a, product, b) if a and b else None)


def _cosine(a: float, product: float, b: float) -> float:
    """The cosine of the angle between two vectors, by their squares and their product; 0 where one is 0."""
    norms = math.sqrt(a) * math.sqrt(b)
    return max(-1.0, min(1.0, product / norms)) if norms else 0.0


def _ends(tensors: Tensors) -> Tensors:
    """The ends of an arc: two tensors, or the deltas of two from a base before them."""
    if len(tensors) == 2:
        return tensors
    base, a, b = tensors
    return a - base, b - base


def _arc(tensors: Tensors, t: float, angle: _Angle, parallel: float) -> Tensor:
    """The point at `t` of the arc between two tensors; of the line where they are parallel, or one is 0."""
    if angle.cosine is None or abs(angle.cosine) > parallel:
        return mixed_by(tensors, (1 - t, t))
    theta = math.acos(angle.cosine)
    if parallel == _PARALLEL:
        return summed(tensors, (math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)))
    # The smallest angles: a quotient of two small numbers comes last.
    return summed(tensors, (math.sin((1 - t) * theta), math.sin(t * theta))).div_(math.sin(theta))
