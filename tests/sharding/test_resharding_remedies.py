"""What an exchange between models refuses is mended by the line that it offers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ckptsurgery as cs


def model(**layers: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, layer in layers.items():
        made.add_module(name, layer)
    return made


def refused(source: nn.Module, target: nn.Module, recipe: cs.Recipe, code: str) -> cs.Diagnostic:
    with pytest.raises(cs.PlanError) as error:
        cs.reshard(source, target, recipe)
    (found,) = error.value.diagnostics
    assert found.code == code
    return found


def test_first_values_are_left_as_they_are() -> None:
    source, target = model(a=nn.Linear(2, 2)), model(x=nn.Linear(2, 2), head=nn.Linear(2, 3))
    before = target.head.weight.clone()
    recipe = cs.Recipe(["a.{l} -> x.{l}"], init={"head.{l}": "zeros"})
    found = refused(source, target, recipe, "first-values")
    (remedy,) = found.remedies
    assert remedy.value == {"head.weight": "own()", "head.bias": "own()"}
    cs.reshard(source, target, recipe.replace(init=remedy.value))()
    assert torch.equal(target.head.weight, before) and torch.equal(target.x.weight, source.a.weight)


def test_tensors_apart_for_a_tied_target_are_reduced_to_one() -> None:
    shared = nn.Linear(2, 2, bias=False)
    source, target = model(a=nn.Linear(2, 2, bias=False), b=nn.Linear(2, 2, bias=False)), model(a=shared, b=shared)
    (remedy,) = refused(source, target, cs.Recipe(rest="keep"), "tied-apart").remedies
    cs.reshard(source, target, cs.Recipe(rest="keep", drop=remedy.value))()
    assert torch.equal(target.b.weight, source.a.weight)
    named = refused(source, target, cs.Recipe(["a.{l} -> a.{l}", "b.{l} -> b.{l}"]), "tied-apart")
    assert not named.remedies and "by no rule" in named.help
