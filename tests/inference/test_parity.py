"""Two models held against each other: equal, apart, built differently; nothing is left behind."""

from __future__ import annotations

import copy
from pathlib import Path

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


def test_a_checkpoint_is_loaded_as_any_other(ours: Ours, tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    torch.save({"epoch": 3, "model": {f"module.{k}": v for k, v in ours.state_dict().items()}}, tmp_path / "run.pt")
    assert cs.verify(ours, tmp_path / "run.pt", x).ok
    with pytest.raises(cs.CkptSurgeryError):
        cs.verify(ours, {k: v for k, v in ours.state_dict().items() if k != "fc2.bias"}, x)


def test_a_checkpoint_in_another_layout_is_brought_into_this_one_by_a_recipe(ours: Ours) -> None:
    x, back = torch.randn(5, 4), ["{m:body.0,body.1,head}.{l} -> {m:fc1,norm,fc2}.{l}"]
    theirs = cs.plan(ours, RENAME).state_dict()
    before = copy.deepcopy(ours.state_dict())
    assert cs.verify(ours, theirs, x, back).ok
    theirs["body.1.weight"] = theirs["body.1.weight"] * 2
    found = cs.verify(ours, theirs, x, back)
    assert found.parting is not None
    assert (found.parting.module, found.parting.rules["norm.weight"]) == ("norm", back[0])
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    with pytest.raises(cs.LoadError, match="bad-argument"):
        cs.verify(ours, copy.deepcopy(ours), x, back)


class Plain(nn.Module):
    """Equal layers under names that say nothing, used in an order of their own."""

    def __init__(self, order: str, use: str, turned: str = "") -> None:
        super().__init__()
        self.use, self.turned, self.drop = use, turned, nn.Dropout(0.5)
        for name in order:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.use:
            layer = getattr(self, name)
            weight = layer.weight.t() if name in self.turned else layer.weight
            # the layer itself is called, so that its use is seen
            x = self.drop(torch.tanh(layer(x) - x @ layer.weight.t() + x @ weight.t()))
        return x


def test_two_live_models_are_matched_in_the_order_of_use_and_tried(ours: Ours) -> None:
    a, b = Plain("rst", "srt"), Plain("xyz", "zxy")
    assert cs.suggest(a, b).parity is None
    found = cs.suggest(a, b, inputs=torch.randn(2, 4))
    assert found.parity is not None and found.parity.ok
    made = cs.plan(a, found.recipe).state_dict()
    assert all(torch.equal(made[f"{y}.weight"], getattr(a, x).weight) for x, y in zip(a.use, b.use))
    assert not cs.verify(a, b, torch.randn(2, 4)).ok


def test_what_names_leave_open_the_forward_pass_decides() -> None:
    def model(*names: str) -> nn.Module:
        inner = nn.ModuleDict({"norm": nn.LayerNorm(4), **{n: nn.Linear(4, 4) for n in names}})

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for name in names:
                    x = self.inner[name](x).sin()
                return self.inner["norm"](x)

        return Net()

    a, b = model("foo", "baz"), model("tock", "tick")
    specs = [{k: cs.open(m).specs[k] for k in sorted(cs.open(m).specs)} for m in (a, b)]
    unsure = cs.suggest(*specs)
    assert {q.target.split(".")[1] for q in unsure.ambiguous} == {"tick", "tock"}
    assert all(len(q.candidates) == 2 for q in unsure.ambiguous)
    found = cs.suggest(a, b, inputs={"x": torch.randn(3, 4)})
    assert found.coverage == 1.0 and found.parity is not None and found.parity.ok


def test_a_matrix_that_one_model_uses_turned_is_turned() -> None:
    a, b = Plain("rst", "rst"), Plain("rst", "rst", turned="s")
    found = cs.suggest(a, b, inputs=torch.randn(2, 4))
    assert found.parity is not None and found.parity.ok
    assert torch.equal(cs.plan(a, found.recipe).state_dict()["s.weight"], a.get_parameter("s.weight").T)


def test_a_trial_that_fails_says_so() -> None:
    class Shifted(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1.0

    found = cs.suggest(Plain("rst", "rst"), Shifted("rst", "rst"), inputs=torch.randn(2, 4))
    assert found.parity is not None and not found.parity.ok
    assert "# tried: different" in str(found)


def test_a_trial_leaves_nothing_behind() -> None:
    a, b = Plain("rst", "srt").train(), Plain("xyz", "zxy").train()
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    x, wrong = torch.randn(2, 4), torch.randn(2, 7)
    state = torch.random.get_rng_state()
    cs.suggest(a, b, inputs=x)
    with pytest.raises(cs.LoadError, match="the source fails on the inputs"):
        cs.suggest(a, b, inputs=wrong)
    assert torch.equal(state, torch.random.get_rng_state())
    for model, was in zip((a, b), before):
        assert model.training and model.drop.training
        assert not any(m._forward_hooks for m in model.modules())
        assert all(torch.equal(v, was[k]) and v.grad is None for k, v in model.state_dict().items())


def test_the_order_of_use_wants_two_models() -> None:
    with pytest.raises(cs.LoadError, match="two live models"):
        cs.suggest(Plain("r", "r").state_dict(), Plain("r", "r"), inputs=torch.randn(2, 4))
