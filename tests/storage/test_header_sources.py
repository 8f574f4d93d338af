"""Specs alone are a source to plan from, and never one to read from."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ckptsurgery as cs

SPECS = {"a.w": cs.TensorSpec([2, 3], "F32"), "a.b": cs.TensorSpec([2], "F32")}


def test_a_plan_needs_no_more_than_specs() -> None:
    plan = cs.plan(SPECS, ["a.w [x y] -> w [y x]", "a.b -> b"])
    assert plan.specs == {"w": cs.TensorSpec([3, 2], "F32"), "b": cs.TensorSpec([2], "F32")}


def test_values_are_refused_by_name(tmp_path: object) -> None:
    with pytest.raises(cs.CheckpointError, match=r"a\.w"):
        cs.open(SPECS)["a.w"].load()
    with pytest.raises(cs.CheckpointError, match="no-data"):
        cs.plan(SPECS, cs.Recipe(rest="keep")).save(f"{tmp_path}/x.safetensors")


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, ckptsurgery as cs; c = cs.open({'w': cs.TensorSpec([2], 'F32')}); c.ties; "
        "str(cs.plan(c, 'w -> v')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
