"""Safetensors files: what the reference writes is read exactly, and what lies about its bytes is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file, save_model

from ckptsurgery.errors import CheckpointError
from ckptsurgery.specs import DTYPES, TensorSpec
from ckptsurgery.storage import open_checkpoint
from ckptsurgery.storage.output.writing import open_writer

TORCH_DTYPES = [d for d in DTYPES.values() if d.safetensors and d.torch and hasattr(torch, d.torch)]


def of_dtype(name: str) -> torch.Tensor:
    dtype = DTYPES[name]
    generator = torch.Generator().manual_seed(len(name))
    raw = torch.randint(
        0, 2 if name == "BOOL" else 256, (3, 4 * dtype.itemsize), dtype=torch.uint8, generator=generator
    )
    return raw.view(getattr(torch, str(dtype.torch)))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def write(path: Path, header: object, data: bytes = b"", pad: bytes = b"") -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text + pad)) + text + pad + data)
    return str(path)


def row(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end], **more}


def codes(path: str) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert all(path in (d.place or "") for d in caught.value.diagnostics)
    return [d.code for d in caught.value.diagnostics]


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=lambda d: d.name)
def test_every_dtype_survives_both_ways(dtype: Any, tmp_path: Path) -> None:
    tensor, path = of_dtype(dtype.name), tmp_path / "theirs.safetensors"
    save_file({"x": tensor}, path)
    with open_checkpoint(path) as ckpt:
        assert ckpt["x"].dtype == dtype.name
        assert same_bytes(ckpt.load("x"), tensor)
        assert same_bytes(ckpt["x"][1:], tensor.view(torch.uint8)[1:].view(tensor.dtype))
        ours = tmp_path / "ours.safetensors"
        with open_writer(ours, ckpt.specs) as writer:
            writer.write(writer.places["x"].file, writer.places["x"].offset, ckpt.read("x"))
    assert same_bytes(load_file(ours)["x"], tensor)


def test_packed_dtypes_have_logical_shapes(tmp_path: Path) -> None:
    save_file({"x": of_dtype("F4")}, tmp_path / "x.safetensors")
    assert open_checkpoint(tmp_path / "x.safetensors")["x"].shape == (3, 8)
    six = write(tmp_path / "six.safetensors", {"x": row(0, 6, [2, 4], "F6_E2M3")}, bytes(range(6)))
    with open_checkpoint(six) as ckpt:
        assert ckpt["x"].nbytes == 6
        assert bytes(ckpt.read("x", 2, 4)) == b"\x02\x03"
        with pytest.raises(CheckpointError) as caught:
            ckpt.load("x")
    assert caught.value.diagnostics[0].code == "dtype-not-in-torch"


def test_scalars_and_empty_tensors_are_tensors(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "other": torch.empty(3, 0),
        "last": torch.ones(2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as ckpt:
        loaded = ckpt.state_dict()
        assert ckpt.ties == ()
    assert {key: (value.shape, value.tolist()) for key, value in loaded.items()} == {
        key: (value.shape, value.tolist()) for key, value in tensors.items()
    }


def test_an_unaligned_header_with_spaces_is_read(tmp_path: Path) -> None:
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    text = b" " + json.dumps({"x": row(0, 8, [2], "F32")}).encode() + b"   "
    path = write(tmp_path / "x.safetensors", text + b" " * (len(text) % 2 == 0), data)
    assert open_checkpoint(path).load("x").tolist() == [1.5, -2.0]


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    header = json.dumps({"x": row(0, 1)}).encode()
    path = write(tmp_path / "x.safetensors", header, b"\x07", pad=b" " * (640 - len(header)))
    assert Path(path).read_bytes()[:2] == b"\x80\x02"
    assert open_checkpoint(path).load("x").tolist() == [7]


def test_names_may_hold_anything_printable(tmp_path: Path) -> None:
    names = ["true", '"dtype"', "shape", "a\\b", "ключ", "with space", "data_offsets", "tab\t", "😀"]
    tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"note": '{"dtype": "true"}', "shape": "\\"})
    with open_checkpoint(tmp_path / "x.safetensors") as ckpt:
        assert {k: v.tolist() for k, v in ckpt.state_dict().items()} == {k: v.tolist() for k, v in tensors.items()}
        assert ckpt.metadata == {"note": '{"dtype": "true"}', "shape": "\\"}


def test_an_alias_of_save_model_is_a_tied_key(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    save_model(model, str(tmp_path / "x.safetensors"), metadata={"format": "pt", "1.bias": "no such key"})
    with open_checkpoint(tmp_path / "x.safetensors") as ckpt:
        assert [(tie.names, tie.kind) for tie in ckpt.ties] == [(("0.weight", "1.weight"), "alias")]
        assert ckpt.metadata == {"format": "pt", "1.bias": "no such key"}
        state = ckpt.state_dict()
        assert state["0.weight"] is state["1.weight"]
        assert ckpt.nbytes == 36


BAD: dict[str, tuple[object, bytes]] = {
    "bad-header": (b"[1, 2]", b""),
    "bad-header ": (b'{"x": nonsense}', b""),
    "bad-header  ": (b"{" + b'"a":' * 3, b""),
    "bad-header   ": (b'{"\xff": 1}', b""),
    "bad-header    ": (b'{"a":' + b"[" * 100_000, b""),
    "bad-header     ": (json.dumps({"x": row(0, 1)}).encode() + b"\0", b"1"),
    "bad-metadata": ({"__metadata__": {"a": 1}}, b""),
    "bad-metadata ": ({"__metadata__": "a"}, b""),
    "reserved-name": ({"__metadata__": row(0, 1)}, b"1"),
    "bad-entry": ({"x": {"dtype": "U8", "shape": [1]}}, b"1"),
    "bad-entry ": ({"x": 3}, b""),
    "unknown-field": ({"x": row(0, 1, scale=2)}, b"1"),
    "unknown-dtype": ({"x": row(0, 1, dtype="Q8")}, b"1"),
    "unknown-dtype ": ({"x": row(0, 16, [1], dtype="C128")}, b"1" * 16),
    "unknown-dtype  ": ({"x": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}, b"1"),
    "bad-shape": ({"x": row(0, 1, [-1])}, b"1"),
    "bad-shape ": ({"x": row(0, 1, [1.0])}, b"1"),
    "bad-shape  ": ({"x": row(0, 1, [True])}, b"1"),
    "bad-shape   ": ({"a": row(0, 2, [2, 1]), "b": row(2, 4, [2, True])}, b"1234"),
    "bad-shape    ": ({"x": row(0, 1, [3], "F4")}, b"1"),
    "bad-shape     ": (b'{"x": {"dtype": "U8", "shape": {"1": 2}, "data_offsets": [0, 1]}}', b"1"),
    "bad-offsets": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"1"),
    "bad-offsets ": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}, b"1"),
    "bad-offsets  ": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0.0, 1]}}, b"1"),
    "bad-offsets   ": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, b"1"),
    "shape-overflow": ({"x": row(0, 1, [1 << 40, 1 << 40])}, b"1"),
    "shape-overflow ": ({"x": row(0, 0, [1 << 40, 1 << 40, 0])}, b""),
    "size-mismatch": ({"x": row(0, 3, [2])}, b"123"),
    "overlap": ({"x": row(0, 2), "y": row(1, 3)}, b"123"),
    "overlap ": ({"x": row(0, 2), "y": row(0, 2)}, b"12"),
    "hole": ({"x": row(0, 1), "y": row(2, 3)}, b"123"),
    "hole ": ({"x": row(1, 2)}, b"12"),
    "hole  ": ({"x": row(0, 1), "empty": row(5, 5)}, b"1"),
    "trailing-bytes": ({"x": row(0, 1)}, b"12"),
    "truncated-file": ({"x": row(0, 3)}, b"12"),
    "duplicate-tensor": (b'{"x": %b, "x": %b}' % ((json.dumps(row(0, 1)).encode(),) * 2), b"1"),
    "duplicate-field": (b'{"x": {"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "duplicate-metadata": (b'{"__metadata__": {"a": "1", "a": "1"}}', b""),
    "duplicate-metadata ": (b'{"__metadata__": {"a": "1", "\\u0061": "2"}}', b""),
    "duplicate-tensor ": (b'{"__metadata__": {}, "__metadata__": {}}', b""),
    "bad-name": ({"": row(0, 1)}, b"1"),
    "bad-name ": ({"\ud800": row(0, 1)}, b"1"),
}


@pytest.mark.parametrize("code", BAD)
def test_a_header_that_lies_is_refused_by_name(code: str, tmp_path: Path) -> None:
    header, data = BAD[code]
    assert codes(write(tmp_path / "x.safetensors", header, data)) == [code.strip()]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "empty-file"),
        (b"\x05", "truncated-file"),
        (struct.pack("<Q", 100) + b'{"x"', "truncated-file"),
        (struct.pack("<Q", 1) + b"{", "bad-header"),
        (struct.pack("<Q", 0), "bad-header"),
        (struct.pack("<Q", 1 << 62) + bytes(range(200, 250)), "header-too-large"),
    ],
)
def test_the_length_of_the_header_is_bounded(raw: bytes, code: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    assert codes(str(path)) == [code]


def test_all_problems_of_a_header_are_told_at_once(tmp_path: Path) -> None:
    header = {"a": row(0, 1, dtype="Q8"), "b": row(1, 2, [-1]), "c": row(2, 3, dtype="Q9"), "d": row(3, 4)}
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(tmp_path / "x.safetensors", header, b"1234"))
    assert {d.code for d in caught.value.diagnostics} == {"unknown-dtype", "bad-shape"}
    assert "'c'" in str(caught.value)


NAMES = st.text(max_size=3)
ROWS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4", "Q8"]),
        "shape": st.lists(st.integers(-1, 3) | st.booleans() | st.floats(0, 2), max_size=2),
        "data_offsets": st.lists(st.integers(-1, 12), min_size=1, max_size=3),
    }
)
HEADERS = st.dictionaries(NAMES, ROWS | st.integers() | st.none(), max_size=3)


@given(header=HEADERS, data=st.binary(max_size=12), metadata=st.none() | st.dictionaries(NAMES, NAMES, max_size=2))
def test_any_header_is_read_as_the_reference_reads_it_or_refused(
    header: dict[str, Any], data: bytes, metadata: dict[str, str] | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    text = json.dumps(header if metadata is None else {**header, "__metadata__": metadata})
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)
    try:
        ckpt = open_checkpoint(path)
    except CheckpointError as error:
        assert all(d.code and d.headline for d in error.diagnostics)
        return
    with safe_open(path, "pt") as reference:
        assert set(ckpt) - set(ckpt.aliases) == set(reference.keys())


@given(offsets=st.permutations([0, 1, 2, 3]), sizes=st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_tensors_in_any_order_of_the_file_are_read_right(
    offsets: list[int], sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "shuffled.safetensors"
    places, at = {}, 0
    for i in offsets:
        places[i] = at, at + sizes[i]
        at += sizes[i]
    write(path, {f"t{i}": row(*places[i]) for i in range(4)}, bytes(range(at)))
    with open_checkpoint(path) as ckpt:
        assert {key: ckpt.load(key).tolist() for key in ckpt} == {f"t{i}": list(range(*places[i])) for i in range(4)}


@given(raw=st.binary(max_size=64))
def test_random_bytes_never_crash_the_reader(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    with pytest.raises((SafetensorError, OSError)), safe_open(path, "pt"):
        pass


def test_specs_are_shared_and_cost_no_data(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    ckpt = open_checkpoint(tmp_path / "x.safetensors")
    assert ckpt.specs == {"x": TensorSpec((2, 3), "F32")}
    assert ckpt.specs is ckpt.specs


def test_a_tensor_called_as_the_format_is_not_taken_for_a_tie(tmp_path: Path) -> None:
    save_file({"pt": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"format": "pt", "": "pt"})
    with open_checkpoint(tmp_path / "x.safetensors") as ckpt:
        assert list(ckpt) == ["pt"]
        assert ckpt.metadata["format"] == "pt"
