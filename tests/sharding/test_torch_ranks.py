"""State dicts that each rank saved by `torch.save`, read as one checkpoint by one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import Group
from test_sharded_loading import WAYS, Net, whole
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

import ckptsurgery as cs


def save(way: str, folder: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = WAYS[way](Net())
    rank, size = dist.get_rank(), dist.get_world_size()
    state = {"model": model.state_dict(), "step": 3}
    torch.save(state, f"{folder}/model_world_size_{size}_rank_{rank}.pt")
    torch.save({"state": {}}, f"{folder}/optim_world_size_{size}_rank_{rank}.pt")
    found = {key: tensor.clone() for key, tensor in whole(model).items() if not key.endswith("table")}
    dist.barrier()
    return found


def save_fsdp1(folder: str) -> dict[str, torch.Tensor]:
    """Save the ShardedTensors of FSDP1."""
    torch.manual_seed(0)
    plain = Net()
    expected = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(plain, device_id=torch.device("cpu"), use_orig_params=True)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            torch.save(model.state_dict(), f"{folder}/rank{dist.get_rank()}.pt")
    dist.barrier()
    return expected


def equal(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    with cs.open(folder) as ckpt:
        found = {key: ckpt[key].load() for key in ckpt}
    return {*found} == {*expected} and all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("way", ["fsdp", "tensor_parallel", "hybrid", "by_hand", "wrapped"])
def test_files_of_all_ranks_are_one_checkpoint(way: str, two: Group, four: Group, tmp_path: Path) -> None:
    for group in (two, four):
        folder = tmp_path / str(group.ranks)
        folder.mkdir()
        state, *_ = group(save, way, str(folder))
        assert equal(folder, state)
        with cs.open(folder) as ckpt:
            assert ckpt.extras["step"] == 3


def test_sharded_tensors_of_fsdp1_are_read(two: Group, tmp_path: Path) -> None:
    state, _ = two(save_fsdp1, str(tmp_path))
    assert equal(tmp_path, state)


def codes(folder: Path) -> set[str]:
    with pytest.raises(cs.CheckpointError) as raised:
        cs.open(folder)
    return {problem.code for problem in raised.value.diagnostics}


def test_what_is_missing_or_not_covered_is_named(four: Group, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    four(save, "both", str(tmp_path / "both"))
    assert codes(tmp_path / "both") == {"sharded-otherwise"}
    (tmp_path / "fsdp").mkdir()
    four(save, "fsdp", str(tmp_path / "fsdp"))
    last = tmp_path / "fsdp" / "model_world_size_4_rank_3.pt"
    data: Any = last.read_bytes()
    last.unlink()
    assert codes(tmp_path / "fsdp") == {"bad-chunks"}
    last.write_bytes(data)
    (tmp_path / "fsdp" / "model_world_size_4_rank_1.pt").unlink()
    assert codes(tmp_path / "fsdp") == {"missing-shard"}
