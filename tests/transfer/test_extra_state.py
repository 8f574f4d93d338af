"""What modules save beside tensors, and the versions of modules: as torch's own `load_state_dict` hands them over."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs

UNSET = "unset"


class Stateful(nn.Module):
    def __init__(self, state: Any = UNSET) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.state = state
        self.times = 0

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state.read() if isinstance(state, io.BytesIO) else state
        self.times += 1


class Hooked(Stateful):
    """The same under a hook of its own, so that torch's machinery loads it."""

    def __init__(self, state: Any = UNSET) -> None:
        super().__init__(state)
        self.register_load_state_dict_pre_hook(lambda *rest: None)


class Net(nn.Module):
    def __init__(self, kind: type[Stateful], state: Any = UNSET) -> None:
        super().__init__()
        self.m = kind(state)
        self.norm = nn.LayerNorm(2)


def stream() -> io.BytesIO:
    held = io.BytesIO()
    torch.save({"amax": torch.ones(3)}, held)
    held.seek(0)
    return held


STATES: dict[str, Any] = {
    "tensor": lambda: torch.arange(4, dtype=torch.uint8),
    "empty": lambda: torch.empty(0),
    "matrix": lambda: torch.arange(6.0).view(2, 3).T,
    "stream": stream,
    "dict": lambda: {"scale": torch.full((2,), 3.0), "n": 3, "names": ["a", ("b", None)]},
    "ordered": lambda: OrderedDict(a=torch.ones(1), b=OrderedDict(c=2)),
    "list": lambda: [torch.zeros(2, dtype=torch.int64), {"x": [torch.ones(1)]}, True],
    "tuple": lambda: (1, 2.5, "x", b"bytes"),
    "torch": lambda: {"dtype": torch.float8_e4m3fn, "device": torch.device("cpu"), "cuda": torch.device("cuda", 1)},
    "none": lambda: None,
    "int": lambda: 5,
    "text": lambda: "word",
}


def same(a: Any, b: Any) -> bool:
    if isinstance(b, Tensor):
        return isinstance(a, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(b, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in b)
    if isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("kind", [Stateful, Hooked])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", list(STATES))
def test_a_module_gets_what_torch_would_hand_it(name: str, prefix: str, kind: type[Stateful], tmp_path: Path) -> None:
    def offered() -> Any:
        source = Net(kind, STATES[name]())
        return (nn.DataParallel(source) if prefix else source).state_dict()

    torch.save(offered(), tmp_path / "x.pt")
    plain = Net(kind)
    (nn.DataParallel(plain) if prefix else plain).load_state_dict(torch.load(tmp_path / "x.pt", weights_only=False))
    memory = Net(kind)
    (nn.DataParallel(memory) if prefix else memory).load_state_dict(offered())
    for source, wanted in ((tmp_path / "x.pt", plain), (offered(), memory)):
        model = Net(kind)
        report = cs.load_into(model, source)
        assert same(model.m.state, wanted.m.state), (model.m.state, wanted.m.state)
        assert model.m.times == 1 and report.coverage == 1
        assert any("extra state of 'm' set" in note for note in report.notes)


def test_a_state_in_memory_is_the_very_object() -> None:
    state = {"n": [1, 2]}
    model = Net(Stateful)
    cs.load_into(model, Net(Stateful, state).state_dict())
    assert model.m.state is state


def test_a_tensor_state_of_a_safetensors_file_reaches_the_module(tmp_path: Path) -> None:
    state = torch.arange(5, dtype=torch.uint8)
    cs.save(dict(Net(Stateful, state).state_dict()), tmp_path / "x.safetensors")
    model = Net(Stateful)
    cs.load_into(model, tmp_path / "x.safetensors")
    assert same(model.m.state, state)
    with pytest.raises(cs.LoadError, match="_extra_state"):
        cs.load_into(nn.ModuleDict({"m": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "norm": nn.LayerNorm(2)}),
                     tmp_path / "x.safetensors")  # fmt: skip


class Odd:
    """Something that only running code could make."""


def test_what_only_code_could_make_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(Net(Stateful, {"deep": [Odd()]}).state_dict(), tmp_path / "x.pt")
    model = Net(Stateful)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(model, tmp_path / "x.pt")
    (problem,) = error.value.diagnostics
    assert problem.code == "extra-state-unbuilt" and "Odd" in str(problem) and model.m.state == UNSET
    assert all(map(torch.equal, before, model.parameters()))
    assert problem.help == 'drop=["m._extra_state"] loads without'
    report = cs.load_into(model, tmp_path / "x.pt", drop=["m._extra_state"])
    assert report.coverage == 1 and model.m.state == UNSET
    report = cs.load_into(model, tmp_path / "x.pt", partial=True)
    assert any("m._extra_state" in note and "Odd" in note for note in report.notes)


@pytest.mark.parametrize("way", ["init", "keep", "drop"])
@pytest.mark.parametrize("name", ["tensor", "dict"])
def test_a_module_that_is_set_aside_keeps_its_state(way: str, name: str) -> None:
    model = Net(Stateful)
    options = {way: "m"} if way != "drop" else {"drop": "m", "keep": "m.fc"}
    report = cs.load_into(model, Net(Stateful, STATES[name]()).state_dict(), **options)
    assert model.m.state == UNSET and not any("extra state" in note for note in report.notes)


def test_what_is_not_there_or_has_no_place_is_said() -> None:
    source = {k: v for k, v in Net(Stateful, 5).state_dict().items() if "extra" not in k}
    report = cs.load_into(Net(Stateful), source)
    assert "the source has no extra state for 'm'" in report.notes
    model = nn.ModuleDict({"m": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "norm": nn.LayerNorm(2)})
    report = cs.load_into(model, Net(Stateful, 5).state_dict())
    assert "left behind: m._extra_state, no module of the model takes it" in report.notes


def test_a_module_that_refuses_its_state_says_what_was_written() -> None:
    class Strict(Stateful):
        def set_extra_state(self, state: Any) -> None:
            raise ValueError("of another release")

    model = Net(Strict)
    with pytest.raises(cs.LoadError, match="of another release") as error:
        cs.load_into(model, Net(Stateful, 5).state_dict())
    assert set(error.value.written) == {k for k in model.state_dict() if "extra" not in k}


class Turned(nn.Module):
    """Version 1 kept its weight transposed; a square one fits both ways. In place, as some modules do it."""

    _version = 2
    in_place = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") is None or metadata["version"] < 2:
            key = prefix + "weight"
            if self.in_place:
                state[key].copy_(state[key].T.clone())
            else:
                state[key] = state[key].T
        super()._load_from_state_dict(state, prefix, metadata, *rest)


class InPlace(Turned):
    in_place = True


def versioned(kind: type[nn.Module]) -> nn.Module:
    model = nn.ModuleDict({"net": nn.ModuleDict({"t": kind(), "bn": nn.BatchNorm1d(3)}), "fc": nn.Linear(3, 3)})
    with torch.no_grad():
        model["net"]["t"].weight.copy_(torch.arange(9.0).view(3, 3))
    return model


@pytest.mark.parametrize("kind", [Turned, InPlace])
@pytest.mark.parametrize("form", ["x.pt", "x.safetensors", "folder", "shards", "module", "state_dict"])
def test_a_version_goes_along_whatever_the_form(form: str, kind: type[nn.Module], tmp_path: Path) -> None:
    saved: Any = versioned(kind)
    if form == "state_dict":
        saved = saved.state_dict()
    elif form != "module":
        cs.save(saved, tmp_path / form, max_shard_size=64 if form == "shards" else None)
        saved = tmp_path / form
    model = versioned(kind)
    with torch.no_grad():
        model["net"]["t"].weight.zero_()
    report = cs.load_into(model, saved)
    assert torch.equal(model["net"]["t"].weight, torch.arange(9.0).view(3, 3))
    assert not any("version" in note for note in report.notes)
    inner = versioned(kind)["net"]
    cs.load_into(inner, saved, subtree="net")
    assert torch.equal(inner["t"].weight, torch.arange(9.0).view(3, 3))
    both = nn.ModuleDict({"a": versioned(kind), "b": versioned(kind)})
    if form != "state_dict":
        cs.load_into(both, {"a.": saved, "b.": saved})
        assert torch.equal(both["a"]["net"]["t"].weight, torch.arange(9.0).view(3, 3))


@pytest.mark.parametrize("kind", [Turned, InPlace])
def test_an_old_file_is_turned_once_and_the_source_stays_as_it_was(kind: type[nn.Module], tmp_path: Path) -> None:
    old = {k: v.clone() for k, v in versioned(kind).state_dict().items()}
    del old["net.bn.num_batches_tracked"]
    before = {k: v.clone() for k, v in old.items()}
    torch.save(old, tmp_path / "x.pt")
    for source in (old, tmp_path / "x.pt"):
        model = versioned(kind)
        report = cs.load_into(model, source)
        assert torch.equal(model["net"]["t"].weight, torch.arange(9.0).view(3, 3).T)
        assert any("'net.t' is of version 2" in note for note in report.notes)
    assert all(torch.equal(v, before[k]) for k, v in old.items())


def test_versions_follow_renamed_modules_through_safetensors(tmp_path: Path) -> None:
    cs.save(versioned(Turned), tmp_path / "a.safetensors")
    cs.plan(tmp_path / "a.safetensors", ["net.{k...} -> body.{k...}", "fc.{l} -> head.{l}"]).save(
        tmp_path / "b.safetensors"
    )
    subprocess.run(
        [sys.executable, "-m", "ckptsurgery", "convert", tmp_path / "b.safetensors", tmp_path / "c.pt"], check=True,
        capture_output=True,
    )  # fmt: skip
    inner = versioned(Turned)
    for file in ("b.safetensors", "c.pt"):
        model = nn.ModuleDict({"body": versioned(Turned)["net"], "head": nn.Linear(3, 3)})
        cs.load_into(model, tmp_path / file)
        assert torch.equal(model["body"]["t"].weight, inner["net"]["t"].weight)
    state = torch.load(tmp_path / "c.pt")
    assert state._metadata["body.t"] == {"version": 2} and state._metadata["body.bn"] == {"version": 2}


def test_versions_go_along_beside_what_is_drawn(tmp_path: Path) -> None:
    recipe = cs.Recipe(["net.{k...} -> body.{k...}"], drop=["fc"], init={"head [4 3]": "zeros"}, rest="keep")
    recipe = recipe.replace(drop=["fc.{k...}"])
    cs.plan(versioned(Turned), recipe).save(tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt")
    assert state["head"].shape == (4, 3) and state._metadata["body.t"] == {"version": 2}


def test_the_state_of_a_module_without_tensors_goes_along_where_names_stay(tmp_path: Path) -> None:
    source = {"fc.weight": torch.ones(2), "meter._extra_state": {"seen": 5}}
    torch.save(source, tmp_path / "a.pt")
    cs.plan(tmp_path / "a.pt", cs.Recipe(rest="keep")).save(tmp_path / "b.pt")
    assert torch.load(tmp_path / "b.pt")["meter._extra_state"] == {"seen": 5}


@pytest.mark.parametrize("args", [(5,), ("nowhere",), ("cpu", "0")])
def test_a_device_that_is_none_is_not_made(args: tuple[object, ...], tmp_path: Path) -> None:
    class Device:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return torch.device, args

    torch.save(Net(Stateful, {"at": Device()}).state_dict(), tmp_path / "x.pt")
    with pytest.raises(cs.LoadError, match="extra-state-unbuilt"):
        cs.load_into(Net(Stateful), tmp_path / "x.pt")


def test_a_file_without_versions_says_nothing_of_them(tmp_path: Path) -> None:
    report = cs.save(nn.Linear(2, 2), tmp_path / "x.safetensors")
    with cs.open(tmp_path / "x.safetensors") as checkpoint:
        assert not checkpoint.metadata.keys() - {"format"} and not checkpoint.extras
    assert not report.notes
