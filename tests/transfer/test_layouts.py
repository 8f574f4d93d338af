"""Paddle's files in a model of torch: a layout that no shape tells is told, and never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ckptsurgery as cs


def network() -> nn.ModuleDict:
    return nn.ModuleDict({"fc": nn.Linear(4, 4), "bn": nn.LayerNorm(3)})


DROPPED = ("bn._mean", "bn._variance")


@pytest.fixture(params=["nested.pdparams", "bf16.pdparams"])
def file(request: pytest.FixtureRequest, repository: Path) -> Path:
    return repository / "tests" / "data" / "paddle" / request.param


def test_a_square_linear_of_paddles_does_not_load_as_it_is(file: Path) -> None:
    model = network()
    before = model["fc"].weight.detach().clone()
    with pytest.raises(cs.LoadError) as caught:
        cs.load_into(model, file, drop=DROPPED)
    (told,) = caught.value.diagnostics
    assert told.code == "paddle-layout" and told.notes == ("fc.weight",)
    assert torch.equal(model["fc"].weight, before)


def test_the_help_is_a_recipe_that_loads_it_transposed(file: Path) -> None:
    model = network()
    with pytest.raises(cs.LoadError) as caught:
        cs.load_into(model, file, drop=DROPPED)
    help = caught.value.diagnostics[0].help
    assert help is not None
    recipe = eval(help.removeprefix("recipe="), {"cs": cs, "nn": nn, "model": model})
    cs.load_into(model, file, recipe, drop=DROPPED)
    stored = cs.open(file)["fc.weight"].load().float()
    assert torch.equal(model["fc"].weight, stored.T) and not torch.equal(stored, stored.T)


def test_whoever_says_so_gets_it_as_it_is(file: Path) -> None:
    model = network()
    cs.load_into(model, file, cs.Recipe(rest="keep"), drop=DROPPED)
    assert torch.equal(model["fc"].weight, cs.open(file)["fc.weight"].load().float())


def test_what_holds_no_linear_loads_as_it_is(file: Path) -> None:
    model = nn.ModuleDict({"bn": nn.LayerNorm(3)})
    assert cs.load_into(model, file, drop=[*DROPPED, "fc"]).coverage == 1
    with pytest.raises(cs.LoadError, match="shape-mismatch") as caught:  # where a shape tells, it is the shape
        cs.load_into(nn.ModuleDict({"fc": nn.Linear(4, 3)}), file, drop="bn")
    assert "paddle-layout" not in {d.code for d in caught.value.diagnostics}
