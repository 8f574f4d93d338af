"""Two models held against each other: equal, apart, built differently; nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ckptsurgery as cs


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.drop, self.fc2 = nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.fc2(self.drop(self.norm(self.fc1(x))))}


class Theirs(nn.Module):
    """The same network, its parts used and named otherwise, its second matrix turned."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


RENAME = ["{m:fc1,norm,fc2}.{l} -> {m:body.0,body.1,head}.{l}"]


@pytest.fixture
def ours() -> Ours:
    torch.manual_seed(0)
    model = Ours()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_a_model_equals_its_copy_and_its_checkpoint(ours: Ours) -> None:
    x = torch.randn(5, 4)
    assert cs.verify(ours, copy.deepcopy(ours), x)
    assert cs.verify(ours, ours.state_dict(), {"x": x}).ok


def test_the_first_module_that_differs_is_named_with_its_parameters(ours: Ours) -> None:
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.norm.weight.mul_(2)
    found = cs.verify(ours, other, torch.randn(5, 4))
    assert not found
    assert found.parting is not None
    assert found.parting.module == found.parting.other == "norm"
    assert found.parting.parameters == ("norm.weight", "norm.bias")
    assert "part at norm" in str(found)


def test_models_that_are_built_differently_are_aligned_by_what_they_give(ours: Ours) -> None:
    theirs = Theirs()
    plan = cs.plan(ours, RENAME)
    plan.load_into(theirs)
    assert cs.verify(ours, theirs, torch.randn(5, 4)).ok
    with torch.no_grad():
        theirs.body[0].weight[0].add_(5)
    found = cs.verify(ours, theirs, torch.randn(5, 4), plan=plan)
    assert found.parting is not None
    assert (found.parting.module, found.parting.other) == ("fc1", "body.0")
    assert found.parting.rules["body.0.weight"] == RENAME[0]


def test_modes_hooks_gradients_and_random_states_are_as_before(ours: Ours) -> None:
    ours.train()
    ours.norm.eval()
    state = torch.random.get_rng_state()
    cs.verify(ours, copy.deepcopy(ours), torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    assert ours.training and ours.drop.training and not ours.norm.training
    assert not any(m._forward_hooks for m in ours.modules())
    assert all(p.grad is None for p in ours.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_hooks_are_gone_after_a_failure_too(ours: Ours) -> None:
    with pytest.raises(cs.LoadError, match="forward-failed"):
        cs.verify(ours, ours, torch.randn(5, 7))
    assert not any(m._forward_hooks for m in ours.modules())


@pytest.mark.parametrize(("dtype", "gap", "equal"), [(torch.float32, 1e-3, False), (torch.bfloat16, 1e-3, True)])
def test_the_tolerance_follows_the_dtype(dtype: torch.dtype, gap: float, equal: bool) -> None:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.load_state_dict({k: v * (1 + gap) for k, v in a.state_dict().items()})
    x = torch.randn(3, 4)
    assert cs.verify(a.to(dtype), b.to(dtype), x.to(dtype)).ok is equal


def test_infinities_of_a_mask_are_no_difference() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(x > 0, float("-inf"))

    assert cs.verify(Masked(), Masked(), torch.tensor([1.0, -1.0])).ok


def test_two_live_models_are_matched_in_the_order_of_use_and_tried(ours: Ours) -> None:
    class Plain(nn.Module):
        """Equal layers, defined in the wrong order under names that say nothing."""

        def __init__(self, order: str) -> None:
            super().__init__()
            for name in order:
                self.add_module(name, nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in self.use:
                x = torch.tanh(getattr(self, name)(x))
            return x

    a, b = Plain("rst"), Plain("xyz")
    a.use, b.use = "srt", "zxy"
    found = cs.suggest(a, b, inputs=torch.randn(2, 4))
    assert found.parity is not None and found.parity.ok
    assert not cs.verify(a, b, torch.randn(2, 4)).ok
