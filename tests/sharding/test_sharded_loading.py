"""`load_into` of sharded models: each rank holds its part of what one process loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import Group
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckptsurgery as cs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(7, 12)
        self.out = nn.Linear(12, 7, bias=False)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


class Net(nn.Module):
    """Blocks between an embedding and a head that is tied to it; sizes that no mesh divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight


def source() -> dict[str, torch.Tensor]:
    """A checkpoint with q, k and v apart, in another dtype and under other names, without the head."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    state = {"tok.weight": random(11, 7), "norm.weight": random(7), "norm.bias": random(7)}
    for i in range(2):
        for p in "qkv":
            state[f"layers.{i}.{p}.weight"], state[f"layers.{i}.{p}.bias"] = random(4, 7), random(4)
        state[f"layers.{i}.out"] = random(7, 12).t().contiguous()
        state[f"layers.{i}.scale"] = random(3)
    return state


RECIPE = cs.Recipe(
    rules=[
        "tok.weight -> embed.weight",
        "layers.{i}.{p:q,k,v}.{l} [(g r) d?] -> blocks.{i}.qkv.{l} [(g p r) d?]",
        "layers.{i}.out [a b] -> blocks.{i}.out.weight [b a]",
        "layers.{i}.scale -> blocks.{i}.scale",
        "norm.{l} -> norm.{l}",
    ],
    dims={"g": 2},
)


def fsdp(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(block, mesh, {"qkv": ColwiseParallel(), "out": RowwiseParallel()})
    return model


def both(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], {"qkv": ColwiseParallel(), "out": RowwiseParallel()})
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def hybrid(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "shards"))
    return fully_shard(model, mesh=mesh)


def by_hand(model: nn.Module) -> nn.Module:
    """Columns, copies and rows, in turn."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for n, parameter in enumerate(list(model.parameters())):
        way = Replicate() if n % 3 == 1 else Shard(parameter.dim() - 1 if n % 3 else 0)
        sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [way]))
        for module in model.modules():
            for own, held in list(module._parameters.items()):
                if held is parameter:
                    module._parameters[own] = sharded
    return model


def wrapped(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return fully_shard(model)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    way.__name__: way for way in (fsdp, tensor_parallel, both, hybrid, by_hand, wrapped)
}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model as it would be in one process."""
    state = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        held = tensor.detach()
        state[name.replace("_checkpoint_wrapped_module.", "")] = (
            held.full_tensor() if isinstance(held, DTensor) else held
        )
    return state


def outcome(model: nn.Module, report: cs.Report) -> tuple[dict[str, torch.Tensor], list[Any], bool, str]:
    tied = model.head.weight is model.embed.weight
    ledger = sorted((e.key, e.action, str(e.spec), e.by) for e in report.ledger)
    return {name: tensor.clone() for name, tensor in whole(model).items()}, ledger, tied, str(report)


def load(way: str, state: str, path: str, arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    if state == "built":
        model = WAYS[way](Net())
    else:
        with torch.device("meta"):
            model = WAYS[way](Net())
        if state == "emptied":
            model.to_empty(device="cpu")
            model.head.weight = model.embed.weight
            for block in model.modules():
                if isinstance(block, Block):
                    block.table = torch.arange(4.0)
        else:
            for block in model.modules():
                if isinstance(block, Block):
                    block.table = torch.arange(4.0)
    return outcome(model, cs.load_into(model, path, RECIPE, **arguments))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_file(source(), path)
    return str(path)


def check(group: Group, way: str, state: str, path: str, **arguments: Any) -> None:
    torch.manual_seed(0)
    model = Net()
    expected, ledger, tied, _ = outcome(model, cs.load_into(model, path, RECIPE, **arguments))
    for made, told, still_tied, text in group(load, way, state, path, arguments):
        assert {*made} == {*expected}
        for name, tensor in expected.items():
            assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor), (way, state, name)
        assert told == ledger, text
        assert tied and still_tied


@pytest.mark.parametrize("way", WAYS)
def test_each_rank_holds_its_part_of_what_one_process_loads(way: str, two: Group, path: str) -> None:
    check(two, way, "built", path)


@pytest.mark.parametrize("way", WAYS)
def test_four_ranks_hold_what_one_process_loads(way: str, four: Group, path: str) -> None:
    check(four, way, "built", path)


@pytest.mark.parametrize("state", ["emptied", "meta"])
def test_a_model_that_was_built_without_memory_is_filled(state: str, two: Group, path: str) -> None:
    check(two, "fsdp", state, path)


@pytest.mark.parametrize("way", ["fsdp", "by_hand"])
def test_first_values_are_the_same_whatever_the_mesh(way: str, four: Group, path: str) -> None:
    init = {"blocks.1.out": "default", "norm": {"weight": "normal(std=0.5)", "bias": "zeros"}}
    check(four, way, "built", path, init=init, seed=3)


def test_what_is_kept_stays(two: Group, path: str) -> None:
    check(two, "fsdp", "built", path, keep="norm")


def refuse(path: str, arguments: dict[str, Any], only: int | None) -> list[str]:
    """The codes of the error that a load raises; one rank alone gets the arguments where it is named."""
    torch.manual_seed(0)
    model = fsdp(Net())
    before = whole(model)
    given = arguments if only in (None, dist.get_rank()) else {}
    try:
        cs.load_into(model, given.pop("source", path), RECIPE, **given)
    except cs.CkptSurgeryError as error:
        after = whole(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        return [d.code for d in error.diagnostics]
    return []


def test_an_error_is_the_same_on_all_ranks(two: Group, path: str) -> None:
    assert two(refuse, path, {"init": "nothing.there"}, None) == two(refuse, path, {"init": "nothing.there"}, None)
    first, second = two(refuse, path, {"source": "no-such-file.safetensors"}, 1)
    assert first == second == ["missing-file"]
    first, second = two(refuse, path, {"keep": "norm"}, 1)
    assert first == second == ["ranks-differ"]


def refused_values(path: str, sharded: bool) -> str:
    model = fsdp(Net()) if sharded else Net()
    try:
        cs.load_into(model, path, RECIPE, check_values=True)
    except cs.LoadError as error:
        return str(error)
    return ""


def test_values_that_are_not_finite_are_told_as_in_one_process(two: Group, path: str, tmp_path: Path) -> None:
    assert two(refused_values, path, True) == ["", ""]
    state = source()
    for key in ("tok.weight", "layers.0.q.bias", "norm.bias"):
        state[key].view(-1)[1] = float("inf")
    save_file(state, tmp_path / "bad.safetensors")
    told = refused_values(str(tmp_path / "bad.safetensors"), False)
    assert "3 source tensors hold" in told
    assert two(refused_values, str(tmp_path / "bad.safetensors"), True) == [told, told]


def from_dcp(folder: str) -> Any:
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    model = by_hand(Net())
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    torch.manual_seed(5)
    other = fsdp(Net())
    cs.load_into(other, folder)
    a, b = whole(model), whole(other)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_of_one_mesh_loads_into_another(two: Group, four: Group, tmp_path: Path) -> None:
    assert all(two(from_dcp, str(tmp_path / "two"))) and all(four(from_dcp, str(tmp_path / "four")))
