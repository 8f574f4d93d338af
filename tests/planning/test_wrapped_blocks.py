"""Blocks that are wrapped one by one, on either side, meet a recipe that knows nothing of wrappers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ckptsurgery as cs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 4), nn.Linear(4, 2)


class Net(nn.Module):
    def __init__(self, wrap: str = "", name: str = "layers") -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 2)
        blocks = [Block() for _ in range(3)]
        for n in {"": (), "some": (1,)}.get(wrap, range(3)):
            blocks[n] = wrapped(wrap, blocks[n])
        self.add_module(name, nn.ModuleList(blocks))


def wrapped(how: str, block: nn.Module) -> nn.Module:
    if how == "both":
        return torch.compile(checkpoint_wrapper(block))
    if how == "checkpoint":
        return checkpoint_wrapper(block)
    if how == "module":  # as data parallel wrappers name what they hold
        outer = nn.Module()
        outer.add_module("module", block)
        return outer
    return torch.compile(block)


RECIPE = cs.Recipe(
    ["h.{i}.fc_in.{l} -> layers.{i}.up.{l}", "h.{i}.fc_out.{l} [...] -> layers.{i}.down.{l} [...]"], rest="keep"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
WRAPS = ("", "compile", "checkpoint", "both", "module", "some")


def source(wrap: str, prefix: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    names = ((".up.", ".fc_in."), (".down.", ".fc_out."))
    found = {}
    for key, value in Net(wrap, "h").state_dict().items():
        for old, new in names:
            key = key.replace(old, new)
        found[prefix + key] = value
    return found


def bare(state: dict[str, Tensor]) -> list[Tensor]:
    return list(state.values())


@pytest.mark.parametrize("theirs, mine", list(product(WRAPS, WRAPS)))
def test_a_recipe_is_for_the_names_without_wrappers(theirs: str, mine: str) -> None:
    prefix = "model." if (len(theirs) + len(mine)) % 2 else ""
    state = source(theirs, prefix)
    model = Net(mine)
    report = cs.load_into(model, state, RECIPE)
    assert report.coverage == 1
    pairs = zip(model.state_dict().values(), state.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    said = [w.headline for w in report.warnings if w.code == "wrapper-prefix" and w.headline.startswith("wrapper")]
    assert len(said) == (theirs not in ("", "checkpoint") or mine not in ("", "checkpoint"))
    plan = cs.plan(state, RECIPE, target=Net(mine))
    made = plan.state_dict()
    assert made.keys() == model.state_dict().keys()
    back = plan.inverse(made).state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[k], v) for k, v in state.items())


def test_ties_of_the_recipe_reach_wrapped_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.compile(nn.Embedding(5, 2))
            self.head = torch.compile(nn.Linear(2, 5, bias=False))
            self.head._orig_mod.weight = self.embed._orig_mod.weight

    weight = torch.arange(10.0).reshape(5, 2)
    recipe = cs.Recipe(["e.w -> embed.weight"], tie={"head.weight": "embed.weight"})
    plan = cs.plan({"e.w": weight}, recipe, target=Tied())
    assert set(plan.state_dict()) == {"embed._orig_mod.weight", "head._orig_mod.weight"}
    model = Tied()
    cs.load_into(model, {"e.w": weight}, recipe)
    assert torch.equal(model.head._orig_mod.weight, weight)


def test_what_matches_nothing_without_wrappers_either_is_the_error_of_the_names_as_they_are() -> None:
    with pytest.raises(cs.PlanError) as error:
        cs.load_into(Net("compile"), source("compile", ""), ["blocks.{i}.{l...} -> layers.{i}.{l...}"])
    assert "unused-rule" in {d.code for d in error.value.diagnostics}


@pytest.mark.parametrize("init, keep", [({"a": "zeros", "b": "ones"}, ()), ({"a": "zeros"}, ["b"])])
def test_one_tensor_under_two_names_is_not_asked_for_two_things(init: dict[str, str], keep: list[str]) -> None:
    model = nn.Module()
    model.x, model.a = nn.Linear(2, 2), nn.Linear(3, 3)
    model.b = model.a
    before = model.a.weight.clone()
    state = {"x.weight": torch.ones(2, 2), "x.bias": torch.ones(2)}
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, state, init=init, keep=keep)
    assert {d.code for d in error.value.diagnostics} == {"init-twice"}
    assert torch.equal(model.a.weight, before)
    cs.load_into(model, state, init=dict.fromkeys("ab", "zeros"))
    assert not model.b.weight.any()


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_plan_has_the_names_under_which_a_model_is_saved(wrap: str) -> None:
    model, other = Net(wrap), Net(wrap)
    plan = cs.plan(source("", ""), RECIPE, target=model)
    assert list(plan.state_dict()) == list(model.state_dict()) == list(plan.specs)
    report = plan.load_into(model)
    assert report.coverage == 1
    cs.load_into(other, source("", ""), RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
