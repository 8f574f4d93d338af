"""Initialisers by the last part of a name; and tensors that are, or are not, what an initialiser promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckptsurgery.errors import LoadError
from ckptsurgery.modeling.initialising import initialise
from ckptsurgery.modeling.selection import Selection, select


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.LayerNorm(10))


def test_by_the_last_part_of_the_name_is_each_part_by_itself() -> None:
    one, two = network(), network()
    select(one, nn.Linear).init_({"weight": "xavier_uniform", "bias": "zeros"}, seed=3)
    select(two, "0.weight", "2.weight").init_("xavier_uniform", seed=3)
    select(two, "0.bias", "2.bias").init_("zeros")
    assert all(torch.equal(a, b) for a, b in zip(select(one, nn.Linear).values(), select(two, nn.Linear).values()))


def test_parts_of_names_serve_below_paths_as_well() -> None:
    one, two = network(), network()
    initialise(one, {"0": {"weight": "orthogonal", "bias": "zeros"}, "2": "default"})
    initialise(two, {"0.weight": "orthogonal", "0.bias": "zeros", "2": "default"})
    assert all(torch.equal(one.state_dict()[k], two.state_dict()[k]) for k in ("0.weight", "0.bias", "2.weight"))


def test_every_selected_name_must_be_meant_and_every_part_must_mean_one() -> None:
    model = network()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with pytest.raises(LoadError) as caught:
        select(model, nn.Linear).init_({"weight": "ones", "gain": "ones"})
    found = {d.code: d for d in caught.value.diagnostics}
    assert found["not-initialised"].notes == ("{0,2}.bias",)
    assert found["not-initialised"].help == 'add "bias": "zeros", or select less'
    assert "'gain'" in found["nothing-selected"].headline
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    assert Selection(model, ()).init_({"weight": "ones"}).names == ()


def test_what_was_drawn_is_as_promised_and_nothing_else_is() -> None:
    weights = select(network(), "0.weight", "2.weight")
    for text in ("xavier_uniform", "kaiming_normal(nonlinearity=relu)", "orthogonal", "sparse(0.5)", "constant(2)"):
        assert weights.init_(text).assert_drawn(text) is weights
        with pytest.raises(LoadError, match="promised: mean 3") as caught:
            weights.assert_drawn("normal(mean=3, std=0.1)")
        assert [d.code for d in caught.value.diagnostics] == ["not-as-drawn"] * 2
    with pytest.raises(LoadError, match=r"'0.weight' has mean 2, std 0, within \[2, 2\]"):
        weights.assert_drawn("xavier_normal")


def test_what_lies_out_of_bounds_or_is_not_finite_was_not_drawn() -> None:
    sel = select(nn.Linear(100, 100), "weight").init_("uniform(a=-1, b=1)").assert_drawn("uniform(a=-1, b=1)")
    for value in (1.5, float("nan")):
        sel.init_("uniform(a=-1, b=1)").assign_("weight", value, index=(3, 4))
        with pytest.raises(LoadError, match="not-as-drawn"):
            sel.assert_drawn("uniform(a=-1, b=1)")


def test_promises_by_the_last_part_of_the_name() -> None:
    sel = select(network(), nn.Linear)
    rules = {"weight": "xavier_normal", "bias": "zeros"}
    assert sel.init_(rules).assert_drawn(rules) == sel
    assert sel.promised(rules)["2.bias"].std == 0


def test_nothing_can_be_said_of_what_makes_no_promise() -> None:
    model = network()
    with pytest.raises(LoadError, match="default says nothing of the mean and the std"):
        select(model, "0").promised("default")
    with pytest.raises(LoadError, match=r"'0\.bias': xavier_normal needs at least 2 dimensions"):
        select(model, "0.bias").promised("xavier_normal")
    with pytest.raises(LoadError, match="2 tensors are meta"):
        select(model.to("meta"), "0").assert_drawn("ones")
