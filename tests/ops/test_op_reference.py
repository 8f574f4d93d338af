"""The reference of ops: complete, with examples that run."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import ckptsurgery as cs
from ckptsurgery.cli.program import app
from ckptsurgery.ops import op_names
from ckptsurgery.ops.numerics import torch_dtype
from ckptsurgery.ops.reference import EXAMPLES, describe
from ckptsurgery.ops.registry import find_op

BUILT_IN = [name for name in op_names() if find_op(name).__module__.startswith("ckptsurgery.")]


def test_every_op_that_is_built_in_has_an_example() -> None:
    assert set(EXAMPLES) == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_example_runs_and_a_text_says_what_the_op_does(name: str) -> None:
    found = describe(name)
    assert f"{name}" in found.example
    assert re.search(r"inverse|[Nn]othing\s+brings", found.text)
    assert found.summary.endswith(".")
    generator = torch.Generator().manual_seed(0)
    source = {
        key: torch.rand(shape, generator=generator).to(torch_dtype(dtype))
        for key, (dtype, shape) in found.reads.items()
    }
    plan = cs.plan(source, found.example)
    made = plan.state_dict()
    assert {key: (tuple(t.shape), t.dtype) for key, t in made.items()} == {
        key: (spec.shape, torch_dtype(spec.dtype)) for key, spec in plan.specs.items()
    }
    assert name in str(plan) or name in ("same", "repeat_over")


def test_the_command_lists_and_shows_them() -> None:
    listed = CliRunner().invoke(app, ["ops", "--json"])
    assert set(json.loads(listed.stdout)) == set(op_names())
    shown = CliRunner().invoke(app, ["ops", "show", "slerp"])
    assert shown.exit_code == 0
    assert all(
        text in shown.stdout
        for text in ("slerp(t, integers=error)", "sin((1 - t) θ)", "Example:", "in blocks of 1 MiB, after")
    )
    assert json.loads(CliRunner().invoke(app, ["ops", "show", "lerp", "--json"]).stdout)["runs"] == "in blocks of 1 MiB"
    wrong = CliRunner().invoke(app, ["ops", "show", "slurp"])
    assert wrong.exit_code == 1
    assert "slerp" in wrong.output
