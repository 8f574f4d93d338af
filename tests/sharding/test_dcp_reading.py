"""Distributed checkpoints that torch itself wrote in several processes, read without torch."""

from __future__ import annotations

import argparse
import io
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_group import Group
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

import ckptsurgery as cs
from ckptsurgery.boxes import Box
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.chunked_tensors import Chunk, Chunked
from ckptsurgery.storage.contents import Contents, Entry

SERIALISATIONS = {"torch": SerializationFormat.TORCH_SAVE, "safetensors": SerializationFormat.SAFETENSORS}


def tensors() -> dict[str, torch.Tensor]:
    """What is saved, whole: sizes that no mesh divides, a scalar, a tensor without elements, integers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (7, 5), "columns": (6, 11), "grid": (5, 9), "copies": (3, 4), "few": (1, 3), "cube": (4, 3, 5)}
    made = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    made["half"] = torch.randn(9, 4, generator=generator).bfloat16()
    made["turned"] = torch.randn(4, 6, generator=generator).t()
    made["count"], made["none"], made["whole"] = torch.tensor(3), torch.empty(0, 4), torch.arange(5)
    return made


def sharded() -> dict[str, Any]:
    """The same on a mesh, each in a way of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    square = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    ways = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()], "few": [Shard(0)], "cube": [Shard(2)]}
    whole = tensors()
    made: dict[str, Any] = {key: distribute_tensor(whole[key], mesh, way) for key, way in ways.items()}
    made["grid"] = distribute_tensor(whole["grid"], square, [Shard(0), Shard(1)])
    made["half"] = distribute_tensor(whole["half"], square, [Shard(0), Replicate()])
    return {key: made.get(key, tensor) for key, tensor in whole.items()}


def write(folder: str) -> dict[str, torch.Tensor]:
    """Save the tensors in all ways, and a model in training; returns some of its tensors, whole."""
    for kind, serialisation in SERIALISATIONS.items():
        state = sharded()
        if kind == "safetensors":
            state["turned"] = state["turned"].contiguous()
        writer = dcp.FileSystemWriter(f"{folder}/{kind}", serialization_format=serialisation)
        dcp.save({"model": state, "epoch": 3, "arguments": {"lr": 0.5, "names": ["a", "b"]}}, storage_writer=writer)
    state = {key: tensor.contiguous() for key, tensor in sharded().items() if key != "none"}
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(f"{folder}/hf", save_distributed=True))
    return write_training(f"{folder}/training")


def write_training(folder: str) -> dict[str, torch.Tensor]:
    """Save a sharded model and the state of its optimizer as `get_state_dict` names it; returns some of it, whole."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Linear(13, 5, bias=False))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    weights = model.state_dict()
    moments = {key: {"step": torch.tensor(1.0), "exp_avg": weight * 2} for key, weight in weights.items()}
    groups = [{"lr": 0.001, "betas": (0.9, 0.99), "params": list(weights)}]
    dcp.save({"model": weights, "optimizer": {"state": moments, "param_groups": groups}}, checkpoint_id=folder)
    whole = weights["0.weight"].full_tensor()
    return {"exp_avg": whole * 2, "weight": whole}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@dataclass
class Written:
    """What a group of processes wrote."""

    folder: Path
    training: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["two", "four"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("written")
    group: Group = request.getfixturevalue(request.param)
    return Written(folder, group(write, str(folder))[0])


@pytest.mark.parametrize("kind", SERIALISATIONS)
def test_what_torch_saved_on_several_ranks_is_read_whole(kind: str, written: Written) -> None:
    with cs.open(written.folder / kind) as ckpt:
        whole = tensors()
        assert dict(ckpt.specs) == {key: cs.TensorSpec(tensor.shape, tensor.dtype) for key, tensor in whole.items()}
        for key, tensor in whole.items():
            assert same(ckpt[key].load(), tensor), key
            dense = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            assert bytes(ckpt.read(key)) == dense
            assert bytes(ckpt.read(key, len(dense) // 3, len(dense) // 2)) == dense[len(dense) // 3 : len(dense) // 2]
            if tensor.dim() and len(tensor) > 2:
                assert same(ckpt[key][1:3], tensor[1:3])
        assert ckpt.extras == {"epoch": 3, "arguments": {"lr": 0.5, "names": ["a", "b"]}}
    with cs.open(written.folder / kind, subtree="model") as ckpt:
        assert sorted(ckpt) == sorted(whole)


def test_safetensors_files_of_ranks_are_one_checkpoint(written: Written, tmp_path: Path) -> None:
    with cs.open(written.folder / "hf") as ckpt:
        for key in ckpt:
            assert same(ckpt[key].load(), tensors()[key]), key
        assert len(ckpt) == len(tensors()) - 1
    shutil.copytree(written.folder / "hf", tmp_path / "hf")
    min((tmp_path / "hf").glob("*.safetensors")).unlink()
    with pytest.raises(cs.CheckpointError, match="rank 1"):
        cs.open(tmp_path / "hf")


def test_a_training_checkpoint_is_its_model_with_the_optimizer_beside_it(written: Written) -> None:
    with cs.open(written.folder / "training") as ckpt:
        assert same(ckpt["0.weight"].load(), written.training["weight"])
        moments = ckpt.extras["optimizer"]["state"]["0.weight"]["exp_avg"]
        assert same(ckpt.tensor_at(moments), written.training["exp_avg"])
        assert ckpt.extras["optimizer"]["param_groups"][0]["lr"] == 0.001


def save_as_megatron(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Save as `torch_dist` does: layers stacked, the optimizer's state beside the model's; returns both, whole."""
    shapes = {"embedding.word_embeddings.weight": (16, 4), "decoder.layers.mlp.linear_fc1.weight": (2, 12, 4)}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {}
    for number, prefix in enumerate(("", "optimizer.state.exp_avg.", "optimizer.state.fp32_param.")):
        for key, shape in shapes.items():
            whole[prefix + key] = torch.arange(math.prod(shape)).reshape(shape).float() + 1000 * number
    state: dict[str, Any] = {k: distribute_tensor(t, mesh, [Shard(t.dim() - 2)]) for k, t in whole.items()}
    state["rng_state/shard_0_1"] = io.BytesIO(b"state of a generator")
    dcp.save(state, checkpoint_id=folder)
    if dist.get_rank() == 0:
        common = {"iteration": 5, "optimizer": {"optimizer": {"param_groups": [{"lr": 0.5}]}}}
        torch.save({"args": argparse.Namespace(num_layers=2), **common}, f"{folder}/common.pt")
        Path(folder, "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    dist.barrier()
    return {
        "model": {k: whole[k] for k in shapes},
        "moments": {k: whole[f"optimizer.state.exp_avg.{k}"] for k in shapes},
    }


def test_a_folder_of_megatron_is_its_model_with_the_optimizer_beside_it(two: Group, tmp_path: Path) -> None:
    whole = two(save_as_megatron, str(tmp_path / "iter"))[0]
    with cs.open(tmp_path / "iter") as ckpt:
        assert {*ckpt} == {*whole["model"]}
        assert all(same(ckpt[key].load(), tensor) for key, tensor in whole["model"].items())
        assert ckpt.extras["common"]["iteration"] == 5
        assert ckpt.extras["common"]["optimizer"]["optimizer"]["param_groups"][0]["lr"] == 0.5
    with cs.open(tmp_path / "iter", subtree="optimizer.state.exp_avg") as moments:
        assert {*moments} == {*whole["moments"]}
        assert all(same(moments[key].load(), tensor) for key, tensor in whole["moments"].items())
    split = cs.plan(
        tmp_path / "iter", ["decoder.layers.{k...} [i o d] -> layers.{i}.{k} [o d]", "embedding.{k...} -> embed.{k}"]
    )
    assert same(
        split.state_dict()["layers.1.mlp.linear_fc1.weight"], whole["model"]["decoder.layers.mlp.linear_fc1.weight"][1]
    )


def test_recipes_over_chunks_give_what_they_give_over_whole_tensors(written: Written, tmp_path: Path) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors().items()}, tmp_path / "whole.safetensors")
    rules = [
        "rows [a b] -> rows.t [b a]",
        "columns [(p a) b] -> part.{p:x,y}.w [a b]",
        "grid [a (c d)] -> grid [c (a d)]",
        "cube [i j k] -> cube [k i j]",
        "half -> half | cast(f32)",
        "turned [a b] -> turned [b a]",
    ]
    recipe = cs.Recipe(rules=rules, rest="{k...} -> other.{k...}", dims={"c": 3})
    cs.plan(written.folder / "torch", recipe).save(tmp_path / "a.safetensors")
    cs.plan(tmp_path / "whole.safetensors", recipe).save(tmp_path / "b.safetensors")
    with cs.open(tmp_path / "a.safetensors") as a, cs.open(tmp_path / "b.safetensors") as b:
        assert {*a} == {*b} and all(same(a[key].load(), b[key].load()) for key in a)
    made = cs.plan(written.folder / "torch", recipe).state_dict()
    with cs.open(tmp_path / "b.safetensors") as b:
        assert all(same(made[key], b[key].load()) for key in b)


def test_opening_and_converting_imports_no_torch(written: Written, tmp_path: Path) -> None:
    code = (
        "import sys, ckptsurgery as cs\n"
        "plan = cs.plan(sys.argv[1], cs.Recipe(rules=['rows [a b] -> r [b a]'], drop=['turned'], rest='keep'))\n"
        "plan.save(sys.argv[2])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, written.folder / "torch", tmp_path / "new.safetensors"], check=True)
    with cs.open(tmp_path / "new.safetensors") as new:
        assert same(new["r"].load(), tensors()["rows"].t())


# laws


def partition(shape: tuple[int, ...], draw: random.Random) -> list[Box]:
    boxes = [Box.whole(shape)]
    for _ in range(draw.randrange(6)):
        box = boxes.pop(draw.randrange(len(boxes)))
        axes = [n for n, size in enumerate(box.extent) if size > 1]
        if axes:
            axis = draw.choice(axes)
            at = draw.randrange(1, box.extent[axis])
            first = tuple(at if n == axis else size for n, size in enumerate(box.extent))
            rest = tuple(size - at if n == axis else size for n, size in enumerate(box.extent))
            low = tuple(start + at * (n == axis) for n, start in enumerate(box.low))
            boxes += [Box(box.low, first), Box(low, rest)]
        else:
            boxes.append(box)
    return boxes


def in_chunks(state: dict[str, torch.Tensor], folder: Path, draw: random.Random) -> Checkpoint:
    """A checkpoint of tensors in random chunks, which are tensors of a file."""
    parts: dict[str, torch.Tensor] = {}
    places: dict[str, list[tuple[Box, str]]] = {}
    for key, tensor in state.items():
        for box in partition(tuple(tensor.shape), draw):
            name = f"{len(parts)}"
            parts[name] = tensor[tuple(slice(a, a + n) for a, n in zip(box.low, box.extent))].contiguous()
            places.setdefault(key, []).append((box, name))
    save_file(parts, folder / "parts.safetensors")
    held = cs.open(folder / "parts.safetensors")
    entries = {}
    for key, tensor in state.items():
        chunks = tuple(Chunk(box.low, held.entries[name]) for box, name in places[key])
        spec = cs.TensorSpec(tensor.shape, tensor.dtype)
        entries[key] = Entry(spec, tensor=Chunked(spec, chunks))
    return Checkpoint(Contents(entries), "chunks")


@pytest.mark.parametrize("seed", range(25))
def test_any_chunks_give_the_whole_through_any_rule(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    g, n, d = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 5)
    state = {
        "q": torch.arange(g * n * 2 * d).reshape(g * n * 2, d).float(),
        "k": torch.arange(g * 3 * d).reshape(g * 3, d).float() + 0.5,
        "e.0": torch.randn(n, d),
        "e.1": torch.randn(n, d),
        "one": torch.randn(g * n, d).double(),
    }
    recipe = cs.Recipe(
        rules=[
            "{p:q,k} [(g rows:p) d] -> qk [(g p rows:p) d]",
            "e.{e} [a b] -> stack [e b a]",
            "one -> one | cast(f32)",
        ],
        dims={"g": g},
    )
    expected = cs.plan(state, recipe).state_dict()
    chunked = in_chunks(state, tmp_path, draw)
    made = cs.plan(chunked, recipe).state_dict()
    assert all(same(made[key], expected[key]) for key in expected)
    report = cs.plan(chunked, recipe).save(tmp_path / "new.safetensors", check=True)
    with cs.open(tmp_path / "new.safetensors") as new:
        assert all(same(new[key].load(), expected[key]) for key in expected), report


# bad input


def changed(folder: Path, change: Callable[[Any], None]) -> cs.CheckpointError:
    """The error for a checkpoint whose metadata was changed."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(cs.CheckpointError) as caught:
        cs.open(folder)
    return caught.value


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A checkpoint of one process with a tensor in two chunks."""
    folder = tmp_path / "one"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(4, 3), "b": torch.ones(2)}, checkpoint_id=folder, no_dist=True)
    return folder


def test_chunks_that_do_not_cover_their_tensor_once_are_an_error(one: Path, tmp_path: Path) -> None:
    def hole(metadata: Any) -> None:
        metadata.state_dict_metadata["w"].size = torch.Size([5, 3])

    def outside(metadata: Any) -> None:
        metadata.state_dict_metadata["w"].size = torch.Size([3, 4])

    def overlap(metadata: Any) -> None:
        (chunk,) = metadata.state_dict_metadata["w"].chunks
        other = type(chunk)(torch.Size([1, 0]), torch.Size([1, 3]))
        metadata.state_dict_metadata["w"].chunks = [chunk, other]

    for change in (hole, outside, overlap):
        shutil.copytree(one, tmp_path / change.__name__)
        error = changed(tmp_path / change.__name__, change)
        assert [d.code for d in error.diagnostics] == ["bad-chunks"]
        assert "'w'" in str(error)


def test_places_that_make_no_sense_are_an_error(one: Path, tmp_path: Path) -> None:
    def past_the_end(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.length += 100

    def no_file(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "__7_0.distcp"

    def no_place(metadata: Any) -> None:
        metadata.storage_data.clear()

    def outside(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../secret"

    for change, code in ((past_the_end, "bad-chunks"), (no_file, "bad-chunks"), (no_place, "bad-chunks"),
                         (outside, "outside-folder")):  # fmt: skip
        folder = tmp_path / change.__name__
        shutil.copytree(one, folder)
        assert {d.code for d in changed(folder, change).diagnostics} == {code}


def test_another_tensor_than_the_metadata_says_is_an_error(one: Path) -> None:
    path = one / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    first, second = metadata.storage_data
    metadata.storage_data[first], metadata.storage_data[second] = (
        metadata.storage_data[second],
        metadata.storage_data[first],
    )
    path.write_bytes(pickle.dumps(metadata))
    with cs.open(one) as ckpt, pytest.raises(cs.CheckpointError, match="the metadata says"):
        ckpt["w"].load()


def test_nothing_in_the_metadata_is_executed(one: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    (one / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(cs.CheckpointError, match="not the metadata"):
        cs.open(one)
    assert not (tmp_path / "pwned").exists()
