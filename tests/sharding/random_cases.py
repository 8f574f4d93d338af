"""Random sharded cases: a recipe of random parts, a model on a random mesh, and a checkpoint of another mesh.

Each case compares what ranks do together with what one process does: `load_into` from a file and from a folder of
`torch.distributed.checkpoint`, `save` in both formats, `dcp.load` through a recipe, and `reshard`.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from resharding_cases import MESHES, distribute_tensor, held, mesh_of
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import ckptsurgery as cs

State = dict[str, torch.Tensor]
SIZES = (1, 2, 3, 4, 5, 7, 8, 12)


@dataclass
class Parts:
    """A source, the specs of a target, and the rules between them."""

    draw: random.Random
    source: State = field(default_factory=dict)
    target: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)
    ties: list[tuple[str, str]] = field(default_factory=list)
    init: dict[str, str] = field(default_factory=dict)
    whole: bool = False
    values: Iterator[int] = field(default_factory=lambda: count(1))

    def size(self) -> int:
        return self.draw.choice(SIZES)

    def shape(self, least: int = 0) -> tuple[int, ...]:
        return tuple(self.size() for _ in range(self.draw.randint(least, 3)))

    def given(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> str:
        """A source tensor whose elements are all different."""
        numel = torch.Size(shape).numel()
        first = next(self.values) * 100
        self.source[name] = torch.arange(first, first + numel).reshape(shape).to(dtype)
        return name

    def wanted(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.target[name] = shape, dtype


def move(parts: Parts, s: str, t: str) -> None:
    shape, dtype = parts.shape(), parts.draw.choice([torch.float32, torch.float64, torch.int64, torch.bfloat16])
    parts.given(f"{s}w", *shape, dtype=dtype)
    parts.wanted(f"{t}w", *shape, dtype=dtype)
    parts.rules.append(f"{s}w -> {t}w")


def cast(parts: Parts, s: str, t: str) -> None:
    shape = parts.shape(1)
    parts.given(f"{s}w", *shape)
    parts.wanted(f"{t}w", *shape, dtype=torch.bfloat16)
    parts.rules.append(f"{s}w -> {t}w | cast(bf16)")


def permute(parts: Parts, s: str, t: str) -> None:
    axes = "abc"[: parts.draw.randint(2, 3)]
    sizes = {axis: parts.size() for axis in axes}
    turned = parts.draw.sample(axes, len(axes))
    parts.given(f"{s}w", *sizes.values())
    parts.wanted(f"{t}w", *(sizes[axis] for axis in turned))
    parts.rules.append(f"{s}w [{' '.join(axes)}] -> {t}w [{' '.join(turned)}]")


def fuse(parts: Parts, s: str, t: str) -> None:
    """q, k and v of unequal rows, along the first or the last axis."""
    rows, d, first = [parts.size() for _ in "qkv"], parts.size(), parts.draw.random() < 0.5
    for p, n in zip("qkv", rows):
        parts.given(f"{s}{p}", *((n, d) if first else (d, n)))
    parts.wanted(f"{t}qkv", *((sum(rows), d) if first else (d, sum(rows))))
    parts.rules.append(
        f"{s}{{p:q,k,v}} [r:p d] -> {t}qkv [(p r:p) d]" if first else f"{s}{{p:q,k,v}} [d r:p] -> {t}qkv [d (p r:p)]"
    )


def split(parts: Parts, s: str, t: str) -> None:
    """Interleaved parts, which several tensors get."""
    n, d, p = parts.size(), parts.size(), parts.draw.choice(["up,down", "a,b,c"])
    names = p.split(",")
    parts.given(f"{s}w", n * len(names), d)
    for name in names:
        parts.wanted(f"{t}{name}", n, d)
    order = parts.draw.choice(["(p n)", "(n p)"])
    parts.rules.append(f"{s}w [{order} d] -> {t}{{p:{p}}} [n d]")


def stack(parts: Parts, s: str, t: str) -> None:
    e, o, d, turned = parts.draw.randint(1, 7), parts.size(), parts.size(), parts.draw.random() < 0.5
    for number in range(e):
        parts.given(f"{s}{number}.w", o, d)
    parts.wanted(f"{t}w", *((e, d, o) if turned else (e, o, d)))
    parts.rules.append(f"{s}{{e}}.w [o d] -> {t}w [e {'d o' if turned else 'o d'}]")


def unstack(parts: Parts, s: str, t: str) -> None:
    e, o, d = parts.draw.randint(1, 5), parts.size(), parts.size()
    parts.given(f"{s}w", o, e, d)
    for number in range(e):
        parts.wanted(f"{t}{number}.w", o, d)
    parts.rules.append(f"{s}w [o e d] -> {t}{{e}}.w [o d]")


def copy(parts: Parts, s: str, t: str) -> None:
    shape = parts.shape(1)
    parts.given(f"{s}w", *shape)
    parts.wanted(f"{t}a", *shape)
    parts.wanted(f"{t}b", *shape)
    parts.rules.append(f"{s}w -> {t}a, {t}b")


def tied(parts: Parts, s: str, t: str) -> None:
    """Two names of one tensor of the model, of which the source has one or both."""
    shape = parts.shape(1)
    parts.given(f"{s}a", *shape)
    parts.wanted(f"{t}a", *shape)
    parts.wanted(f"{t}b", *shape)
    parts.ties.append((f"{t}a", f"{t}b"))
    if parts.draw.random() < 0.5:
        parts.source[f"{s}b"] = parts.source[f"{s}a"].clone()
        parts.rules.append(f"{s}{{p:a,b}} -> {t}{{p}}")
    else:
        parts.rules.append(f"{s}a -> {t}a")


def whole_op(parts: Parts, s: str, t: str) -> None:
    """What has to see whole tensors."""
    n, d = parts.draw.randint(2, 8), parts.size()
    parts.whole = True
    parts.given(f"{s}w", n, d)
    if parts.draw.random() < 0.5:
        parts.wanted(f"{t}w", n)
        parts.rules.append(f"{s}w [n d] -> {t}w [n] | mean_over(d)")
        parts.rules[-1] = f"{s}w [n d] | mean_over(d) -> {t}w [n]"
    else:
        parts.wanted(f"{t}w", n + 3, d)
        parts.rules.append(f"{s}w -> {t}w | resize_rows({n + 3})")


def arithmetic(parts: Parts, s: str, t: str) -> None:
    shape = parts.shape(1)
    parts.given(f"{s}w", *shape)
    parts.wanted(f"{t}w", *shape)
    parts.rules.append(f"{s}w -> {t}w | mul(0.5) | add(1)")


def joined(parts: Parts, s: str, t: str) -> None:
    """Two sources that go to one op element by element."""
    shape = parts.shape(1)
    for p in "ab":
        parts.given(f"{s}{p}", *shape)
    parts.wanted(f"{t}w", *shape)
    parts.rules.append(f"{s}a, {s}b -> {t}w | lerp(0.25)")


def first_values(parts: Parts, s: str, t: str) -> None:
    parts.wanted(f"{t}w", *parts.shape(1))
    parts.init[f"{t}w"] = "normal(std=0.5)"


KINDS: list[Callable[[Parts, str, str], None]] = [
    move, cast, permute, fuse, split, stack, unstack, copy, tied, whole_op, arithmetic, joined, first_values,
]  # fmt: skip


def drawn(seed: int) -> Parts:
    parts = Parts(random.Random(seed))
    for number in range(parts.draw.randint(2, 6)):
        parts.draw.choice(KINDS)(parts, f"s{number}.", f"t{number}.")
    if not parts.source:
        move(parts, "s.", "t.")
    return parts


def recipe_of(parts: Parts) -> cs.Recipe:
    return cs.Recipe(rules=parts.rules)


class Tree(nn.Module):
    """A module that holds parameters under dotted names."""

    def forward(self, x: Any) -> Any:
        return x

    def at(self, name: str) -> tuple[Tree, str]:
        path, _, leaf = name.rpartition(".")
        module: Any = self
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, Tree())
            module = module._modules[part]
        return module, leaf

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Register a parameter, or a buffer where the tensor has no gradients."""
        module, leaf = self.at(name)
        if tensor.is_floating_point():
            module._parameters[leaf] = nn.Parameter(tensor) if not isinstance(tensor, nn.Parameter) else tensor
        else:
            module.register_buffer(leaf, tensor)


def built(parts: Parts) -> Tree:
    """The model, with values that no source has."""
    model = Tree()
    for name, (shape, dtype) in parts.target.items():
        model.put(name, torch.full(shape, -7, dtype=dtype))
    for one, other in parts.ties:
        (a, x), (b, y) = model.at(one), model.at(other)
        b._parameters[y] = a._parameters[x]
    return model


def ways_of(shape: tuple[int, ...]) -> list[Any]:
    return [Replicate(), *(Shard(n) for n in range(len(shape)))]


def placed(model: Tree, draw: random.Random, kinds: list[str], some: bool = True) -> None:
    """Give each tensor random placements on a random mesh; some stay plain."""
    seen: dict[int, torch.Tensor] = {}
    for module in list(model.modules()):
        for registered in (module._parameters, module._buffers):
            for leaf, tensor in list(registered.items()):
                if id(tensor) not in seen:
                    mesh, made = mesh_of(draw.choice(kinds)), tensor.detach()
                    if not some or draw.random() < 0.8:
                        ways = [draw.choice(ways_of(made.shape)) for _ in range(mesh.ndim)]
                        made = distribute_tensor(made, mesh, ways)
                    seen[id(tensor)] = nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
                registered[leaf] = seen[id(tensor)]


def strided(model: Tree, draw: random.Random) -> None:
    """FSDP2 over tensor parallel, whose shards of one axis are strided; on one mesh dim alone, FSDP2."""
    size = dist.get_world_size()
    if size != 4:
        fully_shard(model, mesh=mesh_of("all"), shard_placement_fn=lambda p: _even(p, size, draw))
        return
    mesh = mesh_of("named")
    for module in list(model.modules()):
        for leaf, tensor in list(module._parameters.items()):
            if tensor is None or tensor is not module._parameters[leaf] or isinstance(tensor, DTensor):
                continue  # an earlier name of it has been replaced with it
            if draw.random() < 0.8:
                dims = [n for n, length in enumerate(tensor.shape) if length % 2 == 0] or [None]
                way = draw.choice(dims)
                held = distribute_tensor(tensor.detach(), mesh["tp"], [Replicate() if way is None else Shard(way)])
                new = nn.Parameter(held)
                for other in model.modules():
                    for name, one in other._parameters.items():
                        if one is tensor:
                            other._parameters[name] = new
                module._parameters[leaf] = new
    fully_shard(model, mesh=mesh["dp"])


def _even(parameter: nn.Parameter, size: int, draw: random.Random) -> Shard:
    """Along another axis than the first only where FSDP2 can: without remainders."""
    dims = [n for n, length in enumerate(parameter.shape) if n and length % size == 0]
    return Shard(draw.choice([0, *dims]))


def whole(state: dict[str, Any]) -> State:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in state.items()
    }


def named(model: nn.Module) -> dict[str, Any]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def differences(found: State, wanted: State) -> list[str]:
    wrong = sorted({*found} ^ {*wanted})
    for name in {*found} & {*wanted}:
        a, b = found[name], wanted[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            wrong.append(name)
    return wrong


def sharded_like(parts: Parts, seed: int) -> Tree:
    draw = random.Random(seed + 1)
    kinds = ["all", "square", "turned"] if dist.get_world_size() == 4 else ["all"]
    scalar = any(not shape for shape, _ in parts.target.values())
    model = built(parts)
    if draw.random() < 0.3 and not scalar:
        strided(model, draw)
    else:
        placed(model, draw, kinds)
        if not any(isinstance(tensor, DTensor) for tensor in named(model).values()):
            placed(model, draw, kinds, some=False)
    return model


def ledger(report: cs.Report) -> list[Any]:
    return sorted((e.key, e.action, str(e.spec)) for e in report.ledger)


def on_some_ranks(seed: int, folder: str) -> list[str]:
    """Load and save a model of which some ranks hold no part of some tensors."""
    warnings.simplefilter("ignore")
    for kind in MESHES:
        mesh_of(kind)
    parts, at = drawn(seed), Path(folder, str(seed))
    if dist.get_rank() == 0:
        at.mkdir()
        save_file(parts.source, at / "source.safetensors")
    dist.barrier()
    plain, model = built(parts), built(parts)
    arguments: dict[str, Any] = {"init": parts.init} if parts.init else {}
    expected = cs.load_into(plain, at / "source.safetensors", recipe_of(parts), **arguments)
    placed(plain, random.Random(seed), [*MESHES])
    placed(model, random.Random(seed), [*MESHES])
    report = cs.load_into(model, at / "source.safetensors", recipe_of(parts), **arguments)
    wrong = ["ledger"] if ledger(report) != ledger(expected) else []
    wanted, found = ({k: held(t).detach() for k, t in named(one).items()} for one in (plain, model))
    wrong += [f"load: {name}" for name in differences(found, wanted)]
    cs.save(model, at / "saved")
    values = built(parts)
    cs.load_into(values, at / "source.safetensors", recipe_of(parts), **arguments)
    return wrong + [f"save: {n}" for n in differences(cs.open(at / "saved").state_dict(), whole(named(values)))]


def check(seed: int, folder: str) -> list[str]:
    """Everything that is wrong with one case on this rank."""
    warnings.simplefilter("ignore")
    for kind in ("all", "square", "turned", "named") if dist.get_world_size() == 4 else ("all",):
        mesh_of(kind)
    parts = drawn(seed)
    recipe, at = recipe_of(parts), Path(folder, str(seed))
    if dist.get_rank() == 0:
        at.mkdir()
        save_file(parts.source, at / "source.safetensors")
    dist.barrier()
    plain = built(parts)
    arguments: dict[str, Any] = {"init": parts.init} if parts.init else {}
    expected = cs.load_into(plain, at / "source.safetensors", recipe, **arguments)
    values = whole(named(plain))
    wrong = []

    model = sharded_like(parts, seed)
    report = cs.load_into(model, at / "source.safetensors", recipe, **arguments)
    wrong += [f"load: {name}" for name in differences(whole(named(model)), values)]
    wrong += ["load: ledger"] if ledger(report) != ledger(expected) else []
    wrong += [f"load: {a}, {b} untied" for a, b in parts.ties if named(model)[a] is not named(model)[b]]

    trainer = Tree()
    for name, tensor in parts.source.items():
        trainer.put(name, tensor.clone())
    placed(trainer, random.Random(seed + 2), ["all", "square"] if dist.get_world_size() == 4 else ["all"])
    dcp.save(named(trainer), checkpoint_id=at / "dcp")
    other = sharded_like(parts, seed + 5)
    cs.load_into(other, at / "dcp", recipe, **arguments)
    wrong += [f"load from DCP: {name}" for name in differences(whole(named(other)), values)]

    cs.save(model, at / "saved")
    wrong += [f"save: {name}" for name in differences(cs.open(at / "saved").state_dict(), values)]
    cs.save(model, at / "saved_dcp", format="dcp")
    wrong += [f"save as DCP: {name}" for name in differences(cs.open(at / "saved_dcp").state_dict(), values)]
    again = sharded_like(parts, seed + 9)
    dcp.load(named(again), checkpoint_id=at / "saved_dcp")
    wrong += [f"dcp.load of ours: {name}" for name in differences(whole(named(again)), values)]

    if not parts.init:
        third = sharded_like(parts, seed + 7)
        absent = {b: a for a, b in parts.ties if f"{b.replace('t', 's', 1)}" not in parts.source}
        wrong += through_reader(third, at / "source.safetensors", recipe.replace(tie=absent), values)
        fourth = sharded_like(parts, seed + 11)
        if not parts.ties:
            cs.reshard(trainer, fourth, recipe)()
            wrong += [f"reshard: {name}" for name in differences(whole(named(fourth)), values)]
    dist.barrier()
    return wrong


def through_reader(model: nn.Module, path: Path, recipe: cs.Recipe, values: State) -> list[str]:
    state = {name: tensor.detach() for name, tensor in named(model).items()}
    try:
        dcp.load(state, storage_reader=cs.StorageReader(path, recipe))
    except dcp.api.CheckpointException as error:  # no Exception
        return [f"StorageReader: {line}" for line in str(error).splitlines() if "Error" in line]
    return [f"StorageReader: {name}" for name in differences(whole(state), values)]
