"""What each initialiser fills a tensor with: one function a name.

The first two parameters are the tensor, contiguous and of a dtype that torch can draw, and the generator; the others
are the arguments that a recipe may write, with their defaults.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .base import OpError
from .seeding import seeded_globals

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CUT_STD", "FORMULAS", "gain_of", "of_module"]

# std of the unit normal cut at two sigma: variance scaling divides by it so that the std comes out as asked.
CUT_STD = 0.87962566103423978


def _normal(tensor: Tensor, generator: torch.Generator | None, mean: float = 0.0, std: float = 1.0) -> None:
    """N(mean, std²). Source: `torch.nn.init.normal_`."""
    tensor.normal_(mean, std, generator=generator)


def _uniform(tensor: Tensor, generator: torch.Generator | None, a: float = 0.0, b: float = 1.0) -> None:
    """U(a, b). Source: `torch.nn.init.uniform_`."""
    tensor.uniform_(a, b, generator=generator)


def _trunc_normal(
    tensor: Tensor,
    generator: torch.Generator | None,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
) -> None:
    """N(mean, std²) cut to [a, b], both in the tensor's own unit. Source: `torch.nn.init.trunc_normal_`."""
    from torch.nn import init

    init.trunc_normal_(tensor, mean, std, a, b, generator=generator)


def _trunc_normal_tf(
    tensor: Tensor,
    generator: torch.Generator | None,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
) -> None:
    """The unit normal cut to [a, b], then scaled by std and moved by mean: a and b count in sigmas. Source: timm."""
    from torch.nn import init

    init.trunc_normal_(tensor, 0.0, 1.0, a, b, generator=generator)
    tensor.mul_(std).add_(mean)


def _constant(tensor: Tensor, generator: torch.Generator | None, val: float) -> None:
    """Every entry is val. Source: `torch.nn.init.constant_`."""
    tensor.fill_(val)


def _ones(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Every entry is 1."""
    tensor.fill_(1)


def _zeros(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Every entry is 0."""
    tensor.zero_()


def _eye(tensor: Tensor, generator: torch.Generator | None) -> None:
    """The identity matrix, or as much of it as fits. Source: `torch.nn.init.eye_`."""
    tensor.zero_().fill_diagonal_(1)


def _dirac(tensor: Tensor, generator: torch.Generator | None, groups: int = 1) -> None:
    """A convolution that hands its input channels through, each group its own. Source: `torch.nn.init.dirac_`."""
    from torch.nn import init

    init.dirac_(tensor, groups)


def _xavier_uniform(tensor: Tensor, generator: torch.Generator | None, gain: float | str = 1.0) -> None:
    """U(-√3 s, √3 s) with s = gain √(2 / (fan_in + fan_out)). Source: Glorot and Bengio, 2010."""
    from torch.nn import init

    init.xavier_uniform_(tensor, gain_of(gain), generator=generator)


def _xavier_normal(tensor: Tensor, generator: torch.Generator | None, gain: float | str = 1.0) -> None:
    """N(0, s²) with s = gain √(2 / (fan_in + fan_out)). Source: Glorot and Bengio, 2010."""
    from torch.nn import init

    init.xavier_normal_(tensor, gain_of(gain), generator=generator)


def _kaiming_uniform(
    tensor: Tensor,
    generator: torch.Generator | None,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
) -> None:
    """U(-√3 s, √3 s) with s = gain(nonlinearity, a) / √fan. Source: He et al., 2015."""
    from torch.nn import init

    init.kaiming_uniform_(tensor, a, mode, nonlinearity, generator=generator)  # type: ignore[arg-type]


def _kaiming_normal(
    tensor: Tensor,
    generator: torch.Generator | None,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
) -> None:
    """N(0, s²) with s = gain(nonlinearity, a) / √fan. Source: He et al., 2015."""
    from torch.nn import init

    init.kaiming_normal_(tensor, a, mode, nonlinearity, generator=generator)  # type: ignore[arg-type]


def _orthogonal(tensor: Tensor, generator: torch.Generator | None, gain: float | str = 1.0) -> None:
    """gain times a (semi-)orthogonal matrix, trailing dimensions flattened. Source: Saxe et al., 2013."""
    from torch.nn import init

    init.orthogonal_(tensor, gain_of(gain), generator=generator)


def _sparse(tensor: Tensor, generator: torch.Generator | None, sparsity: float, std: float = 0.01) -> None:
    """N(0, std²) with ⌈sparsity · rows⌉ zeros in each column. Source: Martens, 2010, as `torch.nn.init.sparse_`."""
    from torch.nn import init

    if generator is None:
        init.sparse_(tensor, sparsity, std)
        return
    # torch places the zeros by the global generator even where it is given another one.
    state = hashlib.blake2b(generator.get_state().numpy().tobytes(), digest_size=8).digest()
    with seeded_globals(int.from_bytes(state, "big") >> 1):
        init.sparse_(tensor, sparsity, std, generator=generator)


def _variance_scaling(
    tensor: Tensor,
    generator: torch.Generator | None,
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "normal",
) -> None:
    """Variance scale / fan; a cut normal is widened by 1/0.8796… so that its variance is that too. Source: timm."""
    from torch.nn import init

    fan_in, fan_out = init._calculate_fan_in_and_fan_out(tensor)
    std = math.sqrt(scale / {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode])
    if distribution == "truncated_normal":
        _trunc_normal_tf(tensor, generator, std=std / CUT_STD)
    elif distribution == "normal":
        _normal(tensor, generator, std=std)
    else:
        _uniform(tensor, generator, -math.sqrt(3) * std, math.sqrt(3) * std)


def _lecun_normal(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Variance 1 / fan_in, normal, cut at two sigma. Source: LeCun et al., 1998, as timm computes it."""
    _variance_scaling(tensor, generator, distribution="truncated_normal")


def of_module(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Refuse: what `default` and `own` mean is known to the model alone."""
    raise OpError("only the model can say what its default is: initialise the tensor in its model")


def gain_of(gain: float | str, slope: float | None = None) -> float:
    """A gain as it was written: a number, or the name of a nonlinearity, a leaky one with its slope."""
    if not isinstance(gain, str):
        return gain
    from torch.nn import init

    return float(init.calculate_gain(gain, slope))  # type: ignore[arg-type]


FORMULAS: dict[str, Callable[..., None]] = {
    "constant": _constant,
    "default": of_module,
    "dirac": _dirac,
    "eye": _eye,
    "kaiming_normal": _kaiming_normal,
    "kaiming_uniform": _kaiming_uniform,
    "lecun_normal": _lecun_normal,
    "normal": _normal,
    "ones": _ones,
    "orthogonal": _orthogonal,
    "own": of_module,
    "sparse": _sparse,
    "trunc_normal": _trunc_normal,
    "trunc_normal_tf": _trunc_normal_tf,
    "uniform": _uniform,
    "variance_scaling": _variance_scaling,
    "xavier_normal": _xavier_normal,
    "xavier_uniform": _xavier_uniform,
    "zeros": _zeros,
}
