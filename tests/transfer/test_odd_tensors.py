"""Tensors that are no plain array, on either side of a load: read or refused by name, no traceback, no loss."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs
from ckptsurgery.ops import Specs, Tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*(Sparse|quantize|nested|storage).*:UserWarning")

ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


def buffers(**tensors: Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    return model


@pytest.mark.parametrize("kind", ODD)
def test_in_memory_they_are_refused_by_name(kind: str) -> None:
    for source in ({"inner.odd": ODD[kind](), "b": torch.ones(2)}, {"model": {"inner.odd": ODD[kind]()}}):
        with pytest.raises(cs.CheckpointError, match=r"inner\.odd"):
            cs.load_into(buffers(b=torch.zeros(2)), source)


@pytest.mark.parametrize("kind", ODD)
def test_in_a_file_they_are_an_error_until_dropped(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"odd": ODD[kind](), "b": torch.ones(2)}, path)
    with pytest.raises(cs.LoadError) as error:
        cs.load_into(buffers(b=torch.zeros(2)), path)
    assert 'drop=["odd"]' in str(error.value)
    for settled in ({"drop": "odd"}, {"partial": True}):
        model = buffers(b=torch.zeros(2))
        report = cs.load_into(model, path, **settled)
        assert model.b.tolist() == [1, 1] and any("odd" in note for note in report.notes)


def refused(attempt: Callable[[], object]) -> str:
    """The error of an attempt; it names each tensor that cannot be read, with its kind."""
    with pytest.raises(cs.CkptSurgeryError, match="unreadable-tensors") as error:
        attempt()
    told = next(d for d in error.value.diagnostics if d.code == "unreadable-tensors")
    text = f"{told.headline} {told.notes}"
    assert all(f"{name}: " in text for name in ("h.1.odd", "h.2.odd", "x.{y}")), text
    return told.help or ""


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Tensors that cannot be read beside others; the names of one kind have numbers that the others have too."""
    odd = torch.eye(3).to_sparse()
    state = {f"h.{i}.odd": torch.eye(3) if i in (0, 3) else odd for i in range(4)}
    torch.save({"state_dict": {**state, "x.{y}": odd, "b": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize("name", ["y.safetensors", "y.pt", "y"])
def test_the_line_that_a_refused_conversion_names_converts_the_rest(name: str, mixed: Path, tmp_path: Path) -> None:
    line = refused(lambda: cs.plan(mixed, "{k...} -> m.{k...}"))
    pasted = tomllib.loads(line.partition(" in the recipe")[0])
    assert len(pasted["drop"]) == 2  # the names of one kind are folded
    plan = cs.plan(mixed, cs.Recipe(["{k...} -> m.{k...}"], **pasted))
    report = plan.save(tmp_path / name, check=True)
    assert report.dropped == ("h.1.odd", "h.2.odd", "x.{y}") and "h.{1,2}.odd" in str(plan)
    made = cs.open(tmp_path / name)
    assert list(made) == ["m.h.0.odd", "m.h.3.odd", "m.b"] and not made.unreadable
    assert torch.equal(made.load("m.h.3.odd"), torch.eye(3))


def test_so_does_the_line_on_the_command_line(mixed: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "y.safetensors")
    command = [sys.executable, "-m", "ckptsurgery", "convert", str(mixed), target]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 1 and not Path(target).exists()
    options = "--drop" + first.stderr.partition("--drop")[2].partition(" leaves")[0]
    assert subprocess.run(command + shlex.split(options), capture_output=True).returncode == 0
    assert list(cs.open(target)) == ["h.0.odd", "h.3.odd", "b"]


def test_whatever_reads_all_of_a_file_refuses_what_it_cannot_read(mixed: Path, tmp_path: Path) -> None:
    helps = [
        refused(attempt)
        for attempt in (
            lambda: cs.save(mixed, tmp_path / "y.safetensors"),
            lambda: cs.plan(mixed, cs.Recipe(rest="keep")).state_dict(),
            lambda: cs.open(mixed).state_dict(),
            lambda: cs.diff(mixed, mixed),
            lambda: cs.plan({"b": torch.ones(2)}, "b -> b", target=mixed),
            lambda: cs.load_into(buffers(b=torch.zeros(2)), mixed),
        )
    ]
    assert not (tmp_path / "y.safetensors").exists()
    source, path = mixed, tmp_path / "y.safetensors"
    eval(helps[0].removesuffix(" leaves them out"), {"cs": cs, "source": source, "path": path})
    ckpt = cs.open(mixed)
    others = eval(helps[2].removesuffix(" gives the others"), {"ckpt": ckpt})
    assert list(others) == list(cs.open(path)) == ["h.0.odd", "h.3.odd", "b"]
    assert not cs.doctor(mixed).healthy and "x.{y}: a sparse tensor" in str(cs.summary(mixed))
    with pytest.raises(cs.CheckpointError, match="sparse"):
        ckpt["h.1.odd"]


def test_a_rule_that_would_read_one_stands_beside_the_line_that_drops_it(tmp_path: Path) -> None:
    torch.save({"a.odd": torch.eye(3).to_sparse(), "a.b": torch.ones(2)}, tmp_path / "x.pt")
    rules = ["a.odd -> odd", "a.{k} -> {k}"]
    with pytest.raises(cs.PlanError, match=r'drop = \["a.odd"\]') as error:
        cs.plan(tmp_path / "x.pt", rules)
    assert [d.code for d in error.value.diagnostics] == ["unreadable-tensors"]
    assert list(cs.plan(tmp_path / "x.pt", cs.Recipe(rules, drop=["a.odd"])).specs) == ["b"]
    assert list(cs.plan(tmp_path / "x.pt", cs.Recipe(["a.b -> b"], rest="drop")).specs) == ["b"]


def test_the_line_is_for_the_names_without_a_wrapper_where_a_recipe_is(tmp_path: Path) -> None:
    torch.save({"module.odd": torch.eye(3).to_sparse(), "module.b": torch.ones(2)}, tmp_path / "x.pt")
    target = {"c": cs.TensorSpec([2], "F32")}
    with pytest.raises(cs.PlanError, match=r'module.odd: a sparse tensor(.|\n)*drop = \["odd"\]'):
        cs.plan(tmp_path / "x.pt", "b -> c", target)
    plan = cs.plan(tmp_path / "x.pt", cs.Recipe(["b -> c"], drop=["odd"]), target)
    assert plan.dropped == {"module.odd": "odd"} and list(plan.specs) == ["c"]
    report = cs.load_into(buffers(c=torch.zeros(2)), tmp_path / "x.pt", cs.Recipe(["b -> c"], drop=["odd"]))
    assert report.dropped == ("module.odd",) and report.loaded == ("c",)


def test_an_optimizer_beside_a_tensor_that_is_dropped_is_spoken_of(tmp_path: Path) -> None:
    model = {"odd": torch.eye(3).to_sparse(), "b": torch.ones(2)}
    optimizer = {"state": {0: {"m": torch.ones(3, 3)}, 1: {"m": torch.ones(2)}}, "param_groups": [{"params": [0, 1]}]}
    torch.save({"model": model, "optimizer": optimizer}, tmp_path / "x.pt")
    with pytest.raises(cs.PlanError, match="optimizer"):
        cs.plan(tmp_path / "x.pt", cs.Recipe(rest="keep", drop=["odd"])).save(tmp_path / "y.pt")


def test_an_op_that_returns_no_plain_tensor_is_refused() -> None:
    @cs.op
    class MadeSparse(cs.Op):
        "Make tensors sparse."

        name = "made_sparse"

        def infer(self, specs: Specs) -> Specs:
            return specs

        def run(self, tensors: Tensors) -> Tensors:
            return tuple(t.to_sparse() for t in tensors)

    with pytest.raises(cs.CheckpointError, match="the result of made_sparse' is not plain memory: a sparse tensor"):
        cs.plan({"w": torch.eye(3)}, "w -> v | made_sparse").state_dict()


def test_sizes_are_those_of_the_whole_or_refused() -> None:
    with pytest.raises(cs.LoadError, match="'a' is not plain memory: a sparse tensor"):
        cs.summary(buffers(a=torch.eye(3).to_sparse()))
    model = buffers(a=torch.eye(3).to_sparse())
    assert cs.select(model, buffers=True).numel == 9 and cs.ties(model) == ()


def test_a_kept_tensor_of_any_kind_stays_and_the_rest_is_loaded() -> None:
    model = buffers(adjacency=torch.eye(3).to_sparse(), b=torch.zeros(2))
    with pytest.raises(cs.LoadError, match="adjacency"):
        cs.load_into(model, {"b": torch.ones(2)}, init="adjacency")
    report = cs.load_into(model, {"b": torch.ones(2)}, keep="adjacency")
    assert report.kept == ("adjacency",) and model.b.tolist() == [1, 1] and model.adjacency.is_sparse


def test_a_tie_that_the_model_does_not_have_is_noted_with_the_line_that_makes_it(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))

    tied = build()
    cs.tie(tied, "1.weight", to="0.weight")
    cs.save(tied, tmp_path / "x.safetensors")
    for assign in (False, True):
        model = build()
        report = cs.load_into(model, tmp_path / "x.safetensors", assign=assign)
        note = next(note for note in report.notes if "one tensor in the source" in note)
        assert "0.weight, 1.weight" in note and cs.ties(model) == ()
        eval(note.partition("to tie them: ")[2], {"cs": cs, "model": model})
        assert model[1].weight is model[0].weight
        again = cs.load_into(model, tmp_path / "x.safetensors", assign=assign)
        assert not any("one tensor" in note for note in again.notes)


@pytest.mark.parametrize("form", ["x.pt", "x.safetensors", "folder"])
@pytest.mark.parametrize("assign", [False, True])
def test_every_dtype_that_a_file_holds_arrives_bit_for_bit(form: str, assign: bool, tmp_path: Path) -> None:
    kinds = [
        "complex64",
        "bool",
        "uint8",
        "int8",
        "int16",
        "uint16",
        "uint32",
        "uint64",
        "int64",
        "float16",
        "bfloat16",
    ]
    kinds += ["float64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    source = {f"a {k}": torch.arange(1, 5).to(getattr(torch, k)) for k in kinds} | {
        "scalar": torch.tensor(3, dtype=torch.int32)
    }
    cs.save(source, tmp_path / form)
    model = buffers(**{k: torch.ones_like(v) for k, v in source.items()})
    report = cs.load_into(model, tmp_path / form, assign=assign, check_values=True)
    state = model.state_dict()
    for key, value in source.items():
        assert state[key].dtype == value.dtype, key
        assert bytes(state[key].reshape(-1).view(torch.uint8).numpy()) == bytes(
            value.reshape(-1).view(torch.uint8).numpy()
        )
    assert not report.cast


def test_a_target_that_shows_one_value_many_times_is_refused_before_the_first_write() -> None:
    model = buffers(a=torch.zeros(2), w=torch.zeros(1).expand(3))
    source = {"a": torch.ones(2), "w": torch.arange(3.0)}
    with pytest.raises(cs.LoadError, match="assign=True"):
        cs.load_into(model, source)
    assert model.a.tolist() == [0, 0]
    cs.load_into(model, source, assign=True)
    assert model.w.tolist() == [0, 1, 2]


def test_a_source_that_shows_one_value_many_times_becomes_a_tensor_of_its_own() -> None:
    model = nn.Linear(3, 3)
    one = torch.ones(1, 3)
    cs.load_into(model, {"weight": one.expand(3, 3), "bias": torch.zeros(()).expand(3)}, assign=True)
    with torch.no_grad():
        model.weight[0] += 1
    assert model.weight[1].tolist() == [1, 1, 1] and one.tolist() == [[1, 1, 1]]


def test_no_elements_are_elements_too(tmp_path: Path) -> None:
    cs.save({"w": torch.zeros(0, 3)}, tmp_path / "x.safetensors")
    for assign in (False, True):
        model = buffers(w=torch.zeros(0, 3))
        assert cs.load_into(model, tmp_path / "x.safetensors", assign=assign, check_values=True).loaded == ("w",)
