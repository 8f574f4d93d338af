"""Two networks, one set of weights: filled with noise, converted, run on the same input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ckptsurgery as cs


def noisy(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, its parameters and statistics drawn anew: no tensor is a constant of its module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or name.endswith(("inv_freq", "position_ids")):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif "norm" in name.lower() or ".ln" in name or ".bn" in name or "layrnorm" in name:
                tensor.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)
            else:
                tensor.copy_(0.3 * noise if tensor.dim() < 2 else noise / tensor[0].numel() ** 0.5)
    return model.eval()


def convert(
    source: nn.Module, recipe: cs.Recipe, target: nn.Module, config: Mapping[str, Any] | None = None
) -> nn.Module:
    """Plan against the target from headers, then load; nothing stays missing, nothing is cast."""
    plan = cs.plan(source, recipe, target=target, config=config, dtype="error")
    report = plan.load_into(target)
    assert report.coverage == 1.0
    assert not report.missing_keys
    return target.eval()


def assert_parity(made: Tensor, reference: Tensor) -> None:
    """max|difference| <= 1e-5 x max(1, max|reference|), and the reference is no constant."""
    assert made.shape == reference.shape
    assert reference.std() > 1e-3
    assert (made - reference).abs().max() <= 1e-5 * max(1.0, reference.abs().max().item())
