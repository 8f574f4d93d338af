"""By inputs: names without a meaning, registration in any order, fused on one side."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs


class Nameless(nn.Module):
    """Attention and feed-forward blocks whose modules are named and registered at random; all widths are equal."""

    def __init__(self, seed: int, fused: bool, depth: int = 2, width: int = 6) -> None:
        super().__init__()
        draw = random.Random(seed)
        letters = [a + b for a in "bcdfgh" for b in "aeiouxyz"]
        draw.shuffle(letters)
        names, made = iter(letters), []

        def add(module: nn.Module) -> str:
            made.append((next(names), module))
            return made[-1][0]

        self.first = add(nn.Linear(4, width))
        self.parts = []
        for _ in range(depth):
            norms = [add(nn.LayerNorm(width)) for _ in range(2)]
            heads = [add(nn.Linear(width, (3 if fused else 1) * width)) for _ in range(1 if fused else 3)]
            self.parts.append((norms, heads, [add(nn.Linear(width, width)) for _ in range(3)]))
        self.last = add(nn.Linear(width, 3))
        draw.shuffle(made)
        for name, module in made:
            self.add_module(name, module)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
                seed += 1

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self, self.first)(x)
        for norms, heads, (out, up, down) in self.parts:
            h = getattr(self, norms[0])(x)
            parts = [getattr(self, n)(h) for n in heads]
            q, k, v = parts if len(parts) == 3 else parts[0].chunk(3, -1)
            x = x + getattr(self, out)(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
            x = x + getattr(self, down)(torch.tanh(getattr(self, up)(getattr(self, norms[1])(x))))
        result: Tensor = getattr(self, self.last)(x)
        return result


@pytest.mark.parametrize("fused", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("seed", range(3))
def test_networks_without_meaningful_names_are_aligned_by_their_order_of_use(
    seed: int, fused: tuple[bool, bool]
) -> None:
    source, target = Nameless(seed, fused[0]), Nameless(100 + seed, fused[1])
    found = cs.suggest(source, target, inputs=torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(7)))
    assert found.coverage == 1.0
    assert found.parity is not None
    assert found.parity.ok


def test_outputs_that_differ_are_said_of_every_tensor() -> None:
    class Other(Nameless):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 + 1

    source, target = Nameless(0, False), Other(1, False)
    found = cs.suggest(source, target, inputs=torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(7)))
    assert found.parity is not None
    assert not found.parity.ok
    (said,) = [a for a in found.assumptions if a.kind == "parity"]
    assert set(said.keys) == set(dict(target.named_parameters()))
