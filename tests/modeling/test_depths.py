"""Chains of layers: sound alone, and together too weak or too strong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ckptsurgery as cs
from ckptsurgery.modeling.signal_scale import gain_of_layer


def stack(depth: int, *between: nn.Module, width: int = 64) -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(width, width), *between)])


def codes(model: nn.Module) -> list[str]:
    return [d.code for d in cs.check_init(model)]


def scaled(model: nn.Module, what: str) -> nn.Module:
    cs.select(model, nn.Linear).init_({"weight": what, "bias": "zeros"})
    return model


@pytest.mark.parametrize(
    ("what", "between", "code"),
    [
        ("normal(std=0.01)", [], "vanishing-depth"),
        ("normal(std=0.5)", [], "exploding-depth"),
        ("normal(std=0.5)", [nn.ReLU()], "exploding-depth"),
        ("normal(std=0.5)", [nn.Tanh()], ""),  # bounded, whatever comes
        ("normal(std=0.01)", [nn.Tanh()], "vanishing-depth"),
        ("normal(std=0.01)", [nn.LayerNorm(64)], ""),
        ("orthogonal", [], ""),
        ("kaiming_normal(nonlinearity=relu)", [nn.ReLU()], ""),
        ("xavier_normal", [nn.ReLU()], "vanishing-depth"),
        ("normal(std=0.01)", [nn.Softmax(-1)], ""),  # nothing is known, nothing is said
    ],
)
def test_forty_layers(what: str, between: list[nn.Module], code: str) -> None:
    assert codes(scaled(stack(40, *between), what)) == ([code] if code else [])


def test_two_layers_forgive_what_forty_do_not() -> None:
    assert codes(scaled(stack(2), "normal(std=0.01)")) == []


@pytest.mark.parametrize("between", [[], [nn.ReLU()], [nn.LeakyReLU(0.2)]])
@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv1d(64, 64, 3, padding=1), nn.ConvTranspose1d(64, 64, 3)])
def test_the_gain_is_what_a_run_shows(layer: nn.Module, between: list[nn.Module]) -> None:
    model = nn.Sequential(layer, *between)
    nn.init.zeros_(layer.bias)
    x = torch.randn(200, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        size = float(layer(x)[..., 2:-2].square().mean().sqrt())
        after = float(model(x)[..., 2:-2].square().mean().sqrt())
    gain = gain_of_layer(layer)
    assert gain == pytest.approx(size, rel=0.05)
    slope = getattr(between[0], "negative_slope", 0.0) if between else 1.0
    assert after / size == pytest.approx(((1 + slope**2) / 2) ** 0.5, rel=0.1)


def test_the_warning_says_where_it_happens_and_how_much() -> None:
    model = nn.ModuleDict({"net": scaled(nn.Sequential(stack(3), stack(3)), "normal(std=0.015)")})
    (found,) = cs.check_init(model)
    assert found.severity == "warning" and "'net': from 'net.0.0' to 'net.1.2', 6 layers" in found.headline


def test_a_fault_of_one_layer_is_told_for_that_layer_alone() -> None:
    model = scaled(stack(4), "orthogonal")
    nn.init.zeros_(model[2].weight)
    assert codes(model) == ["zero-weights"]


def test_a_shared_layer_counts_each_time_it_runs() -> None:
    shared = nn.Linear(64, 64)
    nn.init.normal_(shared.weight, std=0.01)
    assert codes(nn.Sequential(*[shared] * 12)) == ["vanishing-depth"]


def test_a_container_that_runs_its_layers_in_another_way_is_no_chain() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self:
                x = x + layer(x)
            return x

    layers = scaled(stack(40), "normal(std=0.01)")
    assert codes(nn.Sequential(*layers)) == ["vanishing-depth"]
    assert codes(Residual(*layers)) == codes(nn.Sequential(nn.Linear(64, 64), Residual(*layers))) == []


def test_frozen_meta_and_lazy_chains_are_passed_over() -> None:
    model = scaled(stack(40), "normal(std=0.01)")
    assert codes(model.requires_grad_(False)) == []
    assert codes(model.requires_grad_(True).to("meta")) == []
    assert codes(nn.Sequential(*[nn.LazyLinear(2) for _ in range(40)])) == []
