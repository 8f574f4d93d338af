"""Heads that a load initialises anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ckptsurgery as cs


def network(classes: int) -> nn.ModuleDict:
    return nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, classes)})


def test_a_head_is_initialised_by_the_last_parts_of_its_names() -> None:
    model, source = network(5), network(3)
    report = cs.load_into(model, source, init={"head": {"weight": "xavier_uniform", "bias": "constant(2)"}})
    assert report.initialised == ("head.weight", "head.bias")
    assert torch.equal(model["head"].bias, torch.full((5,), 2.0))
    assert torch.equal(model["body"].weight, source["body"].weight)
    cs.select(model, "head.weight").assert_drawn("xavier_uniform")


def test_a_part_that_is_left_out_is_told_once() -> None:
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(network(5), network(3), init={"head": {"weight": "xavier_uniform"}})
    assert [d.code for d in error.value.diagnostics] == ["not-initialised"]
