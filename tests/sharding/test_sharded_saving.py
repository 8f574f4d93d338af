"""Saving by several ranks: a plain checkpoint of what they hold together, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import Group
from safetensors.torch import load_file
from test_sharded_loading import WAYS, Net, fsdp, whole

import ckptsurgery as cs
from ckptsurgery.storage.output.staging import Writer


def save(way: str, path: str, arguments: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str, int]:
    torch.manual_seed(0)
    model = WAYS[way](Net())
    report = cs.save(model, path, **arguments)
    persistent = {name: tensor for name, tensor in whole(model).items() if not name.endswith("table")}
    return persistent, str(report), report.bytes_written


@pytest.mark.parametrize("way", WAYS)
def test_what_ranks_save_is_a_plain_checkpoint(way: str, four: Group, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    reports = four(save, way, str(path), {})
    expected, text, nbytes = reports[0]
    assert all(report[1:] == (text, nbytes) for report in reports)
    with cs.open(path) as ckpt:
        assert {*ckpt} == {*expected}
        assert all(torch.equal(ckpt[name].load(), tensor) for name, tensor in expected.items())
        assert [tie.names for tie in ckpt.ties] == [("embed.weight", "head.weight")]
        assert ckpt.nbytes == nbytes
    loaded = load_file(path)
    assert {*expected} - {*loaded} == {"head.weight"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_of_a_folder_are_written_by_all_ranks(two: Group, tmp_path: Path) -> None:
    (expected, *_), _ = two(save, "fsdp", str(tmp_path / "out"), {"max_shard_size": 400})
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    with cs.open(tmp_path / "out") as ckpt:
        assert {*ckpt} == {*expected}
        assert all(torch.equal(ckpt[name].load(), tensor) for name, tensor in expected.items())


def round_trip(way: str, path: str) -> bool:
    torch.manual_seed(7)
    model = WAYS[way](Net())
    cs.load_into(model, path)
    before = whole(model)
    cs.save(model, path + ".again.safetensors")
    torch.manual_seed(8)
    other = fsdp(Net())
    cs.load_into(other, path + ".again.safetensors")
    after = whole(other)
    return all(torch.equal(before[name], after[name]) for name in before)


def test_saving_and_loading_is_the_identity_across_meshes(two: Group, four: Group, tmp_path: Path) -> None:
    path = str(tmp_path / "a.safetensors")
    (expected, *_), _ = two(save, "by_hand", path, {})
    for way in ("both", "hybrid"):
        assert all(four(round_trip, way, path))
        again = Path(path + ".again.safetensors")
        with cs.open(again) as ckpt:
            assert all(torch.equal(ckpt[name].load(), tensor) for name, tensor in expected.items())
        again.unlink()


def refuse(path: str, fail: str) -> str:
    """The error of a save that fails on one rank; nothing but what was there is left."""
    torch.manual_seed(0)
    model = fsdp(Net())
    written = Writer.write

    def broken(self: Writer, *args: Any) -> None:
        raise OSError(28, "No space left on device", "a file")

    try:
        if fail == "write" and dist.get_rank() == 1:
            Writer.write = broken  # type: ignore[method-assign]
        cs.save(model.state_dict(), path)
    except cs.CheckpointError as error:
        return error.diagnostics[0].code
    except (OSError, cs.CkptSurgeryError) as error:
        return type(error).__name__
    finally:
        Writer.write = written  # type: ignore[method-assign]
    return ""


def test_a_rank_that_fails_leaves_nothing_and_all_ranks_say_so(two: Group, tmp_path: Path) -> None:
    assert "" not in two(refuse, str(tmp_path / "x.safetensors"), "write")
    assert not list(tmp_path.iterdir())
    (tmp_path / "y.safetensors").write_bytes(b"there")
    assert two(refuse, str(tmp_path / "y.safetensors"), "exists") == ["output-exists"] * 2
    assert (tmp_path / "y.safetensors").read_bytes() == b"there"
