"""What a chain of layers does to the size of a signal: each may be sound, and all together too weak or too strong."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from ..errors import Diagnostic

if TYPE_CHECKING:
    from torch import nn

__all__ = ["depth_warnings", "gain_of_layer"]

_VANISHED, _EXPLODED = 1e-5, 1e5


def gain_of_layer(module: nn.Module) -> float | None:
    """Output size over input size of a linear layer or convolution, for inputs of independent entries around zero.

    >>> import torch
    >>> layer = torch.nn.Linear(4, 4)
    >>> _ = torch.nn.init.constant_(layer.weight, 0.5)
    >>> gain_of_layer(layer)
    1.0

    It is √(fan_in · E[w²]). None for other modules, and for weights that are meta.
    """
    import torch
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
    from torch.nn.parameter import is_lazy

    weight = module.weight if isinstance(module, nn.Linear | _ConvNd) else None
    if not isinstance(weight, nn.Parameter) or is_lazy(weight) or weight.is_meta or not weight.numel():
        return None
    if not weight.is_floating_point():
        return None
    fan_in = math.prod(weight.shape[1:])
    if isinstance(module, _ConvTransposeNd):
        fan_in = math.prod(weight.shape[2:]) * weight.shape[0] // module.groups
    norm = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)
    return float(norm) * math.sqrt(fan_in / weight.numel())


def depth_warnings(model: nn.Module, looked_at: Collection[int], faulty: Collection[int]) -> Iterator[Diagnostic]:
    """One warning for each chain that lets signals die out or blow up.

    Args:
        looked_at: ids of the weights that count; a chain without one of them is passed over.
        faulty: ids of the weights that were warned about; a chain with one of them is passed over.
    """
    for path, chain in _chains(model):
        weights = {id(module.weight) for _, module, _ in chain}
        if len(chain) < 2 or weights & set(faulty) or not weights & set(looked_at):
            continue
        sizes = [size for *_, size in chain]
        if min(sizes) >= _VANISHED and max(sizes) <= _EXPLODED:
            continue
        small = min(sizes) < _VANISHED
        last = next(at for at, size in enumerate(sizes) if not _VANISHED <= size <= _EXPLODED)
        code, fate = ("vanishing-depth", "die out") if small else ("exploding-depth", "blow up")
        where = f"{path!r}: " if path else ""
        said = f"{where}from {chain[0][0]!r} to {chain[last][0]!r}, {last + 1} layers multiply the size of a signal by"
        help = "kaiming_normal(nonlinearity=relu) or orthogonal keeps the size; so does a norm between layers"
        yield Diagnostic(code, f"{said} {sizes[last]:.1e}: signals {fate}", help=help, severity="warning")


def _chains(model: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Module, float]]]]:
    """The chains: path of the container, and its layers with weights, each with the size of the signal after it."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if not _is_chain(module) or id(module) in inside:
            continue
        inside.update(id(child) for child in module.modules())
        chain: list[tuple[str, nn.Module, float]] = []
        size = 1.0
        for name, layer in _layers(module, path):
            factor = _factor(layer, size)
            if factor is None:
                yield path, chain
                chain, size = [], 1.0
                continue
            size *= factor
            if gain_of_layer(layer) is not None:
                chain.append((name, layer, size))
        yield path, chain


def _is_chain(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """What a container runs, in order, nested containers opened; a layer that stands there twice comes twice."""
    for name, child in module._modules.items():
        if child is not None:
            full = f"{path}.{name}" if path else name
            yield from _layers(child, full) if _is_chain(child) else [(full, child)]


def _factor(layer: nn.Module, size: float) -> float | None:
    """What a layer multiplies the root mean square of its input by; None where that is not known."""
    from torch import nn

    gain = gain_of_layer(layer)
    if gain is not None:
        return gain
    if isinstance(layer, nn.LeakyReLU):
        return math.sqrt((1 + layer.negative_slope**2) / 2)
    if isinstance(layer, nn.ReLU | nn.ReLU6 | nn.GELU | nn.SiLU | nn.Mish | nn.ELU):
        return math.sqrt(0.5)  # half of a symmetric signal; the smooth ones come near it
    if isinstance(layer, nn.Tanh | nn.Hardtanh | nn.Softsign):
        return 1 / max(1.0, size)
    if isinstance(layer, nn.Identity | nn.Flatten | nn.Unflatten | nn.Dropout | nn.Dropout1d | nn.Dropout2d):
        return 1.0
    return None
