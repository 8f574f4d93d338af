"""Files of all ranks, of torch and of DeepSpeed, whose records lie: each is named, and nothing is read past its end."""

from __future__ import annotations

import re
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from test_files_by_rank import saved
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckptsurgery as cs

Change = Callable[[Any], object]
W = torch.arange(12.0).reshape(4, 3)


def refused(folder: Path) -> cs.Diagnostic:
    with pytest.raises(cs.CheckpointError) as caught:
        cs.open(folder)
    (problem,) = caught.value.diagnostics
    return problem


# torch


@pytest.fixture
def group() -> Iterator[Callable[[int], DeviceMesh]]:
    """Makes this process one of two ranks, whose collectives do nothing."""

    def become(rank: int) -> DeviceMesh:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        return init_device_mesh("cpu", (2,))

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


Become = Callable[[int], DeviceMesh]


def part(mesh: DeviceMesh, whole: torch.Tensor, placement: Placement | None = None) -> DTensor:
    local = whole.chunk(2)[dist.get_rank()].clone()
    return DTensor.from_local(
        local, mesh, [placement or Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def ranks(folder: Path, group: Become, state: Callable[[DeviceMesh, int], dict[str, Any]]) -> Path:
    folder.mkdir()
    for rank in range(2):
        torch.save(state(group(rank), rank), folder / f"model_rank_{rank}.pt")
    return folder


def test_parts_in_lists_and_beside_the_model_are_found(group: Become, tmp_path: Path) -> None:
    def state(mesh: DeviceMesh, rank: int) -> dict[str, Any]:
        optimizer = {"state": {0: {"exp_avg": part(mesh, W), "step": torch.tensor(3.0)}}}
        return {"model": {"w": part(mesh, W), "list": [part(mesh, W + 1)]}, "optimizer": optimizer}

    with cs.open(ranks(tmp_path / "all", group, state)) as checkpoint:
        assert sorted(checkpoint) == ["list.0", "w"]
        assert torch.equal(checkpoint["w"].load(), W)
        assert torch.equal(checkpoint["list.0"].load(), W + 1)
        moments = checkpoint.extras["optimizer"]["state"][0]
        assert moments["exp_avg"].note == "a part of a sharded tensor beside the model"
        assert checkpoint.tensor_at(moments["step"]).item() == 3


def test_ranks_that_saved_nothing_sharded_are_files_of_their_own(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": W + rank}, tmp_path / f"model_rank_{rank}.pt")
    assert "model_rank_0.pt" in str(refused(tmp_path))


def other_shape(mesh: DeviceMesh, rank: int) -> Any:
    return part(mesh, W[:, : 3 - rank].contiguous())


def plain_once(mesh: DeviceMesh, rank: int) -> Any:
    return part(mesh, W) if rank == 0 else W


def other_dtype(mesh: DeviceMesh, rank: int) -> Any:
    return part(mesh, W if rank == 0 else W.double())


@pytest.mark.parametrize("made", [other_shape, plain_once, other_dtype])
def test_parts_of_different_tensors_are_torn(
    made: Callable[[DeviceMesh, int], Any], group: Become, tmp_path: Path
) -> None:
    folder = ranks(tmp_path / "all", group, lambda mesh, rank: {"w": made(mesh, rank), "v": part(mesh, W)})
    problem = refused(folder)
    assert (problem.code, problem.place, problem.notes) == ("bad-chunks", str(folder), ())
    assert problem.headline == f"the parts of 'w' in {str(folder)!r} overlap, or leave some of it out"


def shape_of_the_part(tensor: Any) -> None:
    tensor._local_tensor = torch.ones(3, 3)


def dtype_of_the_part(tensor: Any) -> None:
    tensor._local_tensor = tensor._local_tensor.double()


def no_coordinate(tensor: Any) -> None:
    tensor._spec.mesh._coordinate_on_dim = None


def no_mesh(tensor: Any) -> None:
    object.__setattr__(tensor._spec, "mesh", None)


def two_placements(tensor: Any) -> None:
    object.__setattr__(tensor._spec, "placements", (Shard(0), Shard(1)))


LIES = [
    (shape_of_the_part, "sharded-otherwise", "that is not covered: its part has another shape than its placements say"),
    (no_coordinate, "sharded-otherwise", "that is not covered: its mesh does not say which rank it is"),
    (dtype_of_the_part, "bad-metadata", "whose record makes no sense"),
    (no_mesh, "bad-metadata", "whose record makes no sense"),
    (two_placements, "bad-metadata", "whose record makes no sense"),
]


@pytest.mark.parametrize(("lie", "code", "words"), LIES)
def test_records_that_lie_are_named(lie: Change, code: str, words: str, group: Become, tmp_path: Path) -> None:
    def state(mesh: DeviceMesh, rank: int) -> dict[str, Any]:
        made = part(mesh, W)
        lie(made)
        return {"w": made}

    problem = refused(ranks(tmp_path / "all", group, state))
    assert problem.code == code
    assert problem.headline == f"'w' of 'model_rank_0.pt' is a DTensor {words}"


class OldLayout:
    """The layout of a mesh as torch 2.9 keeps it."""

    def __init__(self, shape: object) -> None:
        self.shape = shape


@pytest.mark.parametrize("older", [(2,), 2, None])
def test_meshes_of_older_torch_are_read(older: object, group: Become, tmp_path: Path) -> None:
    """Their layout is a number or a tuple of sizes; before that, the mesh was a tensor of ranks."""

    def state(mesh: DeviceMesh, rank: int) -> dict[str, Any]:
        made = part(mesh, W)
        about = {"mesh": torch.tensor([0, 1])} if older is None else {"_layout": OldLayout(older)}
        old: Any = types.SimpleNamespace(_coordinate_on_dim=[rank], **about)
        object.__setattr__(made._spec, "mesh", Mesh(vars(old)))
        return {"w": made}

    with cs.open(ranks(tmp_path / "all", group, state)) as checkpoint:
        assert torch.equal(checkpoint["w"].load(), W)


class Mesh:
    """A mesh with some attributes."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)


def in_one_part(mesh: DeviceMesh, rank: int) -> ShardedTensor:
    """A small tensor of FSDP1, of which the second rank has no part."""
    place = ShardMetadata([0, 0], [4, 3], "rank:0/cpu")
    about = ShardedTensorMetadata([place], torch.Size([4, 3]), TensorProperties(torch.float32))
    shards = [LocalShard(W.clone(), place)] if rank == 0 else []
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, about)


@pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")
def test_a_rank_may_have_no_part_of_a_tensor(group: Become, tmp_path: Path) -> None:
    with cs.open(ranks(tmp_path / "all", group, lambda mesh, rank: {"w": in_one_part(mesh, rank)})) as checkpoint:
        assert torch.equal(checkpoint["w"].load(), W)


@pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")
def test_a_part_that_is_not_a_tensor_is_named(group: Become, tmp_path: Path) -> None:
    def state(mesh: DeviceMesh, rank: int) -> dict[str, Any]:
        made = in_one_part(mesh, rank)
        for shard in made._local_shards:
            shard.tensor = numpy.ones((4, 3))
        return {"w": made}

    problem = refused(ranks(tmp_path / "all", group, state))
    assert problem.code == "sharded-otherwise"
    assert problem.headline.endswith("is a ShardedTensor that is not covered: a part of it is not a plain tensor")


def test_arrays_in_a_state_dict_of_parts_are_refused(group: Become, tmp_path: Path) -> None:
    folder = ranks(tmp_path / "all", group, lambda mesh, rank: {"w": part(mesh, W), "a": numpy.ones(3)})
    problem = refused(folder)
    assert problem.code == "sharded-otherwise"
    assert problem.headline == f"{str(folder / 'model_rank_0.pt')!r} has a numpy array in its state dict"


# DeepSpeed


def change(path: Path, how: Change) -> None:
    value = torch.load(path, weights_only=False)
    made = how(value)
    torch.save(made if type(made) is list else value, path)


HEAD, FIRST = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"
VECTORS = "single_partition_of_fp32_groups"


def states(value: Any) -> Any:
    return value["optimizer_state_dict"]


ZERO: list[tuple[str, Change, str]] = [
    (FIRST, lambda value: [1], "it is not a mapping"),
    (FIRST, lambda value: value.update(optimizer_state_dict=3), "optimizer_state_dict is not a mapping"),
    (FIRST, lambda value: states(value).update({VECTORS: 3}), "it has no flat fp32 vectors"),
    (FIRST, lambda value: states(value)[VECTORS].__setitem__(0, 3), "flat vector 0 is not a tensor"),
    (FIRST, lambda value: states(value)[VECTORS].__setitem__(1, torch.ones(20)[::2]), "flat vector 1 is not contig"),
    (FIRST, lambda value: states(value)[VECTORS].pop(), "the optimizer's groups are not those of the model's file"),
    (FIRST, lambda value: states(value).update(param_alignment_paddings=[[0], [0]]), "group 0 has 4 parameters and 1 "),
    (FIRST, lambda value: states(value)[VECTORS].__setitem__(0, torch.ones(999)), "group 0 has "),
    (FIRST, lambda value: states(value)[VECTORS].__setitem__(0, torch.ones(1)), "'layers."),
    (HEAD, lambda value: value.update(param_shapes=None), "it has no param_shapes, as files of old versions"),
    (HEAD, lambda value: value["param_shapes"][0].update({"layers.0.w": (2, -1)}), "a shape in it makes no sense"),
    (HEAD, lambda value: value["param_shapes"][0].update({"layers.0.w": 5}), "a shape in it makes no sense"),
    (HEAD, lambda value: value["param_shapes"][0].update({"layers.0.w": (1.0,)}), "a shape in it makes no sense"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "words"), ZERO, ids=[words for *_, words in ZERO])
def test_partitions_that_do_not_fit_are_refused(name: str, how: Change, words: str, tmp_path: Path) -> None:
    saved(tmp_path / "a", 2, 2, False, 0)
    change(tmp_path / "a" / name, how)
    problem = refused(tmp_path / "a")
    assert problem.code == "bad-chunks"
    assert f" is not a checkpoint of DeepSpeed as it was saved: {words}" in problem.headline
    whole = words.startswith(("group", "'layers", "the optimizer"))
    assert problem.place == str(tmp_path / "a" if whole else tmp_path / "a" / name)


def test_a_vector_that_reaches_outside_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", 2, 2, False, 0)
    path = tmp_path / "a" / FIRST
    torch.save({"optimizer_state_dict": {"zero_stage": 2, "partition_count": 2, VECTORS: [torch.ones(17)]}}, path)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in parts.items():
            new.writestr(name, data.replace(b"K\x11\x85", b"K\x12\x85"))
    problem = refused(tmp_path / "a")
    assert problem.code == "bad-chunks"
    assert "as it was saved: flat vector 0: F32 [18] at element 0 with strides [1] reaches outside" in problem.headline


def test_partitions_without_the_model_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", 2, 2, False, 0)
    (tmp_path / "a" / HEAD).unlink()
    assert refused(tmp_path / "a").headline.endswith("it has no file of the model's names and shapes")


THIRD = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def test_partitions_of_stage_three_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "a", 3, 2, False, 0)
    change(tmp_path / "a" / THIRD, lambda value: value["param_shapes"][1].update({"layers.8.w": (99, 99)}))
    problem = refused(tmp_path / "a")
    assert problem.code == "bad-chunks"
    assert problem.headline.endswith("as it was saved: 'layers.8.w' reaches past the end of the partitions")
    change(tmp_path / "a" / THIRD, lambda value: value["param_shapes"][1].popitem())
    problem = refused(tmp_path / "a")
    assert problem.code == "bad-chunks"
    assert re.search(r"as it was saved: the partitions have \d+ elements, and the parameters \d+$", problem.headline)


@pytest.mark.parametrize("stage", [2, 3])
def test_parameters_without_elements_are_read(stage: int, tmp_path: Path) -> None:
    saved(tmp_path / "a", stage, 2, False, 0)
    change(
        tmp_path / "a" / (HEAD if stage == 2 else THIRD),
        lambda value: value["param_shapes"][0].update({"none": (0, 3)}),
    )
    with cs.open(tmp_path / "a") as checkpoint:
        assert checkpoint["none"].load().shape == (0, 3)
        assert checkpoint["none"].spec == cs.TensorSpec((0, 3), "F32")
        assert cs.plan(checkpoint, cs.Recipe(["none -> n"], rest="keep")).state_dict()["n"].shape == (0, 3)
