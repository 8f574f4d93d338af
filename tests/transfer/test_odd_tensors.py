"""Tensors that are no plain array, on either side of a load: read or refused by name, no traceback, no loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckptsurgery as cs

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


def test_a_conversion_says_what_stays_behind(tmp_path: Path) -> None:
    torch.save({"odd": ODD["sparse"](), "b": torch.ones(2)}, tmp_path / "x.pt")
    plan = cs.plan(tmp_path / "x.pt", cs.Recipe(rest="keep"))
    report = plan.save(tmp_path / "x.safetensors")
    assert "odd" in str(plan) and "odd" in str(report) and "to_dense" in str(report)


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
