"""A tie is read as a rule is: lists of one name pair by position, and a domain on either side holds for both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ckptsurgery as cs

STATE = {f"{p}.{i}.w": torch.full((2,), 10.0 * "abc".index(p) + i) for i in range(3) for p in "abc"}

# tie -> alias -> the key whose tensor it is
CASES: dict[tuple[str, str], dict[str, str]] = {
    ("g.{i:0,2}", "a.{i}.w"): {"g.0": "a.0.w", "g.2": "a.2.w"},
    ("g.{i}", "a.{i:0,2}.w"): {"g.0": "a.0.w", "g.2": "a.2.w"},
    ("g.{i:1..2}", "a.{i}.w"): {"g.1": "a.1.w", "g.2": "a.2.w"},
    ("g.{i:5,6}", "a.{i:1,2}.w"): {"g.5": "a.1.w", "g.6": "a.2.w"},
    ("g.{i+10}", "a.{i:0,2}.w"): {"g.10": "a.0.w", "g.12": "a.2.w"},
    ("{p:q,k}.{i:0,1}", "{p:b,a}.{i}.w"): {"q.0": "b.0.w", "q.1": "b.1.w", "k.0": "a.0.w", "k.1": "a.1.w"},
    ("{p:q,k}.{p:x,y}", "{p:c,a}.2.w"): {"q.x": "c.2.w", "k.y": "a.2.w"},
}


def recipe(tie: tuple[str, str]) -> cs.Recipe:
    return cs.Recipe(rest="keep", tie=dict([tie]))


def wanted(aliases: dict[str, str]) -> dict[str, Tensor]:
    return STATE | {alias: STATE[key] for alias, key in aliases.items()}


@pytest.mark.parametrize("tie", CASES, ids=" = ".join)
def test_exactly_these_names_are_tied(tie: tuple[str, str]) -> None:
    made = cs.plan(STATE, recipe(tie)).state_dict()
    expected = wanted(CASES[tie])
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], tensor) for key, tensor in expected.items())
    assert all(made[alias] is made[key] for alias, key in CASES[tie].items())


@pytest.mark.parametrize("tie", CASES, ids=" = ".join)
def test_the_way_back_takes_each_alias_for_its_own_tensor(tie: tuple[str, str]) -> None:
    made = cs.plan(STATE, recipe(tie)).state_dict()
    back = cs.plan(made, recipe(tie).inverse()).state_dict()
    assert back.keys() == STATE.keys() and all(torch.equal(back[key], STATE[key]) for key in STATE)
    alias = next(iter(CASES[tie]))
    with pytest.raises(cs.PlanError):  # an alias that holds another tensor is no copy
        cs.plan({**made, alias: made[alias] + 1}, recipe(tie).inverse()).state_dict()


@pytest.mark.parametrize("tie", CASES, ids=" = ".join)
def test_an_exported_function_ties_alike(tie: tuple[str, str]) -> None:
    scope: dict[str, object] = {}
    exec(cs.recipes.to_python(recipe(tie)), scope)
    convert = next(v for k, v in scope.items() if callable(v) and k == "convert")
    made = convert(dict(STATE))
    assert made.keys() == wanted(CASES[tie]).keys()
    assert all(torch.equal(made[key], tensor) for key, tensor in wanted(CASES[tie]).items())


def test_lists_of_unequal_length_are_told() -> None:
    with pytest.raises(cs.CkptSurgeryError) as told:
        cs.plan(STATE, recipe(("{p:q,k,v}.{i}", "{p:a,b}.{i}.w")))
    assert told.value.diagnostics[0].code == "choices-differ"
