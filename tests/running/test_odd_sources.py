"""Sources that are not plain runs of bytes in a file, and outputs whose names are odd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.checkpoint import Checkpoint


@pytest.mark.parametrize("rule", ["w -> v", "w -> v, u", "w [x y] -> v [y x]", "w [(p d) y] -> v.{p:a,b} [d y]"])
def test_a_tensor_that_is_no_run_of_bytes_is_read_whole_and_once_as_the_cost_says(
    tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.randn(700, 1200).t()}, tmp_path / "strided.pt")
    plan = cs.plan(tmp_path / "strided.pt", rule)
    loads: list[str] = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, key: loads.append(key) or load(self, key))
    report = plan.save(tmp_path / "out.safetensors")
    nbytes = 4 * 700 * 1200
    assert loads == ["w"] and plan.cost.bytes_read == report.bytes_read == nbytes
    assert plan.cost.least_memory == nbytes + plan.cost.bytes_written
    with pytest.raises(cs.PlanError, match="too-much-memory"):
        plan.save(tmp_path / "other.safetensors", max_memory=nbytes)


def test_packed_tensors_have_a_way_through_memory_and_back(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [2, 16], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "f4.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(16)))
    plan = cs.plan(tmp_path / "f4.safetensors", "a -> b, c")
    made = plan.state_dict()
    assert made["b"].view(torch.uint8).tolist() == made["c"].view(torch.uint8).tolist()
    assert made["b"].view(torch.uint8).flatten().tolist() == list(range(16))
    plan.save(tmp_path / "two.safetensors", check=True)
    plan.inverse(tmp_path / "two.safetensors").save(tmp_path / "back.safetensors", check=True)
    assert cs.diff(tmp_path / "f4.safetensors", tmp_path / "back.safetensors").identical


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_without_a_name_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    cs.save({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cs.CheckpointError, match="no-output"):
        cs.plan("model.safetensors", "w -> v").save("", overwrite=overwrite)
    with pytest.raises(cs.CheckpointError, match="no name"):
        cs.open("")
    assert list(cs.open("model.safetensors")) == ["w"] and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_slash_at_the_end_means_a_folder_whatever_the_name(tmp_path: Path) -> None:
    cs.plan({"w": torch.ones(2)}, "w -> v").save(f"{tmp_path}/out.safetensors/")
    assert [p.name for p in (tmp_path / "out.safetensors").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out"])
def test_a_plan_that_drops_everything_is_written_and_checked(tmp_path: Path, name: str) -> None:
    report = cs.plan({"w": torch.ones(2)}, cs.Recipe([], drop=["w"])).save(tmp_path / name, check=True)
    assert report.dropped == ("w",) and report.bytes_written == 0 and (tmp_path / name).exists()


def test_an_overflow_is_told_by_the_numbers_among_the_values() -> None:
    with pytest.raises(cs.CheckpointError, match="run from 1 to 1e\\+30"):
        cs.plan({"w": torch.tensor([1.0, 1e30, float("nan")])}, "w -> w | cast(f16)").state_dict()


@pytest.mark.parametrize("differ", [False, True])
def test_what_is_no_run_of_bytes_is_compared_whole_and_not_made_dense_for_every_block(
    differ: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = torch.randn(900, 1000).t()
    other = torch.randn(900, 1000).t().copy_(one)
    other[-1, -1] += differ
    model = torch.nn.Module()
    model.a = model.b = torch.nn.Parameter(torch.zeros(1000, 900))
    loads: list[str] = []
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self, key: loads.append(key) or load(self, key))
    if differ:
        with pytest.raises(cs.PlanError, match="different values"):
            cs.load_into(model, {"a": one, "b": other})
    else:
        cs.load_into(model, {"a": one, "b": other})
        assert torch.equal(model.b, one)
    assert sorted(loads) == (["a", "b"] if differ else ["a", "a", "b"])
