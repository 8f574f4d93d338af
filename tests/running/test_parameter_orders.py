"""Which parameter a number of an optimizer is: the order of a model's parameters is not that of a file's keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ckptsurgery as cs


def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    for n, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def sorted_like_a_file(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(sorted(model.state_dict().items()))


def decayed(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, of which each has the order of the model."""
    parts = list(model.parameters())
    return torch.optim.AdamW([{"params": [p for p in parts if p.ndim == n]} for n in (2, 1)])


@pytest.mark.parametrize("optimizer", [decayed, lambda model: torch.optim.AdamW(model.parameters())])
def test_sorted_keys_do_not_tell_the_order_of_parameters(optimizer: Any) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("q", "k", "v", "o", "gate")})
    model["norm"] = nn.RMSNorm(4)
    made = optimizer(model)
    source = run(model, made)
    names = {id(p): name for name, p in model.named_parameters()}
    keys = [names[id(p)] for group in made.param_groups for p in group["params"]]
    wanted = {key: state["exp_avg"] for key, state in zip(keys, source["optimizer"]["state"].values())}
    lost = {**source, "model": sorted_like_a_file(model)}
    plan = cs.plan(lost, ["{k...} -> x.{k...}"], subtree="model")
    with pytest.raises(cs.PlanError, match="the model's keys are sorted"):
        plan.carried("optimizer")
    with pytest.raises(cs.PlanError, match="the output's keys are sorted"):
        plan.carried({"optimizer": keys})
    target = nn.ModuleDict({"x": model})
    plan = cs.plan(lost, ["{k...} -> x.{k...}"], target, subtree="model")
    state = plan.carried({"optimizer": keys})["optimizer"]
    order = [names[id(p)] for group in optimizer(target).param_groups for p in group["params"]]
    for key, number in zip(order, (n for group in state["param_groups"] for n in group["params"])):
        assert torch.equal(state["state"][number]["exp_avg"], wanted[key]), key


@pytest.mark.parametrize("kind", ["NAdam", "ASGD", "Adagrad", "RMSprop"])
def test_scalars_beside_a_moment_are_counters(kind: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in ("q", "k")})
    by_shape = [{"params": [p for p in model.parameters() if p.ndim == n]} for n in (2, 1)]
    source = run(model, getattr(torch.optim, kind)(by_shape))
    q, k, *_ = source["optimizer"]["state"].values()
    plan = cs.plan(source, "{p:q,k}.{l} [d ...] -> qk.{l} [(p d) ...]", subtree="model")
    made = plan.carried("optimizer")["optimizer"]["state"][0]
    for name, value in q.items():
        wanted = torch.cat([value, k[name]]) if value.ndim else value
        assert torch.equal(made[name], wanted), name
