"""Tied tensors through a load: either name is enough, both must agree, and the tie holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ckptsurgery as cs


def codes(error: pytest.ExceptionInfo[cs.CkptSurgeryError]) -> set[str]:
    return {d.code for d in error.value.diagnostics}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_one_name_of_a_tie_is_enough_and_the_tie_holds(name: str, assign: bool) -> None:
    model, value = Tied(), torch.randn(6, 4)
    report = cs.load_into(model, {name: value}, assign=assign)
    assert model.head.weight is model.embed.weight and torch.equal(model.embed.weight, value)
    assert len(report.loaded) == len(report.tied) == 1 and not report.missing_keys


def test_both_names_of_a_tie_must_be_equal() -> None:
    value = torch.randn(6, 4)
    model = Tied()
    cs.load_into(model, {"embed.weight": value, "head.weight": value.clone()})
    assert model.head.weight is model.embed.weight and torch.equal(model.embed.weight, value)
    before = model.embed.weight.clone()
    with pytest.raises(cs.CkptSurgeryError) as error:
        cs.load_into(model, {"embed.weight": value, "head.weight": value + 1})
    assert codes(error) == {"tied-values-differ"} and torch.equal(model.embed.weight, before)


@pytest.mark.parametrize("assign", [False, True])
def test_two_parameters_over_one_storage_stay_two_over_one(assign: bool) -> None:
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(4, 3))
    model.b = nn.Parameter(model.a.detach())
    value = torch.randn(4, 3)
    cs.load_into(model, {"a": value, "b": value.clone()}, assign=assign)
    assert model.a is not model.b and model.a.data_ptr() == model.b.data_ptr()
    assert torch.equal(model.a, value)


def test_a_tie_survives_a_meta_model_and_to_empty() -> None:
    with torch.device("meta"):
        model = Tied()
    model.head.weight = model.embed.weight
    value = torch.randn(6, 4)
    cs.load_into(model, {"embed.weight": value}, assign=True)
    assert model.head.weight is model.embed.weight and not model.embed.weight.is_meta


def test_to_init_a_tied_head_is_refused() -> None:
    with pytest.raises(cs.LoadError, match="untie"):
        cs.load_into(Tied(), {"embed.weight": torch.ones(6, 4)}, init="head")
