"""Warnings about values that cannot train: all zero, all alike, not finite, or of a scale that dies out or blows up."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from ..errors import Diagnostic
from .places import Place, places, require_module, size_of
from .signal_scale import depth_warnings, gain_of_layer

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_init"]

# std · √fan_in is what a layer multiplies the size of its input by; sound initialisations lie between 0.1 and 2.
_VANISHING, _EXPLODING = 1e-3, 30.0


def check_init(model: nn.Module, names: Collection[str] | None = None) -> tuple[Diagnostic, ...]:
    """Warn about trainable tensors whose values cannot train; nothing is changed.

    >>> import torch
    >>> model = torch.nn.Linear(4, 2)
    >>> check_init(model)
    ()
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> print(check_init(model)[0])
    warning[zero-weights]: 'weight' [2, 4] is all zeros
     = help: fine where a partner is not zero (a residual's last layer, a low-rank factor); initialise it otherwise

    Codes: `not-finite`; for matrices and kernels `zero-weights` and `equal-weights` (units that start alike stay so);
    for those of linear layers and convolutions `vanishing-scale` and `exploding-scale`, by std · √fan_in; and for a
    chain of layers, each sound alone, `vanishing-depth` and `exploding-depth`. A chain is what an `nn.Sequential` runs
    one after another, up to a norm or to a module whose effect on the scale is not known. Frozen and meta tensors are
    passed over, and a tensor under several names is looked at once.

    Args:
        names: only these.
    """
    require_module(model)
    seen: set[int] = set()
    found: list[Diagnostic] = []
    faulty: set[int] = set()
    for place in places(model):
        tensor = place.tensor
        wanted = (names is None or place.name in names) and tensor.requires_grad and not tensor.is_meta
        if wanted and id(tensor) not in seen and size_of(place)[0]:
            seen.add(id(tensor))
            told = list(_warnings(place))
            found += told
            faulty |= {id(tensor)} if told else set()
    return (*found, *depth_warnings(model, seen, faulty))


def _warnings(place: Place) -> Iterator[Diagnostic]:
    tensor = place.tensor.detach()
    shown = f"{place.name!r} {list(tensor.shape)}"
    bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
    if bad:
        yield _warning("not-finite", f"{shown} holds {bad} values that are not finite", "initialise it")
        return
    if tensor.ndim < 2 or tensor.numel() == 1:
        return
    if not tensor.any():
        help = "fine where a partner is not zero (a residual's last layer, a low-rank factor); initialise it otherwise"
        yield _warning("zero-weights", f"{shown} is all zeros", help)
    elif bool((tensor == tensor.flatten()[0]).all()):
        yield _warning("equal-weights", f"{shown} holds one value only: its units stay alike", "a random initialiser")
    else:
        gain = gain_of_layer(place.owner) if place.leaf == "weight" else None
        if gain is not None and not _VANISHING <= gain <= _EXPLODING:
            small = gain < _VANISHING
            code, fate = ("vanishing-scale", "die out") if small else ("exploding-scale", "blow up")
            said = f"{shown} multiplies the size of its input by {gain:.1e}: signals {fate}"
            yield _warning(code, said, "xavier_uniform, kaiming_normal or default")


def _warning(code: str, headline: str, help: str) -> Diagnostic:
    return Diagnostic(code, headline, help=help, severity="warning")
