"""Optimizer state that is not what torch writes for these parameters is refused by what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ckptsurgery as cs

FUSE = cs.Recipe(["{p:q,k}.{l} [d ...] -> qk.{l} [(p d) ...]"])


def trained(kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, Any]:
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in ("q", "k")})
    optimizer = kind(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def mangled(change: Callable[[dict[Any, Any], list[dict[str, Any]]], object]) -> dict[str, Any]:
    source = trained()
    change(source["optimizer"]["state"], source["optimizer"]["param_groups"])
    return source


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state, groups: state.update({9: state[0]}), "state for 9, which is in no group"),
        (lambda state, groups: state[0].update(exp_avg=torch.ones(3, 3)), "shape"),
        (lambda state, groups: state[0].pop("exp_avg"), "'q.weight' has no 'exp_avg', and 'k.weight' has"),
        (lambda state, groups: groups.append({"lr": 1}), "not as torch writes them"),
        (lambda state, groups: state.update({0: 3}), "not as torch writes them"),
        (lambda state, groups: state[0].update(exp_avg=torch.ones(4, 6, dtype=torch.int8)), "holds I8 codes"),
        (lambda state, groups: groups[0].update(params=[0, 1, 2]), "state for 3, which is in no group"),
    ],
)
def test_the_refusal_says_what_is_wrong(change: Callable[..., object], text: str) -> None:
    with pytest.raises(cs.PlanError) as caught:
        cs.plan(mangled(change), FUSE, subtree="model").carried(["optimizer"])
    assert {d.code for d in caught.value.diagnostics} <= {"carry-unknown", "carry-lost"} and text in str(caught.value)


def test_keys_by_name_must_have_the_shapes_of_the_state() -> None:
    with pytest.raises(cs.PlanError, match=r"its state 0 has shape \[4, 6\], and 'q.bias' is F32 \[4\]"):
        cs.plan(trained(), FUSE, subtree="model").carried({"optimizer": ["q.bias", "q.weight", "k.weight", "k.bias"]})
    swapped = cs.plan(trained(), FUSE, subtree="model").carried(
        {"optimizer": ["k.weight", "q.bias", "q.weight", "k.bias"]}
    )
    assert swapped["optimizer"]["param_groups"][0]["params"] == [0, 1]


def test_two_parameters_of_one_tensor_are_refused() -> None:
    shared = torch.ones(4, 6)
    source = trained() | {
        "model": {"q.weight": shared, "q.bias": torch.ones(4), "k.weight": shared, "k.bias": torch.ones(4)}
    }
    with pytest.raises(cs.PlanError) as caught:
        cs.plan(source, cs.Recipe(rest="keep", drop=["q.bias"]), subtree="model").carried(
            {"optimizer": ["q.weight", "q.bias", "k.weight", "k.bias"]}
        )
    assert "two of its parameters are one tensor of the model" in str(caught.value)


def test_a_list_of_averages_must_have_the_shapes_of_the_parameters() -> None:
    source = trained()
    source["ema"] = [torch.ones(2, 2) for _ in range(4)]
    with pytest.raises(cs.PlanError) as caught:
        cs.plan(source, FUSE, subtree="model").carried(["ema"])
    assert "it lists tensors, and their shapes are not those of the parameters, in order" in str(caught.value)
