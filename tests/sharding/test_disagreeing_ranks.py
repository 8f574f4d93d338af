"""A call that one rank makes with other arguments: the same error on all ranks, and nothing is written."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from odd_cases import Part
from rank_group import Group
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import ckptsurgery as cs


def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(35.0).reshape(7, 5), "a.bias": torch.arange(7.0), "b.weight": torch.ones(3, 3)}


def model() -> torch.nn.Module:
    whole = Part(a=torch.nn.Linear(5, 7), b=torch.nn.Linear(3, 3, bias=False))
    return fully_shard(whole, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def by(factor: int) -> cs.Recipe:
    return cs.Recipe(rules=[f"a.weight -> a.weight | mul({factor})"], rest="keep")


def turned(way: str) -> cs.Recipe:
    return cs.Recipe(rules=[f"b.weight [x y] -> b.weight [{way}]"], rest="keep")


CALLS: dict[str, Callable[[Path, bool, Any], object]] = {
    "load, an op's argument": lambda at, odd, m: cs.load_into(m, at / "x.safetensors", by(3 if odd else 2)),
    "load, the order of axes": lambda at, odd, m: cs.load_into(
        m, at / "x.safetensors", turned("y x" if odd else "x y")
    ),
    "load, the seed": lambda at, odd, m: cs.load_into(m, {"b.weight": torch.ones(3, 3)}, init="a", seed=int(odd)),
    "load, a scan": lambda at, odd, m: cs.load_into(m, at / "x.safetensors", check_values=odd),
    "load, stages": lambda at, odd, m: cs.load_into(m, at / "x.safetensors", partial="stages" if odd else False),
    "save, the path": lambda at, odd, m: cs.save(m, at / ("out1" if odd else "out2")),
    "save, the format": lambda at, odd, m: cs.save(m, at / "out", format=None if odd else "dcp"),
    "save, the size of shards": lambda at, odd, m: cs.save(m, at / "out", max_shard_size=100 if odd else 200),
    "convert, an op's argument": lambda at, odd, m: cs.plan(at / "x.safetensors", by(3 if odd else 2)).save(
        at / "out", together=True
    ),
    "convert, the path": lambda at, odd, m: cs.plan(at / "x.safetensors", by(2)).save(
        at / ("out1" if odd else "out2"), together=True
    ),
    "convert, a dry run": lambda at, odd, m: cs.plan(at / "x.safetensors", by(2)).save(
        at / "out", together=True, dry_run=odd
    ),
    "exchange, an op's argument": lambda at, odd, m: cs.reshard(m, model(), by(3 if odd else 2)),
    "exchange, the size of buckets": lambda at, odd, m: cs.reshard(m, model(), bucket_size=64 if odd else 128),
}


def outcome(what: str, folder: str, odd: int) -> str:
    """The codes and the text of the error on this rank."""
    try:
        CALLS[what](Path(folder), dist.get_rank() == odd, model())
    except cs.CkptSurgeryError as error:
        return f"{[problem.code for problem in error.diagnostics]} {error}"
    return "no error"


@pytest.mark.parametrize("what", CALLS)
def test_ranks_agree_on_the_call_before_anything_is_done(what: str, three: Group, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "x.safetensors")
    (told,) = {*three(outcome, what, str(tmp_path), 2)}
    assert told.startswith("['ranks-differ']") and "rank 2" in told
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def full_disk(folder: str, arguments: dict[str, Any]) -> tuple[list[str], str]:
    """Save while the files of one rank may not grow; the code and the text of the error."""
    shards = distribute_tensor(torch.ones(3000, 4), init_device_mesh("cpu", (3,)), [Shard(0)], src_data_rank=None)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        cs.save({"w": shards}, Path(folder, "out"), **arguments)
    except cs.CheckpointError as error:
        return [problem.code for problem in error.diagnostics], str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    return [], ""


@pytest.mark.parametrize(("arguments", "code"), [({}, "file-too-large"), ({"format": "dcp"}, "write-failed")])
def test_a_full_disk_of_one_rank_is_an_error_of_all(
    arguments: dict[str, Any], code: str, three: Group, tmp_path: Path
) -> None:
    told = three(full_disk, str(tmp_path), arguments)
    assert told == [told[0]] * 3 and told[0][0] == [code]
    assert not [*tmp_path.iterdir()]
