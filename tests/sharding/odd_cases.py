"""Models on odd meshes: each case is loaded, saved and resharded by ranks, and compared with one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ckptsurgery as cs

State = dict[str, torch.Tensor]


class Part(nn.Module):
    """A module that holds what it is given."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Any) -> Any:
        return x


def param(*shape: int, dtype: torch.dtype = torch.float32, trains: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, -7.0).to(dtype), requires_grad=trains)


def numbers(*shape: int, first: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(first, first + torch.Size(shape).numel()).reshape(shape).to(dtype)


def grid() -> DeviceMesh:
    """Two dimensions where four ranks are, and a first one of size 1 elsewhere."""
    size = dist.get_world_size()
    shape = (2, 2) if size == 4 else (1, size)
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def put(module: nn.Module, name: str, mesh: DeviceMesh, *ways: Any) -> None:
    """Distribute a parameter."""
    old = module._parameters[name]
    assert old is not None
    module._parameters[name] = nn.Parameter(distribute_tensor(old.detach(), mesh, list(ways)), old.requires_grad)


class Case:
    """A source, a recipe, a model, and ways to distribute it."""

    rules: list[str] = []
    arguments: dict[str, Any] = {}
    dims: dict[str, Any] = {}

    def source(self) -> State:
        raise NotImplementedError

    def model(self) -> Any:
        raise NotImplementedError

    def distribute(self, model: Any) -> Any:
        return model

    def other(self, model: Any) -> Any:
        """Another way, for the target of an exchange."""
        for module in list(model.modules()):
            for name, tensor in list(module._parameters.items()):
                if tensor is not None and not isinstance(tensor, DTensor):
                    put(module, name, line(), Shard(tensor.dim() - 1) if tensor.dim() else Replicate())
        return model

    @property
    def recipe(self) -> cs.Recipe:
        return cs.Recipe(self.rules, dims=self.dims, rest="keep")


class Attention(Case):
    """FSDP2 over tensor parallel; grouped-query attention, fused by groups, with sizes that nothing divides."""

    rules = [
        "{p:q,k,v}.{l} [(g rows:p) ...] -> block.qkv.{l} [(g p rows:p) ...]",
        "o.weight -> block.o.weight",
        "norm.weight -> block.norm.weight",
    ]
    dims = {"g": 3}

    def source(self) -> State:
        found = {"o.weight": numbers(5, 18, first=900), "norm.weight": numbers(5, first=1)}
        for first, (p, rows) in enumerate({"q": 18, "k": 6, "v": 9}.items()):
            found |= {f"{p}.weight": numbers(rows, 5, first=100 * first), f"{p}.bias": numbers(rows, first=500 + first)}
        return found

    def model(self) -> Any:
        qkv = Part(weight=param(33, 5), bias=param(33))
        return Part(block=Part(qkv=qkv, o=Part(weight=param(5, 18)), norm=Part(weight=param(5))))

    def distribute(self, model: Any) -> Any:
        mesh = grid()
        put(model.block.qkv, "weight", mesh["tp"], Shard(0))
        put(model.block.qkv, "bias", mesh["tp"], Shard(0))
        put(model.block.o, "weight", mesh["tp"], Shard(1))
        put(model.block.norm, "weight", mesh["tp"], Replicate())
        fully_shard(model.block, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])


class Experts(Case):
    """Stacked experts by rank, fewer than ranks or not divided by them, inside of activation checkpointing."""

    rules = [
        "experts.{e}.{p:gate,up}.weight [f d] -> moe.gate_up [e (p f) d]",
        "experts.{e}.down.weight [d f] -> moe.down [e f d]",
        "router -> moe.router",
    ]

    def source(self) -> State:
        found = {"router": numbers(2, 3)}
        for e in range(2):
            for n, p in enumerate(("gate", "up")):
                found[f"experts.{e}.{p}.weight"] = numbers(4, 3, first=100 * e + 20 * n)
            found[f"experts.{e}.down.weight"] = numbers(3, 4, first=100 * e + 50)
        return found

    def model(self) -> Any:
        moe = Part(gate_up=param(2, 8, 3), down=param(2, 4, 3), router=param(2, 3))
        return Part(moe=checkpoint_wrapper(moe))

    def distribute(self, model: Any) -> Any:
        moe = model.moe._checkpoint_wrapped_module
        put(moe, "gate_up", line(), Shard(0))
        put(moe, "down", line(), Shard(0))
        return model


class Tied(Case):
    """A tied embedding in tensor parallel, a rank with an empty shard, a frozen part, and bf16 beside fp32 buffers."""

    rules = ["wte -> embed.weight", "scale -> scale", "frozen.w -> old.w", "step -> step"]

    def source(self) -> State:
        return {
            "wte": numbers(3, 4, dtype=torch.bfloat16),
            "scale": numbers(2, first=8),
            "frozen.w": numbers(3, 2, dtype=torch.bfloat16),
            "step": torch.tensor(17),
        }

    def model(self) -> Any:
        embed, head = Part(weight=param(3, 4, dtype=torch.bfloat16)), Part()
        head.register_parameter("weight", embed.weight)
        old = Part(w=param(3, 2, dtype=torch.bfloat16, trains=False))
        return Part(embed=embed, head=head, old=old, scale=torch.zeros(2), step=torch.tensor(0))

    def distribute(self, model: Any) -> Any:
        put(model.embed, "weight", line(), Shard(0))
        model.head._parameters["weight"] = model.embed.weight
        put(model.old, "w", line(), Shard(0))
        return model

    def other(self, model: Any) -> Any:
        put(model.embed, "weight", line(), Shard(1))
        model.head._parameters["weight"] = model.embed.weight
        return model


class Ignored(Case):
    """FSDP2 that ignores a parameter, which stays whole on each rank; uneven rows; a new head."""

    rules = ["a.{l} -> body.{l}", "kept -> kept.weight"]
    arguments = {"init": {"head.weight": "normal(std=0.5)"}, "seed": 5}

    def source(self) -> State:
        return {"a.weight": numbers(7, 3), "a.bias": numbers(7, first=50), "kept": numbers(5, 2, first=70)}

    def model(self) -> Any:
        body, kept = Part(weight=param(7, 3), bias=param(7)), Part(weight=param(5, 2))
        return Part(body=body, kept=kept, head=Part(weight=param(3, 7)))

    def distribute(self, model: Any) -> Any:
        return fully_shard(model, mesh=line(), ignored_params={model.kept.weight})


class Strided(Case):
    """Shards of one axis over both dimensions of a mesh, strided as FSDP2 makes them, and replicas of shards."""

    rules = ["{k...} [a b] -> {k...} [b a]"]

    def source(self) -> State:
        return {"x.w": numbers(3, 7), "y.w": numbers(5, 6, first=30), "z.w": numbers(2, 9, first=70)}

    def model(self) -> Any:
        return Part(x=Part(w=param(7, 3)), y=Part(w=param(6, 5)), z=Part(w=param(9, 2)))

    def distribute(self, model: Any) -> Any:
        mesh = grid()
        put(model.x, "w", mesh["tp"], Shard(0))
        put(model.y, "w", mesh["tp"], Shard(1))
        fully_shard(model.x, mesh=mesh["dp"])
        fully_shard(model.y, mesh=mesh["dp"])
        put(model.z, "w", mesh, Replicate(), Shard(0))
        return model


class Computed(Case):
    """Values that need whole tensors, cast to bf16, and replicas of them."""

    rules = ["w -> a.w | resize_rows(9) | cast(bf16)", "+ w [n d] | mean_over(d) -> b.w [n]", "b -> c.w | cast(bf16)"]

    def source(self) -> State:
        return {"w": numbers(7, 3), "b": numbers(5, first=40)}

    def model(self) -> Any:
        low = torch.bfloat16
        return Part(a=Part(w=param(9, 3, dtype=low)), b=Part(w=param(7)), c=Part(w=param(5, dtype=low)))

    def distribute(self, model: Any) -> Any:
        put(model.a, "w", line(), Shard(0))
        put(model.b, "w", line(), Replicate())
        put(model.c, "w", line(), Shard(0))
        return model


class Buffers(Case):
    """Buffers on a mesh, as `distribute_module` puts them there: persistent and not, 0-dim, empty, of other dtypes."""

    rules = ["w -> w", "b [a b] -> turned [b a]", "n -> count", "none -> none"]

    def source(self) -> State:
        return {"w": numbers(5, 4), "b": numbers(3, 7).bool(), "n": torch.tensor(3), "none": torch.zeros(3, 0)}

    def model(self) -> Any:
        model = Part(w=param(5, 4), turned=torch.zeros(7, 3, dtype=torch.bool), count=torch.tensor(0), none=param(3, 0))
        model.register_buffer("table", numbers(4, 2), persistent=False)
        return model

    def distribute(self, model: Any) -> Any:
        for name, way in (("turned", Shard(0)), ("count", Replicate()), ("table", Replicate())):
            model._buffers[name] = distribute_tensor(model._buffers[name], line(), [way], src_data_rank=None)
        put(model, "w", line(), Shard(0))
        return model


CASES: dict[str, Callable[[], Case]] = {
    kind.__name__: kind for kind in (Attention, Experts, Tied, Ignored, Strided, Computed, Buffers)
}


def whole(state: dict[str, Any]) -> State:
    return {
        name.replace("_checkpoint_wrapped_module.", ""): (
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        ).detach()
        for name, tensor in state.items()
    }


def named(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def differences(what: str, found: State, wanted: State) -> list[str]:
    wrong = [f"{what}: names {sorted({*found} ^ {*wanted})}"] if {*found} != {*wanted} else []
    for name in {*found} & {*wanted}:
        a, b = found[name], wanted[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            wrong.append(f"{what}: {name}")
    return wrong


def check(name: str, folder: str) -> list[str]:
    """Everything that is wrong with a case on this rank."""
    warnings.simplefilter("ignore")
    case, at = CASES[name](), Path(folder)
    if dist.get_rank() == 0:
        save_file({key: tensor.contiguous() for key, tensor in case.source().items()}, at / "source.safetensors")
    dist.barrier()
    plain = case.model()
    expected = cs.load_into(plain, at / "source.safetensors", case.recipe, **case.arguments)
    wanted = whole(named(plain))

    model = case.distribute(case.model())
    grads = {key: tensor.requires_grad for key, tensor in named(model).items()}
    report = cs.load_into(model, at / "source.safetensors", case.recipe, **case.arguments)
    wrong = differences("load", whole(named(model)), wanted)
    wrong += ["gradients"] if grads != {key: tensor.requires_grad for key, tensor in named(model).items()} else []
    rows = [sorted((e.key.replace("_checkpoint_wrapped_module.", ""), e.action) for e in r.ledger)
            for r in (report, expected)]  # fmt: skip
    wrong += ["ledger"] if rows[0] != rows[1] else []
    if not case.arguments:
        wrong += _planned(case, model, at)

    saved = {key: tensor for key, tensor in wanted.items() if key in model.state_dict()}
    cs.save(model, at / "saved")
    wrong += differences("save", cs.open(at / "saved").state_dict(), saved)
    cs.save(model, at / "dcp", format="dcp")
    wrong += differences("save as DCP", cs.open(at / "dcp").state_dict(), saved)
    again = case.other(case.model())
    cs.load_into(again, at / "dcp")
    wrong += differences("load from DCP", whole(named(again)), wanted)
    third = case.distribute(case.model())
    dcp.load(third.state_dict(), checkpoint_id=at / "dcp")
    wrong += differences("dcp.load", whole(named(third)), wanted)

    there = case.other(case.model())
    sync = cs.reshard(model, there)
    sync()
    wrong += differences("reshard", whole(named(there)), wanted)
    back = case.distribute(case.model())
    cs.reshard(there, back)()
    wrong += differences("reshard back", whole(named(back)), wanted)
    dist.barrier()
    return wrong


def _planned(case: Case, model: Any, at: Path) -> list[str]:
    """A plan for the model has the names under which it is saved."""
    plan = cs.plan(at / "source.safetensors", case.recipe, target=model)
    made = {*plan.specs, *plan.ties, *plan.inits}
    return [] if made == {*model.state_dict()} else [f"plan: {sorted(made ^ {*model.state_dict()})}"]


def fewer_columns_than_ranks(path: str) -> bool:
    """Load columns of which FSDP2 over tensor parallel gives the last rank a part of no rows and no columns."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    model = Part(w=param(5, 2))
    put(model, "w", mesh["tp"], Shard(1))
    fully_shard(model, mesh=mesh["dp"])
    cs.load_into(model, {"w": numbers(5, 2)})
    cs.save(model, path)
    rank, local = dist.get_rank(), model.w.to_local()
    return bool(torch.equal(local, numbers(5, 2)[:, rank : rank + 1]) if rank < 2 else not local.numel())


class Table(nn.Module):
    """A weight, and a table that no file holds and that the module computes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = param(5, 4)
        self.register_buffer("angles", torch.zeros(7), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.angles.copy_(torch.arange(7.0))


def computed_tables() -> list[bool]:
    """Load a model on the meta device whose table is on a mesh, by rows and as copies."""
    right = []
    for way in (Shard(0), Replicate()):
        with torch.device("meta"):
            model = Table()
        model.angles = distribute_tensor(model.angles, line(), [way], src_data_rank=None)
        put(model, "weight", line(), way)
        cs.load_into(model, {"weight": numbers(5, 4)})
        right.append(isinstance(model.angles, DTensor) and model.angles.placements == (way,))
        right.append(torch.equal(model.angles.full_tensor(), torch.arange(7.0)))
    return right
