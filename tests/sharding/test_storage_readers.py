"""Recipes under `dcp.load` and `dcp.save`: what torch's own reader and writer do with files that were converted."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_group import Group
from safetensors.torch import load_file, save_file
from test_sharded_loading import RECIPE, WAYS, Net, source, whole
from torch.distributed.checkpoint.api import CheckpointException

import ckptsurgery as cs

TIED = RECIPE + cs.Recipe(tie={"head.weight": "embed.weight"})
BACK = cs.Recipe(
    rules=[
        "embed.weight -> tok.weight",
        "blocks.{i}.qkv.{l} [(g p r) d?] -> layers.{i}.{p:q,k,v}.{l} [(g r) d?] | cast(bf16)",
        "blocks.{i}.out.weight [a b] -> layers.{i}.out [b a]",
        "blocks.{i}.scale -> layers.{i}.scale",
        "norm.{l} -> norm.{l}",
    ],
    drop=["head.weight"],
    dims={"g": 2},
)


def load(way: str, folder: str) -> bool:
    """Load by torch's reader what was converted, and by ours what was not."""
    states = []
    for seed, reader in enumerate(
        (dcp.HuggingFaceStorageReader(f"{folder}/converted"), cs.StorageReader(f"{folder}/x.safetensors", TIED))
    ):
        torch.manual_seed(seed)
        model = WAYS[way](Net())
        state = model.state_dict()
        dcp.load(state, storage_reader=reader)
        model.load_state_dict(state)
        states.append(whole(model))
    return all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def save(way: str, folder: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Save by our writer; returns the model's tensors."""
    torch.manual_seed(3)
    model = WAYS[way](Net())
    dcp.save(model.state_dict(), storage_writer=cs.StorageWriter(f"{folder}/{way}/", BACK, **arguments))
    return {key: tensor.clone() for key, tensor in whole(model).items() if not key.endswith("table")}


def refuse(what: str, folder: str) -> str:
    """The text of the error that torch raises on this rank."""
    torch.manual_seed(0)
    model = WAYS["fsdp"](Net())
    state: dict[str, Any] = dict(model.state_dict())
    path = f"{folder}/x.safetensors"
    try:
        if what == "unexpected":
            state.pop("norm.weight")
            dcp.load(state, storage_reader=cs.StorageReader(path, TIED))
        elif what == "missing":
            dcp.load(state, storage_reader=cs.StorageReader(path, RECIPE))
        elif what == "cast":
            dcp.load({key: tensor.half() for key, tensor in state.items()}, storage_reader=cs.StorageReader(path, TIED))
        elif what == "recipe":
            cs.StorageReader(path, "nothing.{i} -> a.{i}")
        elif what == "value":
            dcp.save({**state, "step": 3}, storage_writer=cs.StorageWriter(f"{folder}/out/", BACK))
        elif what == "whole":
            one_by_rows = cs.Recipe(rules=["embed.weight [v d] -> tok.weight [v d] | take(v, [2, 1])"], rest="keep")
            dcp.save(state, storage_writer=cs.StorageWriter(f"{folder}/out/", one_by_rows))
        elif what == "write":
            from ckptsurgery.storage.output.staging import Writer

            written = Writer.write

            def broken(self: Writer, *args: Any) -> None:
                raise cs.CheckpointError(cs.Diagnostic("write-failed", "no space left"))

            Writer.write = broken if dist.get_rank() == 1 else written  # type: ignore[method-assign]
            try:
                dcp.save(state, storage_writer=cs.StorageWriter(f"{folder}/out/", BACK))
            finally:
                Writer.write = written  # type: ignore[method-assign]
    except (CheckpointException, cs.CkptSurgeryError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        gc.collect()  # a writer whose save failed on another rank removes its files when it goes
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    save_file(source(), folder / "x.safetensors")
    made = cs.plan(source(), RECIPE, dtype="f32").state_dict()
    (folder / "converted").mkdir()
    save_file({**made, "head.weight": made["embed.weight"].clone()}, folder / "converted" / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("way", WAYS)
def test_a_recipe_under_load_is_a_conversion_before_it(way: str, two: Group, four: Group, folder: str) -> None:
    assert all(two(load, way, folder))
    assert all(four(load, way, folder))


@pytest.mark.parametrize("way", WAYS)
def test_a_recipe_under_save_is_a_conversion_after_it(way: str, four: Group, tmp_path: Path) -> None:
    state, *_ = four(save, way, str(tmp_path), {})
    expected = cs.plan(state, BACK).state_dict()
    found = load_file(tmp_path / way / "model.safetensors")
    assert {*found} == {*expected}
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    again = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(again, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / way)), no_dist=True)
    assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())


def test_output_is_cut_into_shards(two: Group, tmp_path: Path) -> None:
    state, *_ = two(save, "fsdp", str(tmp_path), {"max_shard_size": 300})
    with cs.open(tmp_path / "fsdp") as ckpt:
        assert len({entry.file for entry in ckpt.entries.values()}) > 1
        assert all(torch.equal(ckpt[key].load(), tensor) for key, tensor in cs.plan(state, BACK).state_dict().items())


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("unexpected", "unexpected-keys"),
        ("missing", "Missing key in checkpoint state_dict: head.weight"),
        ("cast", "dtype-mismatch"),
        ("recipe", "unused-rule"),
        ("value", "not-a-tensor"),
        ("whole", "not-by-ranks"),
        ("write", "no space left"),
    ],
)
def test_an_error_reaches_all_ranks_and_leaves_nothing(what: str, code: str, two: Group, folder: str) -> None:
    told = two(refuse, what, folder)
    assert all(code in text for text in told), told[0]
    assert not Path(folder, "out").exists()
    assert {path.name for path in Path(folder).iterdir()} == {"x.safetensors", "converted"}
