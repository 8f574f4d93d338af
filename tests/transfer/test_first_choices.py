"""`init=` of a load means what `init_` means: a formula of fans the matrices, and no bias where none was built."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ckptsurgery as cs

SOURCE = {"backbone.weight": torch.ones(4, 8), "backbone.bias": torch.ones(4)}


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"backbone": nn.Linear(8, 4), "head": nn.Linear(4, 3), "mix": nn.Linear(4, 3, bias=False)}
    return nn.ModuleDict(layers)


def test_a_formula_of_fans_for_a_layer_means_its_matrices() -> None:
    model, other = net(), net()
    report = cs.load_into(model, SOURCE, init={"head": "xavier_uniform", "mix": "kaiming_normal"})
    assert report.initialised == ("head.weight", "mix.weight")
    assert report.kept == ("head.bias",)
    assert report.notes == ("xavier_uniform is for matrices; as constructed: head.bias",)
    cs.select(other, "head").init_("xavier_uniform")
    assert torch.equal(model["head"].weight, other["head"].weight)  # the same draw as init_
    assert torch.equal(model["head"].bias, other["head"].bias)


def test_a_meta_layer_gets_the_rest_from_its_own_reset() -> None:
    model = cs.skeleton(net)
    report = cs.load_into(model, SOURCE, init={"head": "xavier_uniform", "mix": "default"})
    assert set(report.initialised) == {"head.weight", "head.bias", "mix.weight"}
    assert not report.kept and not model["head"].bias.is_meta


def test_layers_without_a_bias_pass() -> None:
    rule = {"weight": "normal(std=0.01)", "bias": "zeros"}
    report = cs.load_into(net(), SOURCE, init={"head": rule, "mix": rule})
    assert report.initialised == ("head.weight", "head.bias", "mix.weight")
    with pytest.raises(cs.LoadError, match="no selected name ends in 'gain'"):
        cs.load_into(net(), SOURCE, init={"head": rule, "mix": {"weight": "ones", "gain": "ones"}})


@pytest.mark.parametrize("order", [1, -1])
def test_a_tensor_named_by_itself_goes_before_the_rest_of_its_layer(order: int) -> None:
    named = [("head", "xavier_uniform"), ("head.bias", "constant(3)"), ("mix", "ones")]
    model = net()
    report = cs.load_into(model, SOURCE, init=dict(named[::order]))
    assert not report.kept and not report.notes
    assert model["head"].bias.tolist() == [3, 3, 3]


def test_only_vectors_are_refused_as_before() -> None:
    with pytest.raises(cs.LoadError, match="cannot-initialise"):
        cs.load_into(net(), SOURCE, init={"head.weight": "ones", "head.bias": "xavier_uniform", "mix": "ones"})


@pytest.mark.parametrize("key", [nn.Linear, 2, ("head",)])
def test_types_and_indices_are_for_select(key: object) -> None:
    with pytest.raises(cs.LoadError, match=r"bad-argument.*by path, key or pattern"):
        cs.load_into(net(), SOURCE, init={key: "zeros"})


@pytest.mark.parametrize("what", ["xavier_unifrom", "normal(std=", "uniform(0, 1, 2, 3)", 3, {"weight": "one"}])
def test_an_initialiser_that_is_none_is_told_with_the_other_problems(what: object) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(cs.LoadError) as caught:
        cs.load_into(model, {**SOURCE, "mix.bias": torch.ones(3)}, init={"head": what, "mix": "zeros"})
    codes = {problem.code for problem in caught.value.diagnostics}
    assert codes - {"not-initialised"} in ({"unexpected-keys", "bad-initialiser"}, {"unexpected-keys", "bad-call"})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
