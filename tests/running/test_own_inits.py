"""What [init] leaves to the module that builds it is settled, and yet in no file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs

TARGET = {"w": cs.TensorSpec((2,), "F32"), "index": cs.TensorSpec((3,), "I64")}


@pytest.mark.parametrize("own", ["own", "own()"])
def test_own_is_left_out_of_a_state_dict_and_of_a_file(own: str, tmp_path: Path) -> None:
    plan = cs.plan({"a": torch.ones(2)}, cs.Recipe(["a -> w"], init={"index": own}), target=TARGET)
    assert list(plan.state_dict()) == ["w"]
    report = plan.save(tmp_path / "out.safetensors")
    assert report.kept == ("index",)
    assert list(cs.open(tmp_path / "out.safetensors")) == ["w"]


def test_what_only_a_model_gives_needs_a_model_and_a_formula_does_not() -> None:
    plan = cs.plan({"a": torch.ones(2)}, cs.Recipe(["a -> w"], init={"index": "default"}), target=TARGET)
    with pytest.raises(cs.PlanError, match="1 key is to be initialised"):
        plan.state_dict()
    drawn = cs.plan({"a": torch.ones(2)}, cs.Recipe(["a -> w"], init={"index": "zeros"}), target=TARGET)
    assert drawn.state_dict()["index"].tolist() == [0, 0, 0]
