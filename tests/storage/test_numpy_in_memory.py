"""Numpy arrays in memory are read as tensors are: their values, whatever way they are laid out; or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ckptsurgery as cs

ARRAYS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "strided": np.arange(20, dtype=np.int16)[3::4],
    "backwards": np.arange(5, dtype=np.int64)[::-1],
    "big endian": np.arange(4, dtype=">i4"),
    "scalar": np.array(2.5, np.float16),
    "empty": np.zeros((0, 3), np.uint8),
    "codes": np.arange(3, dtype=np.uint16),
    "flags": np.array([True, False]),
    "complex": np.array([1 + 2j], np.complex64),
    "broadcast": np.broadcast_to(np.float32(7), (3, 2)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_opens_and_goes_into_a_file(name: str, tmp_path: Path) -> None:
    array = ARRAYS[name]
    source = {"w": array, "other": torch.ones(2)}
    with cs.open(source) as checkpoint:
        assert checkpoint["w"].shape == array.shape
        assert np.array_equal(checkpoint["w"].load().numpy(), array)
    cs.save(source, tmp_path / "x.safetensors")
    with cs.open(tmp_path / "x.safetensors") as written:
        assert np.array_equal(written["w"].load().numpy(), array)
    made = cs.plan({"w": array}, "w -> v").state_dict()["v"]
    made.fill_(0)
    assert np.array_equal(source["w"], array)


def test_arrays_load_into_a_model_through_rules() -> None:
    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)
    model = torch.nn.Linear(2, 3)
    cs.load_into(model, {"kernel": weight, "bias": bias}, ["kernel [i o] -> weight [o i]", "bias -> bias"])
    assert np.array_equal(model.weight.detach().numpy(), weight.T)


def test_one_array_under_two_names_is_one_tensor() -> None:
    array = np.ones(3, np.float32)
    with cs.open({"a": array, "b": array, "c": array.copy()}) as checkpoint:
        assert [tie.names for tie in checkpoint.ties] == [("a", "b")]


@pytest.mark.parametrize("array", [np.array([{}]), np.array(["text"]), np.zeros(2, [("x", "f4")])])
def test_what_no_tensor_holds_is_refused_by_name(array: np.ndarray) -> None:
    with pytest.raises(cs.CheckpointError, match="'odd' is a numpy array of"):
        cs.open({"odd": array, "w": np.ones(2)})
