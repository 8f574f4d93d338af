"""Arrays that other packages wrap, list or describe in their own way: read, or named, and never left out in silence."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from foreign import W, holds_w, pasted, refused

import ckptsurgery as cs

B = numpy.arange(4)


class Stands:
    """Pickles as a call of a function that is not installed here."""

    def __init__(self, path: str, *args: Any, state: Any = None) -> None:
        self.path, self.args, self.state = path, args, state


class _Pickler(pickle._Pickler):
    def save(self, thing: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(thing, Stands):
            super().save(thing, save_persistent_id)
            return
        module, _, name = thing.path.rpartition(".")
        self.write(f"c{module}\n{name}\n".encode())
        super().save(thing.args)
        self.write(pickle.REDUCE)
        if thing.state is not None:
            super().save(thing.state)
            self.write(pickle.BUILD)


def dumped(path: Path, value: Any) -> Path:
    with path.open("wb") as file:
        _Pickler(file, 4).dump(value)
    return path


def of_jax(array: Any) -> Stands:
    """An array as jax 0.10 and dill 0.4 pickle it: the call and the state of numpy's, and what else they know."""
    function, args, state = array.__reduce__()
    return Stands("jax._src.array._reconstruct_array", function, args, state, {"weak_type": False})


def of_dill(array: Any) -> Stands:
    function, args, state = array.__reduce__()
    return Stands("dill._dill._create_array", function, args, state)


@pytest.mark.parametrize("wrapped", [of_jax, of_dill])
def test_arrays_that_a_package_wraps_are_read(wrapped: Callable[[Any], Stands], tmp_path: Path) -> None:
    path = dumped(tmp_path / "x.pkl", {"layer": {"w": wrapped(W), "b": wrapped(B)}, "plain": W})
    with cs.open(path, subtree="") as checkpoint:
        assert torch.equal(checkpoint["layer.w"].load(), torch.tensor(W))
        assert torch.equal(checkpoint["layer.b"].load(), torch.tensor(B))


def masked() -> Any:
    return numpy.ma.masked_array(W, W > 3)


HIDDEN = {
    "masked": (lambda: masked(), "a masked array of numpy: save it after filled()"),
    "objects": (lambda: numpy.array([W, None, 1], object), "a numpy array of objects, with tensors in it"),
    "sparse": (
        lambda: Stands("scipy.sparse._csr.csr_matrix", state={"data": W[0], "indices": B, "_shape": (2, 3)}),
        "an object of scipy.sparse._csr.csr_matrix, with tensors in it",
    ),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_objects_with_numbers_in_them_are_not_left_out_in_silence(kind: str, tmp_path: Path) -> None:
    make, why = HIDDEN[kind]
    path = dumped(tmp_path / "x.pkl", {"hidden": make(), "w": W})
    with cs.open(path) as checkpoint:
        assert list(checkpoint) == ["w"] and checkpoint.unreadable == {"hidden": why}
        with pytest.raises(cs.CkptSurgeryError, match="unreadable-tensors"):
            cs.plan(checkpoint, "{k...} -> {k...}").save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_objects_without_weights_are_left_with_the_rest(tmp_path: Path) -> None:
    rest = {"names": numpy.array(["a", None], object), "random": numpy.random.RandomState(0), "w": W}
    with cs.open(dumped(tmp_path / "x.pkl", rest)) as checkpoint:
        assert list(checkpoint) == ["w"] and not checkpoint.unreadable


@pytest.mark.parametrize("protocol", [0, 1])
@pytest.mark.parametrize("kind", [dict, list, "ordered"])
def test_pickles_of_the_oldest_protocols_are_read(protocol: int, kind: Any, tmp_path: Path) -> None:
    import collections

    made = [W, B] if kind is list else (dict if kind is dict else collections.OrderedDict)([("w", W), ("b", B)])
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(made, protocol))
    with cs.open(tmp_path / "x.pkl") as checkpoint:
        assert [checkpoint[key].load().tolist() for key in checkpoint] == [W.tolist(), B.tolist()]


@pytest.mark.parametrize("data", [b"import os\nimport sys\n", b"(draft) a note", b"cat\ndog\nbird\n", b"}quick"])
def test_texts_are_not_taken_for_old_pickles(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    assert refused(tmp_path / "x.txt").code in ("text-file", "not-a-checkpoint", "unknown-format")


def test_arrays_one_after_another_lead_to_a_file_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What equinox writes, and numpy.save called several times with one file."""
    path = tmp_path / "x.eqx"
    with path.open("wb") as file:
        for array in (B, W, numpy.float32(2.5)):
            numpy.save(file, array)
    problem = refused(path)
    assert problem.code == "trailing-bytes" and "several arrays one after another" in problem.headline
    made = pasted(str(problem.help), tmp_path, monkeypatch)
    assert isinstance(made, cs.Checkpoint) and len(made) == 3 and holds_w(tmp_path / "new.npz")


# msgpack


def packed(value: Any) -> bytes:
    """Msgpack, written by hand: mappings, texts, byte strings, lists, small numbers and flags."""
    if isinstance(value, dict):
        return bytes([0x80 | len(value)]) + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, str):
        return bytes([0xA0 | len(value)]) + value.encode()
    if isinstance(value, bytes):
        return b"\xc5" + struct.pack(">H", len(value)) + value
    if isinstance(value, list):
        return bytes([0x90 | len(value)]) + b"".join(map(packed, value))
    return b"\xc3" if value is True else b"\xc2" if value is False else bytes([value])


def of_msgpack_numpy(array: Any, **change: Any) -> dict[bytes, Any]:
    """As msgpack-numpy 0.4.8 encodes an array, also in the files of spaCy's thinc."""
    made = {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": list(array.shape), b"data": array.tobytes()}
    return made | {name.encode(): value for name, value in change.items()}


def test_arrays_of_msgpack_numpy_are_read(tmp_path: Path) -> None:
    scalar = {b"nd": False, b"type": "<f4", b"data": struct.pack("<f", 2.5)}
    (tmp_path / "x.msgpack").write_bytes(
        packed({"a": of_msgpack_numpy(W), "deep": {"b": of_msgpack_numpy(B)}, "s": scalar})
    )
    with cs.open(tmp_path / "x.msgpack") as checkpoint:
        found = {key: checkpoint[key].load().tolist() for key in checkpoint}
    assert found == {"a": W.tolist(), "deep.b": B.tolist(), "s": 2.5}


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (of_msgpack_numpy(W.astype(">f4")), "a numpy array of type '>f4'"),
        (of_msgpack_numpy(W.astype("f8"), type="<f16"), "a numpy array of type '<f16'"),
    ],
)
def test_numbers_that_no_dtype_here_is_are_named(odd: dict[bytes, Any], why: str, tmp_path: Path) -> None:
    (tmp_path / "x.msgpack").write_bytes(packed({"a": of_msgpack_numpy(W), "odd": odd}))
    with cs.open(tmp_path / "x.msgpack") as checkpoint:
        assert list(checkpoint) == ["a"] and checkpoint.unreadable == {"odd": why}


def test_arrays_that_are_no_numbers_are_left_with_the_rest(tmp_path: Path) -> None:
    odd = {"o": of_msgpack_numpy(W, type="|O"), "c": {b"complex": True, b"data": b"1j"}}
    (tmp_path / "x.msgpack").write_bytes(packed({"a": of_msgpack_numpy(W), **odd}))
    with cs.open(tmp_path / "x.msgpack") as checkpoint:
        assert list(checkpoint) == ["a"] and set(checkpoint.extras) == {"o", "c"}


@pytest.mark.parametrize(
    "odd",
    [
        {b"other": 1},
        of_msgpack_numpy(W, data=3),
        of_msgpack_numpy(W, shape=[2, "3"]),
        of_msgpack_numpy(W, shape=[2, 9]),
    ],
)
def test_mappings_that_make_no_sense_are_refused(odd: dict[bytes, Any], tmp_path: Path) -> None:
    (tmp_path / "x.msgpack").write_bytes(packed({"a": odd}))
    assert refused(tmp_path / "x.msgpack").code == "bad-header"
