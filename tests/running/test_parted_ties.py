"""A tie of the source that an output does not have is said, with what keeps it; and it is said nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs

SHARED = torch.arange(8.0).reshape(4, 2)
STATE = {"embed.w": SHARED, "head.w": SHARED, "x": torch.ones(3)}


def codes(plan: cs.Plan) -> list[str]:
    return [warning.code for warning in plan.warnings]


PARTING = {
    "one of two is resized": ["embed.w -> embed.w | resize_rows(6)"],
    "each by a rule of its own": ["embed.w -> embed.w | resize_rows(6)", "head.w -> head.w | resize_rows(5)"],
    "one of two is turned": ["embed.w [a b] -> embed.w [b a]"],
    "one of two is cast": ["embed.w -> embed.w | cast(f16)"],
}
KEEPING: dict[str, cs.Recipe] = {
    "one rule for both": cs.Recipe(["{k:embed,head}.w -> {k}.w | resize_rows(6)"], rest="keep"),
    "the same rule for each": cs.Recipe(
        ["embed.w -> embed.w | resize_rows(6)", "head.w -> head.w | resize_rows(6)"], rest="keep"
    ),
    "both renamed": cs.Recipe(["embed.w -> a", "head.w -> b"], rest="keep"),
    "nothing is changed": cs.Recipe(rest="keep"),
    "one is dropped": cs.Recipe(["embed.w -> embed.w | resize_rows(6)"], drop=["head.w"], rest="keep"),
}


@pytest.mark.parametrize("rules", PARTING.values(), ids=PARTING)
def test_a_tie_that_is_parted_is_said_before_and_after(rules: list[str], tmp_path: Path) -> None:
    plan = cs.plan(STATE, cs.Recipe(rules, rest="keep"))
    assert codes(plan) == ["ties-parted"] and "2 in the output" in str(plan)
    report = plan.save(tmp_path / "x.safetensors")
    assert [w.code for w in report.warnings] == ["ties-parted"] and not cs.ties(tmp_path / "x.safetensors")


@pytest.mark.parametrize("recipe", KEEPING.values(), ids=KEEPING)
def test_a_tie_that_stays_or_that_is_dropped_is_no_news(recipe: cs.Recipe) -> None:
    assert codes(cs.plan(STATE, recipe)) == []


def test_the_help_ties_them_again(tmp_path: Path) -> None:
    rules = PARTING["one of two is resized"]
    (note,) = cs.plan(STATE, cs.Recipe(rules, rest="keep")).warnings
    said = str(note.help).rpartition("or ")[2]
    again = cs.plan(STATE, eval(f"cs.Recipe({rules!r}, rest='keep', {said})"))
    again.save(tmp_path / "x.safetensors")
    assert codes(again) == [] and cs.ties(tmp_path / "x.safetensors")[0].names == ("embed.w", "head.w")
