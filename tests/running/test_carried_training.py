"""A training that goes on in another layout: the same losses as if it had never been converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs

STEPS, WIDTH = 4, 8


class Apart(nn.Module):
    """Three projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(WIDTH, rows) for name, rows in (("q", 8), ("k", 4), ("v", 4))})
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return mixed(*(part(x) for part in self.parts.values()), self.out)


class Fused(nn.Module):
    """The same projections as one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 16), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return mixed(*self.qkv(x).split([8, 4, 4], -1), self.out)


def mixed(q: Tensor, k: Tensor, v: Tensor, out: nn.Linear) -> Tensor:
    return out(torch.tanh(q[..., :4] * k) + q[..., 4:] * v)


class Rows(nn.Module):
    """Weights stored as [out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Kernel(nn.Module):
    """A layer whose weight is stored as [in, out]."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.kernel, self.offset = nn.Parameter(torch.zeros(inside, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.offset


class Columns(nn.Module):
    """The same network with weights stored as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Kernel(WIDTH, 16), Kernel(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Experts(nn.Module):
    """Experts one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"w": nn.Linear(WIDTH, 4, bias=False)}) for _ in range(3))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([torch.tanh(expert["w"](x)) for expert in self.experts]).sum(0))


class Stacked(nn.Module):
    """The same experts as one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.Parameter(torch.zeros(3, 4, WIDTH)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.einsum("efd,bd->ebf", self.experts, x)).sum(0))


FUSE = cs.Recipe(
    ["parts.{p:q,k,v}.{l} [rows:p ...] -> qkv.{l} [(p rows:p) ...]"],
    dims={"rows": {"q": 8, "k": 4, "v": 4}},
    rest="keep",
)
TURN = cs.Recipe(["{m}.weight [o i] -> {m}.kernel [i o]", "{m}.bias -> {m}.offset"])
STACK = cs.Recipe(["experts.{e}.w.weight [f d] -> experts [e f d]"], rest="keep")
JOBS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], cs.Recipe]] = {
    "fuse": (Apart, Fused, FUSE),
    "split": (Fused, Apart, FUSE.inverse()),
    "transpose": (Rows, Columns, TURN),
    "stack": (Experts, Stacked, STACK),
    "unstack": (Stacked, Experts, STACK.inverse()),
}


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023)."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_(torch.sign(m.lerp(p.grad, 0.1)) * group["lr"])
                m.lerp_(p.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[Iterable[Any]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01, weight_decay=0.1, amsgrad=True),
    "lion": lambda params: Lion(params, 0.05),
}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    losses = []
    for step in range(first, first + STEPS):
        x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = (model(x).squeeze(-1) - x.sin().sum(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("job", JOBS)
def test_the_losses_are_those_of_the_uninterrupted_training(job: str, optimizer: str, tmp_path: Path) -> None:
    old, new, recipe = JOBS[job]
    torch.manual_seed(0)
    model = old()
    made = OPTIMIZERS[optimizer](model.parameters())
    trained(model, made, 0)
    run = {"model": model.state_dict(), "optimizer": made.state_dict(), "epoch": 1}
    torch.save(run, tmp_path / "run.pt")
    losses = trained(model, made, STEPS)

    other = new()
    plan = cs.plan(tmp_path / "run.pt", recipe, target=other)
    with pytest.raises(cs.PlanError, match="optimizer belongs to tensors that the plan changes"):
        plan.save(tmp_path / "new.pt")
    plan.save(tmp_path / "new.pt", carry=["optimizer"], check=True)
    again = torch.load(tmp_path / "new.pt")
    assert again["epoch"] == 1
    other.load_state_dict(again["model"])
    resumed = OPTIMIZERS[optimizer](other.parameters())
    resumed.load_state_dict(again["optimizer"])
    assert trained(other, resumed, STEPS) == pytest.approx(losses, abs=1e-6, rel=1e-6)

    fresh = new()
    fresh.load_state_dict(again["model"])
    stale = trained(fresh, OPTIMIZERS[optimizer](fresh.parameters()), STEPS)
    assert stale != pytest.approx(losses, abs=1e-5, rel=1e-5)  # the state matters here


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("job", JOBS)
def test_an_inverse_brings_the_state_back_bit_for_bit(job: str, optimizer: str, tmp_path: Path) -> None:
    old, new, recipe = JOBS[job]
    model = old()
    made = OPTIMIZERS[optimizer](model.parameters())
    trained(model, made, 0)
    run = {"model": model.state_dict(), "optimizer": made.state_dict()}
    there = cs.plan(run, recipe, target=new())
    there.save(tmp_path / "there.pt", carry=["optimizer"])
    cs.plan(tmp_path / "there.pt", recipe.inverse(), target=model).save(tmp_path / "back.pt", carry=["optimizer"])
    back = torch.load(tmp_path / "back.pt")["optimizer"]
    assert back["param_groups"] == run["optimizer"]["param_groups"]
    assert back["state"].keys() == run["optimizer"]["state"].keys()
    for number, state in run["optimizer"]["state"].items():
        assert all(torch.equal(back["state"][number][name], state[name]) for name in state)
