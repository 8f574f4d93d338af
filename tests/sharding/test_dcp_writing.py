"""Distributed checkpoints that are written here, read by torch's own loader and by ourselves."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_group import Group
from test_sharded_loading import WAYS, Net, fsdp, whole

import ckptsurgery as cs


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {"a.w": torch.randn(7, 3, generator=generator), "a.b": torch.randn(2, generator=generator).bfloat16()}
    made |= {"count": torch.tensor(3), "none": torch.empty(0, 4), "turned": torch.arange(12.0).reshape(3, 4).t()}
    return made | {"tied": made["a.w"]}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_torch_loads_what_a_plan_saves(ranks: int, tmp_path: Path) -> None:
    source = state()
    recipe = cs.Recipe(rules=["a.{l} -> b.{l}"], rest="keep")
    report = cs.plan(source, recipe).save(tmp_path / "out", format="dcp", ranks=ranks)
    wanted = {key.replace("a.", "b."): tensor for key, tensor in source.items()}
    made = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(made, checkpoint_id=tmp_path / "out", no_dist=True)
    assert all(torch.equal(made[key], tensor) for key, tensor in wanted.items())
    with cs.open(tmp_path / "out") as ckpt:
        assert {*ckpt} == {*wanted} and all(torch.equal(ckpt[key].load(), wanted[key]) for key in ckpt)
    assert len(report.files) == ranks + 1 and all(Path(file).exists() for file in report.files)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert not any(note.startswith("left out") for note in report.notes)


@pytest.mark.parametrize("name", ["out", "out.pt"])
def test_what_is_beside_the_tensors_is_left_out_and_named(name: str, tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 3, "best": 0.5}, tmp_path / "x.pt")
    report = cs.plan(tmp_path / "x.pt", "w -> w").save(tmp_path / name, format="dcp")
    assert report.notes == ("left out, as the format cannot hold it: epoch, best",)
    with cs.open(tmp_path / name) as checkpoint:
        assert list(checkpoint) == ["w"] and not {"epoch", "best"} & checkpoint.extras.keys()


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(cs.CheckpointError, match="exists already"):
        cs.save(state(), tmp_path / "out", format="dcp")
    with pytest.raises(cs.PlanError, match="knows no check"):
        cs.save(state(), tmp_path / "new", format="dcp", check=True)
    with pytest.raises(cs.PlanError, match="is not written"):
        cs.save(state(), tmp_path / "new", format="zarr")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def save_and_load(way: str, folder: str) -> bool:
    torch.manual_seed(0)
    model = WAYS[way](Net())
    report = cs.save(model, folder, format="dcp")
    assert "ranks" in str(report)
    torch.manual_seed(1)
    other = fsdp(Net())
    theirs = other.state_dict()
    dcp.load(theirs, checkpoint_id=folder)
    before, loaded = whole(model), whole(other)
    torch.manual_seed(2)
    third = WAYS[way](Net())
    cs.load_into(third, folder)
    after = whole(third)
    return all(torch.equal(before[key], loaded[key]) and torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("way", ["fsdp", "by_hand"])
def test_ranks_save_a_distributed_checkpoint_together(way: str, two: Group, tmp_path: Path) -> None:
    assert all(two(save_and_load, way, str(tmp_path / "out")))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    with cs.open(tmp_path / "out") as ckpt:
        assert {"embed.weight", "head.weight"} <= {*ckpt}
