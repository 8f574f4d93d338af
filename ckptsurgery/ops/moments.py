"""What an initialiser promises: the mean and the standard deviation of what it draws, and how far a draw may be off."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from ..specs import DTYPES, TensorSpec
from .formulas import CUT_STD, gain_of
from .initialisers import Initialiser

__all__ = ["Moments", "moments"]

# How many standard errors a sound draw may be away: one in two million is further off.
_ERRORS = 5.0


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and standard deviation over the entries of one tensor, and what chance may make of them.

    Args:
        mean, std: what the formula says.
        mean_slack, std_slack: five standard errors for a tensor of this size; near 0 where nothing is left to chance.
        low, high: the bounds that no entry passes.
    """

    mean: float
    std: float
    mean_slack: float = 0.0
    std_slack: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    def kept_by(self, found: Mapping[str, float]) -> bool:
        """Whether "mean", "std", "min", "max" of a tensor, and its count of "nonfinite" values, are as promised."""
        near = abs(found["mean"] - self.mean) <= self.mean_slack and abs(found["std"] - self.std) <= self.std_slack
        return near and self.low <= found["min"] and found["max"] <= self.high and not found["nonfinite"]

    def __str__(self) -> str:
        text = f"mean {self.mean:.4g} ± {self.mean_slack:.1g}, std {self.std:.4g} ± {self.std_slack:.1g}"
        return text if math.isinf(self.low) else f"{text}, within [{self.low:.4g}, {self.high:.4g}]"


def moments(initialiser: Initialiser, spec: TensorSpec) -> Moments | None:
    """What an initialiser promises for a tensor of this spec; None for callables, `default` and `own`, and no numbers.

    >>> print(moments(Initialiser.of("xavier_uniform"), TensorSpec((100, 50), "F32")))
    mean 0 ± 0.008, std 0.1155 ± 0.004, within [-0.2, 0.2]
    >>> print(moments(Initialiser.of("ones"), TensorSpec((3,), "F32")).mean)
    1.0

    Raises:
        OpError: the initialiser cannot fill such a tensor.
    """
    initialiser.check(spec)
    kind = DTYPES[spec.dtype].kind
    if initialiser.function is not None or initialiser.by_module or kind == "complex" or not spec.numel:
        return None
    found = _PROMISES[initialiser.name](spec.shape, **dict(initialiser.arguments))
    if found is None:
        return None
    dtype = DTYPES[spec.dtype]
    rounding = 2.0 ** (2 - min(dtype.significand, 40)) * (abs(found.mean) + found.std) if dtype.kind == "float" else 0.0
    return Moments(
        found.mean,
        found.std,
        found.mean_slack + rounding,
        found.std_slack + rounding,
        found.low - rounding,
        found.high + rounding,
    )


def _drawn(shape: Sequence[int], mean: float, std: float, kurtosis: float, reach: float = math.inf) -> Moments:
    """Independent draws: the standard errors of their mean, and of their std by the distribution's kurtosis."""
    count = math.prod(shape)
    error = std / math.sqrt(count)
    of_std = error * math.sqrt((kurtosis - 1) / 4)
    # with a handful of draws the std comes out small on average, too: (n - 1) / n of the variance
    bias = std * (1 - math.sqrt((count - 1) / count))
    return Moments(mean, std, _ERRORS * error, _ERRORS * of_std + bias, mean - reach, mean + reach)


def _normal(shape: Sequence[int], mean: float = 0.0, std: float = 1.0) -> Moments:
    return _drawn(shape, mean, std, 3.0)


def _uniform(shape: Sequence[int], a: float = 0.0, b: float = 1.0) -> Moments:
    return _drawn(shape, (a + b) / 2, (b - a) / math.sqrt(12), 1.8, (b - a) / 2)


def _around_zero(shape: Sequence[int], std: float) -> Moments:
    return _uniform(shape, -math.sqrt(3) * std, math.sqrt(3) * std)


def _cut(shape: Sequence[int], mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Moments | None:
    """N(mean, std²) cut to [a, b]. Source: Johnson and Kotz, Continuous Univariate Distributions, 10.1."""
    unit = NormalDist()
    low, high = (a - mean) / std, (b - mean) / std
    inside = unit.cdf(high) - unit.cdf(low)
    if inside < 1e-12:
        return None
    shift = (unit.pdf(low) - unit.pdf(high)) / inside
    spread = 1 + (low * unit.pdf(low) - high * unit.pdf(high)) / inside - shift**2
    found = _drawn(shape, mean + std * shift, std * math.sqrt(max(spread, 0.0)), 9.0)
    return replace(found, low=a, high=b)


def _cut_in_sigmas(
    shape: Sequence[int], mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Moments | None:
    return _cut(shape, mean, std, mean + a * std, mean + b * std)


def _constant(shape: Sequence[int], val: float) -> Moments:
    return Moments(float(val), 0.0, low=val, high=val)


def _marks(shape: Sequence[int], ones: int) -> Moments:
    """So many ones, zeros else."""
    share = ones / math.prod(shape)
    return Moments(share, math.sqrt(share * (1 - share)), low=0.0, high=1.0)


def _dirac(shape: Sequence[int], groups: int = 1) -> Moments:
    return _marks(shape, groups * min(shape[0] // groups, shape[1]))


def _fans(shape: Sequence[int]) -> tuple[int, int]:
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def _xavier(shape: Sequence[int], gain: float | str = 1.0) -> float:
    return gain_of(gain) * math.sqrt(2 / sum(_fans(shape)))


def _kaiming(shape: Sequence[int], a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> float:
    fan = _fans(shape)[0 if mode == "fan_in" else 1]
    return gain_of(nonlinearity, a) / math.sqrt(fan)


def _orthogonal(shape: Sequence[int], gain: float | str = 1.0) -> Moments:
    """The rows, or the columns, all have norm gain: the std is exact up to the mean, which is small."""
    rows, columns = shape[0], math.prod(shape[1:])
    found = _drawn(shape, 0.0, gain_of(gain) / math.sqrt(max(rows, columns)), 1.0)
    return replace(found, std_slack=found.std - math.sqrt(max(found.std**2 - found.mean_slack**2, 0.0)))


def _sparse(shape: Sequence[int], sparsity: float, std: float = 0.01) -> Moments:
    left = 1 - min(math.ceil(sparsity * shape[0]), shape[0]) / shape[0]
    return _drawn(shape, 0.0, std * math.sqrt(left), 3 / left) if left else _constant(shape, 0.0)


def _variance_scaling(
    shape: Sequence[int], scale: float = 1.0, mode: str = "fan_in", distribution: str = "normal"
) -> Moments | None:
    fan_in, fan_out = _fans(shape)
    std = math.sqrt(scale / {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode])
    if distribution == "truncated_normal":
        return _cut_in_sigmas(shape, std=std / CUT_STD)
    return _normal(shape, 0.0, std) if distribution == "normal" else _around_zero(shape, std)


_PROMISES: dict[str, Callable[..., Moments | None]] = {
    "constant": _constant,
    "dirac": _dirac,
    "eye": lambda shape: _marks(shape, min(shape)),
    "kaiming_normal": lambda shape, **given: _normal(shape, 0.0, _kaiming(shape, **given)),
    "kaiming_uniform": lambda shape, **given: _around_zero(shape, _kaiming(shape, **given)),
    "lecun_normal": lambda shape: _variance_scaling(shape, distribution="truncated_normal"),
    "normal": _normal,
    "ones": lambda shape: _constant(shape, 1.0),
    "orthogonal": _orthogonal,
    "sparse": _sparse,
    "trunc_normal": _cut,
    "trunc_normal_tf": _cut_in_sigmas,
    "uniform": _uniform,
    "variance_scaling": _variance_scaling,
    "xavier_normal": lambda shape, **given: _normal(shape, 0.0, _xavier(shape, **given)),
    "xavier_uniform": lambda shape, **given: _around_zero(shape, _xavier(shape, **given)),
    "zeros": lambda shape: _constant(shape, 0.0),
}
