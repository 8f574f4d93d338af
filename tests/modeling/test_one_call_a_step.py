"""Each step of a chapter on parameters is one call that says what it means."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ckptsurgery as cs


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def test_a_layer_without_parameters_has_none() -> None:
    model = net()
    assert cs.select(model, 1).names == () == cs.select(model, model[1]).names
    with pytest.raises(cs.LoadError, match="nothing-selected"):
        cs.select(model, "1")  # a word may be mistaken
    with pytest.raises(cs.LoadError, match="nothing-selected"):
        cs.select(model, nn.ReLU())  # and so may a module of another model


def test_xavier_on_a_layer_means_its_matrices() -> None:
    model = net()
    bias = model[0].bias.clone()
    chosen = cs.select(model, 0).init_("xavier_uniform")
    assert torch.equal(model[0].bias, bias)
    assert "xavier_uniform is for matrices; left as they are: 0.bias" in repr(chosen)
    cs.select(model, 0).assert_drawn("xavier_uniform")
    assert cs.select(model, 0).promised("xavier_uniform").keys() == {"0.weight"}
    weight = model[0].weight.clone()
    cs.select(model, "0.weight").init_("xavier_uniform")
    assert torch.equal(model[0].weight, weight)  # the same numbers, however it is selected
    with pytest.raises(cs.LoadError, match="cannot-initialise"):
        cs.select(model, "0.bias").init_("xavier_uniform")
    assert "note" not in repr(cs.select(model, 0).init_("zeros"))


def test_recurse_and_duplicates_are_those_of_named_parameters() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(2))
    model.a = nn.Linear(2, 2)
    model.b = model.a
    for recurse in (True, False):
        assert cs.select(model, recurse=recurse).names == tuple(
            name for name, _ in model.named_parameters(recurse=recurse, remove_duplicate=False)
        )
    assert cs.select(model, remove_duplicate=True).names == tuple(name for name, _ in model.named_parameters())


def test_a_selection_prints_a_table() -> None:
    model = net()
    cs.select(model, "2").freeze()
    assert str(cs.select(model)).splitlines() == [
        "name      shape   dtype  numbers  trainable",
        "0.weight  [8, 4]  F32    32       yes",
        "0.bias    [8]     F32    8        yes",
        "2.weight  [1, 8]  F32    8        no",
        "2.bias    [1]     F32    1        no",
    ]


def test_keys_complete() -> None:
    assert cs.open({"a.w": torch.ones(2)})._ipython_key_completions_() == ["a.w"]
