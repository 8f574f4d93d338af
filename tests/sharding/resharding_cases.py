"""What each rank does in the tests of `reshard`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from test_sharded_loading import WAYS, Net, whole
from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Replicate, Shard, init_device_mesh
from torch.distributed.tensor import distribute_tensor as distribute

import ckptsurgery as cs

State = dict[str, torch.Tensor]


@cache
def mesh_of(kind: str) -> DeviceMesh:
    """A mesh of some or all ranks; all ranks call this, in one order."""
    size = dist.get_world_size()
    if kind == "named":
        return init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    square = torch.arange(size // 2 * 2).view(2, -1)
    ranks = {
        "all": torch.arange(size),
        "square": square,
        "turned": square.t(),
        "first": torch.arange(size // 2),
        "rest": torch.arange(size // 2, size),
        "last": torch.tensor([size - 1]),
    }
    return DeviceMesh("cpu", ranks[kind])


MESHES = ("all", "square", "turned", "first", "rest", "last")


def distribute_tensor(tensor: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Distribute a tensor that all ranks hold already, of any dtype."""
    return distribute(tensor, mesh, placements, src_data_rank=None)


def distributed(state: State, kind: str, draw: random.Random) -> dict[str, Any]:
    """A state dict with random placements on a mesh."""
    mesh = mesh_of(kind)
    made = {}
    for key, tensor in state.items():
        ways = [Replicate(), *(Shard(n) for n in range(tensor.dim()))]
        made[key] = distribute_tensor(tensor, mesh, [draw.choice(ways) for _ in range(mesh.ndim)])
    return made


def held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def anywhere(source: State, target: State, recipe: cs.Recipe, seed: int, bucket: int, arguments: dict[str, Any]) -> str:
    """Reshard between random placements, by call and by stream; returns what was wrong."""
    for kind in MESHES:
        mesh_of(kind)
    draw = random.Random(seed)
    here = distributed(source, draw.choice(MESHES), draw)
    wanted = distributed(target, draw.choice(MESHES), draw)
    there = {key: torch.zeros_like(tensor) for key, tensor in wanted.items()}
    sync = cs.reshard(here, there, recipe, bucket_size=bucket, **arguments)
    for round in range(2):
        for tensor in here.values():
            if round:
                held(tensor).zero_()
        sync()
        for key, tensor in wanted.items():
            if round:
                held(tensor).zero_()
            if not same(held(there[key]), held(tensor)):
                return f"{key} after call {round}"
    streamed = dict(sync.stream())
    mine = {key for key, tensor in wanted.items() if tensor.device_mesh.get_coordinate() is not None}
    if {*streamed} != mine:
        return f"streamed {sorted(streamed)}, not {sorted(mine)}"
    wrong = [key for key, tensor in streamed.items() if not same(tensor, held(wanted[key]))]
    return f"streamed {wrong}" if wrong else ""


class Engine(nn.Module):
    """A model in an engine's names: q, k and v fused, tensors that are one in the trainer are one here."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(11, 7)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"a": nn.Linear(7, 12), "b": nn.Linear(7, 12, bias=False)}) for _ in "12"
        )
        self.out = nn.Linear(7, 11, bias=False)
        self.out.weight = self.tok.weight


RECIPE = cs.Recipe(
    rules=[
        "{p:embed,head}.weight -> {p:tok,out}.weight",
        "blocks.{i}.qkv.{l} [(p g r) d?] -> layers.{i}.a.{l} [(g p r) d?] | cast(bf16)",
        "blocks.{i}.out.weight [a b] -> layers.{i}.b.weight [b a]",
    ],
    drop=["blocks.{i}.scale", "norm.{l}"],
    dims={"g": 2, "p": 3},
)


def trained(way: str) -> nn.Module:
    torch.manual_seed(0)
    return WAYS[way](Net())


def sharded_engine() -> nn.Module:
    """An engine with its first linear layers by rows and the others by columns, all others replicated."""
    torch.manual_seed(1)
    engine = Engine()
    mesh = mesh_of("all")
    for module in engine.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            rows = parameter.shape[0] == 12
            placed = distribute_tensor(
                parameter.detach().to(torch.bfloat16 if rows and name and module.bias is not None else parameter.dtype),
                mesh,
                [Shard(0) if rows else Replicate()],
            )
            module._parameters[name] = nn.Parameter(placed)
    engine.out.weight = engine.tok.weight
    return engine


def plainly(state: State) -> State:
    """What the recipe says, done by torch."""
    made = {"tok.weight": state["embed.weight"], "out.weight": state["embed.weight"]}
    for i in range(2):
        for leaf in ("weight", "bias"):
            parts = [part.chunk(2) for part in state[f"blocks.{i}.qkv.{leaf}"].chunk(3)]
            made[f"layers.{i}.a.{leaf}"] = torch.cat([part[g] for g in range(2) for part in parts]).bfloat16()
        made[f"layers.{i}.b.weight"] = state[f"blocks.{i}.out.weight"].t()
    return made


def step(model: nn.Module) -> None:
    """Change all parameters, as an optimizer does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.25)


def trainer_to_engine(way: str) -> str:
    trainer, engine = trained(way), sharded_engine()
    sync = cs.reshard(trainer, engine, RECIPE)
    before = [p.data_ptr() for p in map(held, engine.parameters())]
    for _ in range(3):
        step(trainer)
        sync()
        expected = plainly(whole(trainer))
        for name, tensor in whole(engine).items():
            if not same(tensor, expected[name]):
                return name
    if before != [p.data_ptr() for p in map(held, engine.parameters())] or engine.out.weight is not engine.tok.weight:
        return "the engine's parameters moved"
    return ""


def whole_stream(way: str) -> str:
    """Every rank gets whole tensors, as loaders of inference engines take them."""
    trainer = trained(way)
    expected = plainly(whole(trainer))
    specs = {key: cs.TensorSpec(t.shape, t.dtype) for key, t in expected.items()}
    sync = cs.reshard(trainer, specs, RECIPE, bucket_size=64)
    found = dict(sync.stream())
    return ", ".join(key for key in expected if key not in found or not same(found[key], expected[key].contiguous()))


def apart() -> str:
    """A trainer on the first ranks, whole engines in plain tensors by rank on the others."""
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4 * (size // 2), 6, generator=generator)
    here = {"w": distribute_tensor(weight, mesh_of("first"), [Shard(1)])}
    mine = {"w": torch.zeros(4, 6)}
    there = {f"rank{rank - size // 2}/": mine} if rank >= size // 2 else None
    sync = cs.reshard(
        here if rank < size // 2 else None, there, "w [(r o) i] -> rank{r}/w [o i]", dims={"r": size // 2}
    )
    sync()
    if sync.wire_bytes != weight.nbytes:
        return f"{sync.wire_bytes} bytes for {weight.nbytes}"
    part = weight.chunk(size // 2)[rank - size // 2] if there else mine["w"]
    return "" if same(mine["w"], part) else f"rank {rank}"


def stages() -> str:
    """Each rank holds its stage of a pipeline; one model takes them all."""
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = {f"blocks.{rank}.w": torch.full((3,), float(rank))}
    engine = {f"layers.{n}.w": torch.zeros(3) for n in range(size)}
    cs.reshard(mine, engine, "blocks.{i}.{r...} -> layers.{i}.{r...}")()
    return "" if all(bool((engine[f"layers.{n}.w"] == n).all()) for n in range(size)) else f"rank {rank}"


def refusal(what: str) -> tuple[list[str], str]:
    """The codes of an error, the same on all ranks, and its text."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    mesh = mesh_of("all")
    source: dict[str, Any] = {"a": distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]), "b": torch.ones(2)}
    target: dict[str, Any] = {"a": torch.zeros(5, 3), "b": torch.zeros(2)}
    recipe: Any = None
    arguments: dict[str, Any] = {}
    if what == "missing":
        target["c"] = torch.zeros(1)
    elif what == "new":
        source["c"] = torch.zeros(1)
    elif what == "dtype":
        target["b"] = torch.zeros(2).bfloat16()
    elif what == "one rank":
        recipe = "a -> a" if rank == 1 else None
    elif what == "bad on one rank":
        source = 3 if rank == 1 else source  # type: ignore[assignment]
    elif what == "tied":
        target["b"] = torch.zeros(5, 3)
        source["b"] = torch.ones(5, 3)
        target["a"] = target["b"]
    elif what == "shapes":
        source["b"] = torch.ones(2 + rank)
    elif what == "first values":
        recipe = cs.Recipe(rules=["a -> a"], drop=["b"], init={"b": "zeros"})
    elif what == "nobody":
        target = None  # type: ignore[assignment]
    elif what == "value":
        target["b"], source["b"] = torch.zeros(2).half(), torch.full((2,), 1e6 if rank == 0 else 1.0)
        arguments = {"dtype": "model"}
    elif what == "hole":
        source["a"] = source["a"] if rank else None
    try:
        sync = cs.reshard(source, target, recipe, **arguments)
        if what == "replaced":
            target["a"].resize_(2, 3) if rank == 1 else None
            state = sync.target.tensors
            state["a"] = target["a"]
        sync()
    except cs.CkptSurgeryError as error:
        return [problem.code for problem in error.diagnostics], str(error)
    return [], ""


def quantised() -> str:
    """An op that needs whole tensors runs on one rank each, and its boxes are sent."""
    generator = torch.Generator().manual_seed(0)
    mesh = mesh_of("all")
    state = {}
    for n in range(5):
        state[f"{n}.w"] = torch.randn(8, 8, generator=generator).to(torch.float8_e4m3fn)
        state[f"{n}.s"] = torch.rand(2, 2, generator=generator)
    here = {key: distribute_tensor(t, mesh, [Shard(0)]) for key, t in state.items()}
    target = {f"{n}": distribute_tensor(torch.zeros(8, 8), mesh, [Shard(1)]) for n in range(5)}
    recipe = "{n}.w, {n}.s -> {n} | fp8_dequant(block=4)"
    specs = {key: cs.TensorSpec(tensor.shape, tensor.dtype) for key, tensor in target.items()}
    expected = cs.plan(state, recipe, specs, dtype="model").state_dict()
    sync = cs.reshard(here, target, recipe, dtype="model", bucket_size=300)
    sync()
    sync()
    found = {key: tensor.full_tensor() for key, tensor in target.items()}
    return ", ".join(key for key in expected if not same(found[key], expected[key]))


def calls(count: int) -> tuple[int, int]:
    """How often memory is looked for, and how often views of it are made, in the hundredth call."""
    from ckptsurgery.resharding import holdings, sending_boxes

    mesh = mesh_of("all")
    here = {f"{n}": distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]) for n in range(count)}
    there = {f"{n}": distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]) for n in range(count)}
    sync = cs.reshard(here, there)
    for _ in range(2):
        sync()
    made = []
    find, view = holdings.Holding._find, sending_boxes._view
    holdings.Holding._find = lambda *args: made.append("find")  # type: ignore[assignment]
    sending_boxes._view = lambda *args: made.append("view")  # type: ignore[assignment]
    try:
        sync()
    finally:
        holdings.Holding._find, sending_boxes._view = find, view
    return made.count("find"), made.count("view")
