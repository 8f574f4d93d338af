"""A `repr` is short whatever it stands for, and texts grow with the rules, not with the keys."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.comparing.numbers import Difference
from ckptsurgery.inference.assumptions import Assumption
from ckptsurgery.inference.matches import Candidate, Question
from ckptsurgery.inference.parity import OutputDifference as Apart
from ckptsurgery.inference.parity import Parting
from ckptsurgery.modeling.statistics import Stats, TensorStats
from ckptsurgery.planning.report import ReportEntry
from ckptsurgery.reporting.inspecting import inspection
from ckptsurgery.reporting.model_summary import ModelSummary
from ckptsurgery.reporting.model_table import ModuleRow
from ckptsurgery.specs import Tie

MANY = 100_000
NAME = "a.very.long.prefix" * 200
SPEC = cs.TensorSpec([1, 2], "F32")


@cache
def keys() -> tuple[str, ...]:
    """Half of them fold, and half have numbers with gaps, whose runs are as many as they are."""
    return tuple(f"a.long.prefix.{2 * i}.w" if i % 2 else f"layers.{i // 64}.experts.{i % 64}.w" for i in range(MANY))


@cache
def plan() -> cs.Plan:
    recipe = cs.Recipe(["{k...}.w -> {k...}.v"], tie={f"{NAME}.tied.v": "layers.0.experts.0.v"})
    return cs.plan(dict.fromkeys(keys(), SPEC), recipe)


@cache
def gathered() -> cs.Plan:
    """One step that reads very many keys."""
    source = {f"x.{i}": SPEC for i in range(MANY // 20)} | {f"{NAME}.{3 * i}": SPEC for i in range(100)}
    return cs.plan(source, cs.Recipe(["x.{e} [o i] -> x [e o i]"], drop=[NAME + ".{i}"]))


def report() -> cs.Report:
    return cs.Report(tuple(ReportEntry(key, "dropped", SPEC, (key,), NAME) for key in keys()), NAME, NAME)


def difference() -> cs.Diff:
    some = keys()[: MANY // 4]
    pairs = dict.fromkeys(some, (SPEC, SPEC))
    values = {key: Difference(2, 1, max_abs=float(n + 1)) for n, key in enumerate(some)}
    only = dict.fromkeys(keys(), SPEC)
    return cs.Diff(NAME, NAME, MANY, only, only, pairs, pairs, values, (keys(),), (keys(),))


def suggestion() -> cs.Suggestion:
    candidates = (Candidate(keys(), 1.0, {}),)
    assumed = (Assumption("rows", NAME, keys()),)
    return cs.Suggestion(recipe(), 0.5, (Question(NAME, candidates),) * MANY, assumed, keys(), keys())


@cache
def recipe() -> cs.Recipe:
    rules = cs.Recipe([f"{NAME}.{i} -> {NAME}.{i}" for i in range(4)]).rules
    return cs.Recipe(rules * 100, drop=[NAME] * 1000)


def parity() -> cs.Parity:
    apart = Apart(1.0, 1.0, 0.1, ((1,), (1,)))
    return cs.Parity((apart,) * MANY, MANY, Parting(NAME, NAME, apart, keys(), dict.fromkeys(keys(), NAME)))


def selection() -> cs.Selection:
    model = torch.nn.ParameterDict({f"p{7 * i}": torch.zeros(1) for i in range(3000)})
    return cs.select(model)


def counted(function: Callable[[], str]) -> tuple[str, int]:
    """Return what a function returns, and how many calls it took."""
    events: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, argument: events.update([event]))
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return result, events["call"] + events["c_call"]


EVERYTHING: dict[str, Callable[[], Any]] = {
    "Plan": plan,
    "Plan of one large step": gathered,
    "Explanation": lambda: gathered().explain("x"),
    "Report": report,
    "Diff": difference,
    "Checkpoint": lambda: cs.open(dict.fromkeys(keys(), SPEC)),
    "Inspection": lambda: inspection(cs.open(dict.fromkeys(keys(), SPEC))),
    "Recipe": recipe,
    "Rule": lambda: recipe().rules[0],
    "Suggestion": suggestion,
    "Assumption": lambda: suggestion().assumptions[0],
    "Question": lambda: suggestion().ambiguous[0],
    "Parity": parity,
    "Parting": lambda: parity().parting,
    "Diagnosis": lambda: cs.Diagnosis(NAME, (cs.Diagnostic("x", NAME),) * MANY, MANY, MANY),
    "Selection": selection,
    "Tie": lambda: Tie(keys(), "alias"),
    "Stats": lambda: Stats((TensorStats(NAME, SPEC, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0),) * MANY),
    "ModelSummary": lambda: ModelSummary((ModuleRow(NAME, "Linear", 1, (), 1, 1, 1, False),) * MANY, 1, 1, 1, 1),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_repr_is_short_and_cheap_whatever_it_stands_for(name: str) -> None:
    one = EVERYTHING[name]()
    text, calls = counted(partial(repr, one))
    assert calls < 10 * MANY
    assert len(text) < 2000 and "\n" not in text
    assert type(one).__name__.removeprefix("Runnable") in text


@pytest.mark.parametrize("name", ["Plan", "Plan of one large step", "Explanation", "Report", "Diff"])
def test_a_text_grows_with_the_rules_and_not_with_the_keys(name: str) -> None:
    assert len(str(EVERYTHING[name]())) < 50_000


def test_a_repr_says_what_matters_most() -> None:
    tensors = {f"h.{i}.{k}": torch.ones(2, 3) for i in range(2) for k in "ab"} | {"mask": torch.ones(1)}
    recipe = cs.Recipe(["h.{i}.a [x y] -> h.{i}.a [y x]", "h.{i}.b -> h.{i}.b"], drop=["mask"], tie={"t": "h.0.b"})
    assert repr(cs.plan(tensors, recipe)) == (
        "<Plan 5 source keys -> 5 target keys: 2 copy, 2 move, 1 key dropped, 1 key tied>"
    )
    assert repr(recipe) == (
        "<Recipe 2 rules: 1 drop, 1 tie, rest error, 'h.{i}.a [x y] -> h.{i}.a [y x]', 'h.{i}.b -> h.{i}.b'>"
    )
    found = cs.diff(tensors, tensors | {"mask": torch.zeros(1), "new": torch.ones(1)})
    assert repr(found) == "<Diff state_dict and state_dict: 1 in b alone, 1 of other values>"
    assert repr(cs.doctor(tensors)).startswith("<Diagnosis state_dict: 5 tensors, ")
