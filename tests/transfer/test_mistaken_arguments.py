"""Arguments that people pass by mistake: the message names what to pass in their place."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ckptsurgery as cs


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def problem(call: Callable[[], object]) -> cs.Diagnostic:
    with pytest.raises(cs.CkptSurgeryError) as error:
        call()
    return error.value.diagnostics[0]


@pytest.mark.parametrize("model", [{"w": torch.ones(2)}, "model.pt", None])
def test_a_model_and_a_source_in_the_wrong_order(model: Any) -> None:
    found = problem(lambda: cs.load_into(model, net()))
    assert found.code == "not-a-model" and found.help == "the model comes first: load_into(model, source)"


def test_the_class_of_a_model() -> None:
    found = problem(lambda: cs.load_into(nn.Linear, {"w": torch.ones(2)}))  # type: ignore[arg-type]
    assert "the class Linear" in found.headline and "Linear(…)" in str(found.help)


@pytest.mark.parametrize(
    "source, words",
    [
        (torch.optim.SGD(net().parameters()), "pass its .state_dict()"),
        (net().named_parameters(), "pass dict(…) of it"),
        (io.BytesIO(b"PK"), "the state dict that torch.load returns"),
        ([torch.ones(2)], "a path"),
        (None, "a path"),
    ],
)
def test_objects_that_are_not_checkpoints(source: Any, words: str) -> None:
    found = problem(lambda: cs.load_into(net(), source))
    assert found.code == "bad-source" and words in str(found.help)


def test_parameters_that_a_generator_yields_load_as_the_help_names() -> None:
    model = net()
    assert cs.load_into(net(), dict(model.named_parameters())).coverage == 1


def test_an_empty_state_dict() -> None:
    found = problem(lambda: cs.load_into(net(), {}))
    assert found.headline == "nothing of state_dict was loaded: it has no tensors"


@pytest.mark.parametrize("number", [np.float32(2), 2.0])
def test_a_number_in_the_place_of_a_tensor(tmp_path: Path, number: Any) -> None:
    model = nn.Module()
    model.w, model.scale = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor(1.0))
    torch.save({"w": torch.zeros(2), "scale": number}, tmp_path / "model.pt")
    found = problem(lambda: cs.load_into(model, tmp_path / "model.pt"))
    assert ("stored as a number", "scale; torch.tensor(…) makes a tensor of one, before the load") in found.facts
    state = torch.load(tmp_path / "model.pt", weights_only=False)
    cs.load_into(model, state | {"scale": torch.tensor(float(state["scale"]))})
    assert model.scale.item() == 2


@pytest.mark.parametrize(
    "rule, right",
    [
        ("{k...} => model.{k...}", "{k...} -> model.{k...}"),
        ("{k...} → model.{k...}", "{k...} -> model.{k...}"),
        ("{k...} - > model.{k...}", "{k...} -> model.{k...}"),
    ],
)
def test_a_rule_with_another_arrow(rule: str, right: str) -> None:
    found = problem(lambda: cs.plan({"w": torch.ones(2)}, rule))
    assert found.help == f"did you mean {right!r}?"
    assert cs.plan({"w": torch.ones(2)}, right).specs.keys() == {"model.w"}


def test_a_rule_without_an_arrow() -> None:
    assert "a rule is SOURCE -> TARGET" in str(problem(lambda: cs.plan({"w": torch.ones(2)}, "{k...}")).help)


@pytest.mark.parametrize(
    "rule, right, made",
    [
        ("module.* -> *", "module.{a...} -> {a...}", {"h.0.w", "h.1.w"}),
        ("module.h.*.w -> l.*.w", "module.h.{a}.w -> l.{a}.w", {"l.0.w", "l.1.w"}),
    ],
)
def test_stars_that_are_meant_as_captures(rule: str, right: str, made: set[str]) -> None:
    state = {"module.h.0.w": torch.ones(2), "module.h.1.w": torch.zeros(2)}
    found = problem(lambda: cs.plan(state, rule))
    assert found.remedies[0].value == {rule: right}
    assert cs.plan(state, right).specs.keys() == made


@pytest.mark.parametrize("rule", [r"^module\.(.*)$ -> \1", "module.* -> *.*"])
def test_regular_expressions_are_not_rules(rule: str) -> None:
    found = problem(lambda: cs.plan({"module.w": torch.ones(2)}, rule))
    assert "regular expressions are not used" in str(found.help)


def test_a_table_of_names_in_the_place_of_rules() -> None:
    table = {"0.weight": "a.weight", "0.bias": "a.bias"}
    state = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}
    found = problem(lambda: cs.plan(state, table))  # type: ignore[arg-type]
    assert found.help == 'a rule for each entry: [f"{old} -> {new}" for old, new in table.items()]'
    assert cs.plan(state, [f"{old} -> {new}" for old, new in table.items()]).specs.keys() == {"a.weight", "a.bias"}


def test_a_misspelt_device_and_a_seed_as_text() -> None:
    source = net().state_dict()
    assert problem(lambda: cs.load_into(net(), source, device="cudda")).help == "did you mean 'cuda'?"
    found = problem(lambda: cs.load_into(net(), source, seed="0"))  # type: ignore[arg-type]
    assert found.headline == "seed='0' is not an integer"
