"""The users' axes: what is read and where it goes; small factories, and a check for each cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from steps import BF16, F16, F32, I64, STEPS, State, known, recipe_of
from torch import nn

import ckptsurgery as cs

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
