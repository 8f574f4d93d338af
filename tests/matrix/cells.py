"""The users' axes: what is read, what becomes of it, where it goes; small factories, and plain torch as the judge."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import einops
import safetensors.torch
import torch
from torch import nn

import ckptsurgery as cs

State = dict[str, torch.Tensor]
Judge = Callable[[State], State]

# Shapes have edges inside of 1 MiB regions and chunks, of panels, and of the 2^17 elements that are gathered together.
LARGE = (601, 703)  # 1.6 MiB of float32
ROWS = {"q": 37, "k": 11}


@dataclass(frozen=True)
class Step:
    """What becomes of some tensors.

    Args:
        shapes: source key -> shape and dtype.
        rules: lines of the mapping language.
        made: the same in plain torch.
        ties: target key -> the target key it shares its tensor with.
    """

    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    rules: tuple[str, ...]
    made: Judge
    ties: dict[str, str] = field(default_factory=dict)


F32, BF16, F16, F64, I64, FP8 = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.float8_e4m3fn,
)


def numbered(*parts: tuple[str, tuple[int, ...], torch.dtype]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Each part in three layers."""
    return {key.format(i=i): (shape, dtype) for i in range(3) for key, shape, dtype in parts}


def copied(s: State) -> State:
    return {f"copy.{k.removeprefix('c.')}": t for k, t in s.items() if k.startswith("c.")}


def turned(s: State) -> State:
    made = {f"turn.{i}.w": s[f"t.{i}.w"].T for i in range(3)} | {"turn.large": s["t.large"].T}
    return made | {f"turn.{i}.conv": s[f"t.{i}.conv"].permute(2, 0, 1) for i in range(3)}


def split(s: State) -> State:
    parts = {i: s[f"s.{i}.qkv"].chunk(3) for i in range(3)}
    made = {f"split.{i}.{p}": part for i in range(3) for p, part in zip("qkv", parts[i])}
    return made | {f"split.large.{p}": part.T for p, part in zip("ab", s["s.large"].chunk(2))}


def fused(s: State) -> State:
    made = {f"fuse.{i}.qk": torch.cat([s[f"f.{i}.q"], s[f"f.{i}.k"]]) for i in range(3)}
    return made | {"fuse.large": torch.cat([s["f.large.a"].T, s["f.large.b"].T])}


def mixed(s: State) -> State:
    return {f"mix.{i}": einops.rearrange([s[f"g.{i}.a"], s[f"g.{i}.b"]], "p f d -> (f p) d") for i in range(3)}


def stacked(s: State) -> State:
    experts = [s[f"e.{j}.w"] for j in range(70)]
    turned_ones = [s[f"e.{j}.u"].T for j in range(70)]
    return {"stack.w": torch.stack(experts), "stack.u": torch.stack(turned_ones)}


def cast(s: State) -> State:
    made = {f"cast.{i}.{m}": s[f"k.{i}.{m}"].to(BF16) for i in range(3) for m in "wb"}
    return made | {"cast.large": s["k.large"].T.to(BF16), "cast.wide": s["k.narrow"].float()}


def added(s: State) -> State:
    return {f"add.{i}": s[f"n.{i}"] + 1 for i in range(3)} | {"add.large": s["n.large"] + 1}


def gathered_and_cast(s: State) -> State:
    made = {f"both.{i}": torch.cat([s[f"b.{i}.{p}"] for p in "xyz"]).to(F16) for i in range(3)}
    return made | {"both.large": torch.stack([s["b.large.0"].T, s["b.large.1"].T]).to(BF16)}


def dequantised(s: State) -> State:
    made = {}
    for i in range(3):
        codes, scale = s[f"d.{i}.codes"].float(), s[f"d.{i}.scale"]
        grid = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]
        made[f"fp8.{i}"] = (codes * grid).to(BF16)
    return made


def repeated(s: State) -> State:
    return {f"twice.{p}.{i}": s[f"r.{i}"] for i in range(3) for p in "ab"}


def tied(s: State) -> State:
    return {"tie.embed": s["w.embed"], "tie.head": s["w.embed"], "tie.other": s["w.other"]}


STEPS: dict[str, Step] = {
    "copy": Step(
        numbered(("c.{i}.w", (5, 7), F32), ("c.{i}.odd", (3,), F16), ("c.{i}.flag", (3,), torch.uint8))
        | {"c.large": ((700, 1001), BF16), "c.empty": ((0, 3), F32), "c.scalar": ((), I64)},
        ("c.{r...} -> copy.{r...}",),
        copied,
    ),
    "turn": Step(
        numbered(("t.{i}.w", (33, 65), F32), ("t.{i}.conv", (4, 3, 5), F16)) | {"t.large": (LARGE, F32)},
        (
            "t.{i}.w [x y] -> turn.{i}.w [y x]",
            "t.{i}.conv [a b c] -> turn.{i}.conv [c a b]",
            "t.large [x y] -> turn.large [y x]",
        ),
        turned,
    ),
    "split": Step(
        numbered(("s.{i}.qkv", (33, 19), F32)) | {"s.large": (((606), 703), F32)},
        (
            "s.{i}.qkv [(p d) x] -> split.{i}.{p:q,k,v} [d x]",
            "s.large [(p d) x] -> split.large.{p:a,b} [x d]",
        ),
        split,
    ),
    "fuse": Step(
        numbered(("f.{i}.q", (ROWS["q"], 23), F32), ("f.{i}.k", (ROWS["k"], 23), F32))
        | {f"f.large.{p}": ((403, 501), F32) for p in "ab"},
        (
            "f.{i}.{p:q,k} [rows:p d] -> fuse.{i}.qk [(p rows:p) d]",
            "f.large.{p:a,b} [x y] -> fuse.large [(p y) x]",
        ),
        fused,
    ),
    "mix": Step(
        numbered(("g.{i}.a", (129, 31), F32), ("g.{i}.b", (129, 31), F32)),
        ("g.{i}.{p:a,b} [f d] -> mix.{i} [(f p) d]",),
        mixed,
    ),
    "stack": Step(
        {f"e.{j}.{m}": ((67, 41), F32) for j in range(70) for m in "wu"},
        ("e.{j}.w [o i] -> stack.w [j o i]", "e.{j}.u [o i] -> stack.u [j i o]"),
        stacked,
    ),
    "cast": Step(
        numbered(("k.{i}.w", (17, 29), F32), ("k.{i}.b", (29,), F32))
        | {"k.large": (LARGE, F32), "k.narrow": ((31, 5), BF16)},
        (
            "k.{i}.{m} -> cast.{i}.{m} | cast(bf16)",
            "k.large [x y] -> cast.large [y x] | cast(bf16)",
            "k.narrow -> cast.wide | cast(f32)",
        ),
        cast,
    ),
    "add": Step(
        numbered(("n.{i}", (13, 3), F32)) | {"n.large": (LARGE, F32)},
        ("n.{i:0..2} -> add.{i} | add(1)", "n.large -> add.large | add(1)"),
        added,
    ),
    "gather and cast": Step(
        numbered(*((f"b.{{i}}.{p}", (9, 21), F32) for p in "xyz"))
        | {f"b.large.{j}": ((403, 501), F32) for j in (0, 1)},
        (
            "b.{i}.{p:x,y,z} [o d] -> both.{i} [(p o) d] | cast(f16)",
            "b.large.{j} [x y] -> both.large [j y x] | cast(bf16)",
        ),
        gathered_and_cast,
    ),
    "join": Step(
        numbered(("d.{i}.codes", (200, 261), FP8), ("d.{i}.scale", (2, 3), F32)),
        ("d.{i}.codes, d.{i}.scale -> fp8.{i} | fp8_dequant(block=128)",),
        dequantised,
    ),
    "repeat": Step(
        numbered(("r.{i}", (11, 6), F32)),
        ("r.{i} -> twice.a.{i}, twice.b.{i}",),
        repeated,
    ),
    "tie": Step(
        {"w.embed": ((31, 8), F32), "w.other": ((31, 8), F32)},
        ("w.{m:embed,other} -> tie.{m}",),
        tied,
        {"tie.head": "tie.embed"},
    ),
}


def filled(steps: Sequence[Step]) -> State:
    """Return random sources, so that bytes from a wrong place are wrong bytes."""
    state: State = {}
    for number, (key, (shape, dtype)) in enumerate(pair for step in steps for pair in step.shapes.items()):
        draw = torch.Generator().manual_seed(number)
        if dtype in (I64, torch.uint8):
            state[key] = torch.randint(0, 250, shape, generator=draw, dtype=dtype)
        else:
            state[key] = torch.randn(shape, generator=draw).to(dtype)
    return state


@cache
def known(names: tuple[str, ...]) -> tuple[State, State]:
    """Return sources and what becomes of them; no test may write into either."""
    steps = [STEPS[name] for name in names]
    state = filled(steps)
    return state, judged(steps, state)


def recipe_of(steps: Sequence[Step], **more: Any) -> cs.Recipe:
    rules = [rule for step in steps for rule in step.rules]
    ties = {alias: key for step in steps for alias, key in step.ties.items()}
    return cs.Recipe(rules, tie=ties, **more)


def judged(steps: Sequence[Step], state: State) -> State:
    return {key: tensor.contiguous() for step in steps for key, tensor in step.made(state).items()}


# Sources -----------------------------------------------------------------------------------------------------------


def as_file(state: State, folder: Path) -> Any:
    safetensors.torch.save_file(state, folder / "one.safetensors")
    return folder / "one.safetensors"


def as_shards(state: State, folder: Path) -> Any:
    """Dealt out in turn, so that the tensors of every step are in several files, at offsets that differ."""
    names = [f"model-{n + 1:05d}-of-00003.safetensors" for n in range(3)]
    dealt: list[State] = [{}, {}, {}]
    for number, (key, tensor) in enumerate(state.items()):
        dealt[number % 3][key] = tensor
    for name, shard in zip(names, dealt):
        safetensors.torch.save_file(shard, folder / name)
    table = {key: name for name, shard in zip(names, dealt) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def as_mounts(state: State, folder: Path) -> Any:
    """Every module is a checkpoint of its own, of one of three kinds."""
    parts: dict[str, State] = {}
    for key, tensor in state.items():
        head, _, rest = key.partition(".")
        parts.setdefault(head, {})[rest] = tensor
    mounts: dict[str, Any] = {}
    for number, (head, part) in enumerate(parts.items()):
        (folder / head).mkdir()
        kinds = (as_shards if len(part) > 2 else as_file, as_zip, as_memory)
        mounts[head + "."] = kinds[number % 3](part, folder / head)
    return mounts


def as_memory(state: State, folder: Path) -> Any:
    """Some of the tensors are views that do not lie plainly."""
    made = dict(state)
    for number, (key, tensor) in enumerate(state.items()):
        if tensor.dim() == 2 and tensor.numel() and number % 2:
            made[key] = tensor.T.contiguous().T
    return made


def as_zip(state: State, folder: Path) -> Any:
    torch.save(state, folder / "one.pt")
    return folder / "one.pt"


def as_training(state: State, folder: Path) -> Any:
    torch.save({"epoch": 3, "state_dict": state, "best": 0.5}, folder / "last.ckpt")
    return folder / "last.ckpt"


def as_legacy(state: State, folder: Path) -> Any:
    torch.save(state, folder / "old.bin", _use_new_zipfile_serialization=False)
    return folder / "old.bin"


SOURCES = {
    "file": as_file,
    "shards": as_shards,
    "mounts": as_mounts,
    "memory": as_memory,
    "torch zip": as_zip,
    "training": as_training,
    "legacy": as_legacy,
}


def digest(source: Any, folder: Path) -> str:
    """The bytes of a source, wherever they are."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        found.update(path.read_bytes())
    held = [source] if isinstance(source, dict) else []
    while held:
        for key, value in held.pop().items():
            if isinstance(value, dict):
                held.append(value)
            elif isinstance(value, torch.Tensor):
                found.update(f"{key}{value.stride()}".encode() + raw(value).numpy().tobytes())
    return found.hexdigest()


# Sinks -------------------------------------------------------------------------------------------------------------


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def to_file(plan: cs.Plan, folder: Path) -> Iterator[tuple[cs.Report | None, State]]:
    report = plan.save(folder / "out.safetensors", check=True, sync=False)
    proved(plan, report)
    yield report, whole(safetensors.torch.load_file(folder / "out.safetensors"), plan)
    with cs.open(folder / "out.safetensors") as again:
        yield None, {key: again[key].load() for key in again}


def to_shards(plan: cs.Plan, folder: Path) -> Iterator[tuple[cs.Report | None, State]]:
    report = plan.save(folder / "out", max_shard_size=300_000, check=True, sync=False)
    proved(plan, report)
    shards = [path for path in report.files if path.endswith(".safetensors")]
    found: State = {}
    for path in shards:
        found |= safetensors.torch.load_file(path)
    yield report, whole(found, plan)
    with cs.open(folder / "out") as again:
        assert {frozenset(tie.names) for tie in again.ties} == {frozenset(pair) for pair in plan.ties.items()}
        yield None, {key: again[key].load() for key in again}


def to_zip(plan: cs.Plan, folder: Path) -> Iterator[tuple[cs.Report | None, State]]:
    report = plan.save(folder / "out.pt", check=True, sync=False)
    proved(plan, report)
    found = torch.load(folder / "out.pt", weights_only=True)
    inner = found.get("state_dict", found)
    for alias, key in plan.ties.items():
        assert inner[alias].data_ptr() == inner[key].data_ptr()
    yield report, dict(inner)


def to_memory(plan: cs.Plan, folder: Path) -> Iterator[tuple[cs.Report | None, State]]:
    found = plan.state_dict()
    assert all(tensor.is_contiguous() for tensor in found.values())
    for alias, key in plan.ties.items():
        assert found[alias].data_ptr() == found[key].data_ptr()
    yield None, found


def model_for(plan: cs.Plan, meta: bool) -> nn.Module:
    """A model with a tensor for each key: parameters where they can be, else buffers; tied names share theirs."""
    root = nn.Module()
    with torch.device("meta" if meta else "cpu"):
        for key, spec in plan.specs.items():
            _place(root, key, torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]))
    for alias, key in plan.ties.items():
        _module(root, alias).register_parameter(alias.rpartition(".")[2], root.get_parameter(key))
    return root


DTYPES = {"F32": F32, "BF16": BF16, "F16": F16, "I64": I64, "U8": torch.uint8}


def _module(root: nn.Module, key: str) -> nn.Module:
    for name in key.split(".")[:-1]:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name] or root
    return root


def _place(root: nn.Module, key: str, tensor: torch.Tensor) -> None:
    module, name = _module(root, key), key.rpartition(".")[2]
    if tensor.is_floating_point():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        module.register_buffer(name, tensor)


def to_model(plan: cs.Plan, folder: Path) -> Iterator[tuple[cs.Report | None, State]]:
    model = model_for(plan, meta=False)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    report = plan.load_into(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    _still_tied(model, plan)
    yield report, dict(model.state_dict())


def to_meta_model(plan: cs.Plan, folder: Path) -> Iterator[tuple[cs.Report | None, State]]:
    model = model_for(plan, meta=True)
    report = plan.load_into(model, assign=True)
    _still_tied(model, plan)
    yield report, dict(model.state_dict())


def _still_tied(model: nn.Module, plan: cs.Plan) -> None:
    for alias, key in plan.ties.items():
        assert model.get_parameter(alias) is model.get_parameter(key)


SINKS = {
    "file": to_file,
    "shards": to_shards,
    "torch zip": to_zip,
    "state_dict": to_memory,
    "model": to_model,
    "meta model": to_meta_model,
}


def whole(found: State, plan: cs.Plan) -> State:
    """What a reader that knows no aliases finds, with the aliases."""
    assert not found.keys() & plan.ties.keys()
    return found | {alias: found[key] for alias, key in plan.ties.items()}


def proved(plan: cs.Plan, report: cs.Report) -> None:
    """Reading back has looked at each tensor once."""
    specs = plan.specs.values()
    assert sum(proof.tensors for proof in report.proofs) == len(plan.specs)
    assert sum(proof.nbytes for proof in report.proofs) == sum(spec.nbytes for spec in specs)
    assert report.bytes_written == sum(spec.nbytes for spec in specs)


# Cells -------------------------------------------------------------------------------------------------------------


def hold(source: str, sink: str, names: Sequence[str], folder: Path) -> None:
    """Check one cell: the right values, an unchanged source, a report that counts what the plan counts."""
    state, _ = known(tuple(names))
    inside, outside = folder / "in", folder / "out"
    inside.mkdir()
    outside.mkdir()
    opened = SOURCES[source](state, inside)
    before = digest(opened, inside)
    with cs.open(opened) as checkpoint:
        hold_sink(checkpoint, sink, names, outside)
    assert digest(opened, inside) == before


def hold_sink(checkpoint: cs.Checkpoint, sink: str, names: Sequence[str], folder: Path) -> None:
    plan = cs.plan(checkpoint, recipe_of([STEPS[name] for name in names]))
    _, expected = known(tuple(names))
    for report, found in SINKS[sink](plan, folder):
        same(found, expected)
        if report is not None:
            assert set(report.loaded) == set(plan.specs)
            assert set(report.tied) == set(plan.ties)
            assert not report.missing_keys and not report.unexpected_keys and not report.initialised


def same(found: State, expected: State) -> None:
    """The same keys, shapes, dtypes and bits."""
    assert found.keys() == expected.keys()
    wrong = [
        key
        for key, tensor in expected.items()
        if (found[key].shape, found[key].dtype) != (tensor.shape, tensor.dtype)
        or not torch.equal(raw(found[key]), raw(tensor))
    ]
    assert wrong == []
