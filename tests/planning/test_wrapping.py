"""A recipe for a model's own names meets files and models with wrapper prefixes: they are taken off, and it is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs


class Net(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4, 3, bias=False)
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)])
        self.fc = nn.Linear(4, 2)


def state(prefix: str = "") -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {prefix + k: v for k, v in Net().state_dict().items()}


ADAPT = cs.Recipe(["conv1.weight -> conv1.weight | adapt_input_conv(1)"], rest="keep")


def fits(found: dict[str, Tensor], prefix: str = "") -> bool:
    wanted = state()
    wanted["conv1.weight"] = wanted["conv1.weight"].sum(1, keepdim=True)  # of all three input channels
    return found.keys() == {prefix + k for k in wanted} and all(
        torch.allclose(found[prefix + k], v) for k, v in wanted.items()
    )


@pytest.mark.parametrize("prefix", ["", "model.", "net.", "model.net.", "module._orig_mod."])
def test_the_rule_that_an_error_offers_works_under_a_prefix(prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": state(prefix), "pytorch-lightning_version": "2.5", "epoch": 3}, file)
    with pytest.raises(cs.LoadError, match=r"conv1.weight -> conv1.weight \| adapt_input_conv\(1\)"):
        cs.load_into(Net(1), file)
    model = Net(1)
    report = cs.load_into(model, file, ADAPT)
    assert fits(model.state_dict()) and report.coverage == 1
    said = [w.headline for w in report.warnings if w.code == "wrapper-prefix"]
    assert [prefix in text for text in said] == [True] * bool(prefix)
    plan = cs.plan(file, ADAPT, target=Net(1))
    assert fits(plan.state_dict()) and (repr(prefix) in str(plan)) is bool(prefix)
    back = plan.source
    assert set(back) == set(state(prefix))


@pytest.mark.parametrize("around", ["module", "_orig_mod"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_wrapped_model_takes_what_a_recipe_makes_for_the_bare_one(around: str, prefix: str) -> None:
    outer = nn.Module()
    outer.add_module(around, Net(1))
    report = cs.load_into(outer, state(prefix), ADAPT)
    assert fits(outer.state_dict(), around + ".") and report.coverage == 1
    assert any(f"'{around}.'" in w.headline for w in report.warnings)


def test_a_recipe_that_names_the_prefix_is_taken_at_its_word() -> None:
    named = cs.Recipe(
        ["model.conv1.weight -> conv1.weight | adapt_input_conv(1)", "model.{k...} -> {k...}"], rest="error"
    )
    with pytest.raises(cs.PlanError) as error:
        cs.plan(state("model."), named, target=Net(1))
    assert {d.code for d in error.value.diagnostics} == {"claimed-twice"}
    model = Net()
    report = cs.load_into(model, state("model."), ["model.{k...} -> {k...}"])
    assert not any(w.code == "wrapper-prefix" for w in report.warnings)


def test_two_parts_that_fit_equally_well_are_listed() -> None:
    both = state("student.") | state("teacher.")
    for call in (lambda: cs.plan(both, ADAPT, target=Net(1)), lambda: cs.load_into(Net(1), both, ADAPT)):
        with pytest.raises(cs.PlanError) as error:
            call()
        (problem,) = error.value.diagnostics
        assert problem.code == "ambiguous-prefix" and problem.help == 'subtree="student"'
        assert [note.split()[0] for note in problem.notes] == ["student.", "teacher."]
    model = Net(1)
    cs.load_into(model, both, ADAPT, subtree="student")
    assert fits(model.state_dict())


def test_what_is_left_over_is_told_under_the_prefix() -> None:
    strict = cs.Recipe([*ADAPT.rules, "layers.{k...} -> layers.{k...}", "fc.{l} -> fc.{l}"])
    source = state("model.") | {"criterion.weight": torch.ones(2)}
    with pytest.raises(cs.PlanError) as error:
        cs.load_into(Net(1), source, strict)
    assert [d.code for d in error.value.diagnostics if d.severity == "error"] == ["unexpected-keys"]
    assert "criterion.weight" in str(error.value) and "'model.'" in str(error.value)
    model = Net(1)
    cs.load_into(model, source, strict.replace(drop=["criterion.weight"]))
    assert fits(model.state_dict())


def test_without_a_target_nothing_is_taken_off() -> None:
    with pytest.raises(cs.PlanError) as error:
        cs.plan(state("model."), ADAPT)
    assert {d.code for d in error.value.diagnostics} == {"unused-rule"}


def test_the_way_back_puts_the_prefix_on_again() -> None:
    recipe = cs.Recipe(["conv1.weight [o i h w] -> conv1.weight [h w i o]"], rest="keep")
    wanted = {k: cs.TensorSpec(v.shape, v.dtype) for k, v in state().items()}
    wanted["conv1.weight"] = cs.TensorSpec([3, 3, 3, 4], "F32")
    source = state("model.")
    plan = cs.plan(source, recipe, target=wanted)
    back = plan.inverse(plan.state_dict()).state_dict()
    assert back.keys() == source.keys() and all(torch.equal(back[k], v) for k, v in source.items())


def test_the_command_line_says_what_was_taken_off(tmp_path: Path) -> None:
    cs.save(state("net."), tmp_path / "old.safetensors")
    cs.save(Net(1), tmp_path / "wanted.safetensors")
    rule = str(ADAPT.rules[0])
    made = subprocess.run(
        [sys.executable, "-m", "ckptsurgery", "convert", tmp_path / "old.safetensors", tmp_path / "new.safetensors",
         "--rule", rule, "--rest", "keep", "--target", tmp_path / "wanted.safetensors"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0 and "prefix 'net.' taken off" in made.stdout + made.stderr
    with cs.open(tmp_path / "new.safetensors") as converted:
        assert fits(converted.state_dict())


def test_two_parts_of_the_model_that_fit_equally_well_are_named_in_the_recipe() -> None:
    model = nn.Module()
    model.module = nn.Module()
    model.module.net = nn.Linear(2, 2, bias=False)
    model.module.net.net = nn.Linear(2, 2, bias=False)
    with pytest.raises(cs.PlanError) as error:
        cs.plan({"a": torch.ones(2, 2)}, ["a -> net.weight"], target=model)
    (problem,) = error.value.diagnostics
    assert problem.code == "ambiguous-prefix" and not problem.remedies
    assert problem.help == "name the keys in the recipe with their prefix"


def test_a_prefix_of_the_target_alone_leaves_the_rules_as_they_were_written() -> None:
    plan = cs.plan({"a.w": torch.ones(2)}, ["a.{l} -> b.{l}"], target={"net.b.w": cs.TensorSpec([2], "F32")})
    assert list(plan.specs) == ["net.b.w"] and [use.text for use in plan.uses] == ["a.{l} -> b.{l}"]
