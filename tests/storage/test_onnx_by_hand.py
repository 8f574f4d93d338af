"""ONNX models written field by field: encodings that other writers choose, and messages that contradict themselves."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from foreign import refused

import ckptsurgery as cs

FLOAT, INT32, INT64, FLOAT16, FLOAT4, UINT4 = 1, 6, 7, 10, 23, 21


def varint(value: int) -> bytes:
    value %= 1 << 64
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def text(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def four(field: int, value: float) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<f", value)


def tensor(kind: int, *parts: bytes, dims: tuple[int, ...] = (), name: bytes = b"w") -> bytes:
    """An initialiser of the graph, with its dimensions one by one as onnx writes them."""
    return text(5, b"".join(number(1, n) for n in dims) + number(2, kind) + b"".join(parts) + text(8, name))


def model(path: Path, *parts: bytes) -> Path:
    path.write_bytes(number(1, 10) + text(7, b"".join(parts)))
    return path


def values(path: Path, key: str = "w") -> torch.Tensor:
    with cs.open(path) as checkpoint:
        return checkpoint[key].load()


PACKED_DIMS = text(1, varint(2) + varint(1) + varint(150))
FLOATS = [0.5, -1.0, 3.25]
ENCODED = [
    ("packed dimensions", tensor(FLOAT, PACKED_DIMS, text(9, bytes(1200))), torch.zeros(2, 1, 150)),
    ("floats one by one", tensor(FLOAT, *(four(4, x) for x in FLOATS), dims=(3,)), torch.tensor(FLOATS)),
    ("numbers one by one", tensor(INT32, number(5, 5), number(5, -3), dims=(2,)), torch.tensor([5, -3]).int()),
    (
        "numbers in two runs and one alone",
        tensor(INT64, text(7, varint(1) + varint(-2)), number(7, 1 << 40), text(7, varint(300)), dims=(4,)),
        torch.tensor([1, -2, 1 << 40, 300]),
    ),
    ("halves by their bits", tensor(FLOAT16, text(5, varint(0x3C00)), dims=(1,)), torch.ones(1).half()),
    ("scalar", tensor(FLOAT, text(9, struct.pack("<f", 2.5))), torch.tensor(2.5)),
    ("none", tensor(FLOAT, dims=(0, 3)), torch.zeros(0, 3)),
]


@pytest.mark.parametrize(("message", "expected"), [case[1:] for case in ENCODED], ids=[case[0] for case in ENCODED])
def test_every_encoding_of_a_tensor_is_read(message: bytes, expected: torch.Tensor, tmp_path: Path) -> None:
    found = values(model(tmp_path / "x.onnx", message))
    assert found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)


W = tensor(FLOAT, text(9, struct.pack("<f", 2.5)), name=b"good")


TYPES = {  # the enumeration of `onnx.proto`
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 14: torch.complex64,
    15: torch.complex128, 16: torch.bfloat16, 17: torch.float8_e4m3fn, 18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2, 20: torch.float8_e5m2fnuz, 24: torch.float8_e8m0fnu,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), TYPES.items())
def test_every_type_of_numbers_is_read(kind: int, dtype: torch.dtype, tmp_path: Path) -> None:
    raw = bytes(n % 2 for n in range(4 * dtype.itemsize))
    found = values(model(tmp_path / "x.onnx", tensor(kind, text(9, raw), dims=(2, 2))))
    assert found.dtype == dtype and found.shape == (2, 2)
    assert bytes(found.contiguous().view(torch.uint8).flatten().tolist()) == raw


def test_what_is_not_plain_numbers_is_a_record(tmp_path: Path) -> None:
    odd = [
        tensor(FLOAT4, text(9, bytes(2)), dims=(3,), name=b"four"),
        tensor(UINT4, text(9, bytes(2)), dims=(3,), name=b"u"),
    ]
    odd += [tensor(99, text(9, bytes(2)), dims=(1,), name=b"new"), tensor(8, text(6, b"a"), dims=(1,), name=b"text")]
    sparse = text(15, text(1, b""))
    with cs.open(model(tmp_path / "x.onnx", W, *odd, sparse, sparse)) as checkpoint:
        assert list(checkpoint) == ["good"]
        assert checkpoint.unreadable == {
            "four": "4-bit values whose last axis is odd",
            "u": "4-bit values whose last axis is odd",
            "new": "a tensor of the unknown type 99",
            "sparse_initializer.0": "a sparse tensor",
            "sparse_initializer.1": "a sparse tensor",
        }
        assert checkpoint.extras["text"] == "texts, which are not read"


def test_four_bit_numbers_are_bytes_with_their_type_beside_them(tmp_path: Path) -> None:
    packed = tensor(UINT4, text(9, b"\x21\x43"), dims=(2, 2))
    with cs.open(model(tmp_path / "x.onnx", packed)) as checkpoint:
        assert checkpoint["w"].load().tolist() == [[0x21], [0x43]]
        assert checkpoint.extras["onnx"] == {"tensor_types": {"w": "UINT4"}}


def test_a_model_without_weights_is_named(tmp_path: Path) -> None:
    problem = refused(model(tmp_path / "x.onnx", text(2, b"graph"), node(b"Constant", (b"value", SHAPE))))
    assert problem.code == "no-tensors" and problem.headline.endswith("is an ONNX model without weights")


# tensors elsewhere than among the initialisers


def node(operation: bytes, *attributes: tuple[bytes, bytes], output: bytes = b"y", domain: bytes = b"") -> bytes:
    """A node of the graph; an attribute is its name and its encoded value."""
    inside = b"".join(text(5, text(1, name) + value) for name, value in attributes)
    return text(1, text(1, b"x") + text(2, output) + text(4, operation) + inside + (text(7, domain) if domain else b""))


def value(kind: int, data: bytes, *dims: int) -> bytes:
    """The tensor of an attribute."""
    return text(5, b"".join(number(1, n) for n in dims) + number(2, kind) + text(9, data))


PAIR, SHAPE = struct.pack("<2f", 1, 2), value(INT64, struct.pack("<2q", 3, 4), 2)


def branch(*parts: bytes) -> bytes:
    """The graph of an attribute."""
    return text(6, b"".join(parts))


def test_constants_of_nodes_are_tensors_too(tmp_path: Path) -> None:
    """Paddle2ONNX keeps all weights so, and other exporters the mean and the scale of images."""
    nodes = [
        node(b"Constant", (b"value", value(FLOAT, PAIR, 2)), output=b"mean"),
        node(b"Constant", (b"value_floats", four(7, 0.5) + four(7, 2.0)), output=b"one.by.one"),
        node(b"Constant", (b"value_floats", text(7, PAIR)), output=b"packed"),
        node(b"Constant", (b"value", SHAPE), output=b"shape"),
        node(b"ConstantOfShape", (b"value", value(FLOAT, PAIR[:4], 1)), output=b"filled"),
        node(b"Custom", (b"table", value(FLOAT, PAIR, 1, 2)), (b"alpha", four(2, 0.5)), output=b"out"),
    ]
    with cs.open(model(tmp_path / "x.onnx", *nodes, W)) as checkpoint:
        found = {key: checkpoint[key].load().tolist() for key in checkpoint}
        assert found == {
            "mean": [1, 2], "one.by.one": [0.5, 2], "packed": [1, 2], "out/table": [[1, 2]], "good": 2.5,
        }  # fmt: skip
        assert list(checkpoint.extras["constants"]) == ["shape", "filled/value"]
        assert checkpoint.tensor_at(checkpoint.extras["constants"]["shape"]).tolist() == [3, 4]


def test_tensors_of_graphs_within_nodes_and_of_functions_are_read(tmp_path: Path) -> None:
    own = tensor(FLOAT, text(9, PAIR), dims=(2,), name=b"good")
    inner = node(b"Constant", (b"value", value(FLOAT, PAIR, 2)), output=b"k")
    split = node(b"If", (b"then_branch", branch(own)), (b"else_branch", branch(inner, text(15, b""))), output=b"o")
    path = model(tmp_path / "x.onnx", split, W)
    function = text(1, b"F") + text(7, node(b"Constant", (b"value", value(FLOAT, PAIR, 2)), output=b"c")[2:])
    path.write_bytes(path.read_bytes() + text(25, function))
    with cs.open(path) as checkpoint:
        assert list(checkpoint) == ["o/then_branch/good", "o/else_branch/k", "good", "F/c"]
        assert checkpoint.unreadable == {"o/else_branch/sparse_initializer.0": "a sparse tensor"}


def test_numbers_of_classical_models_are_not_left_out_in_silence(tmp_path: Path) -> None:
    linear = node(b"LinearRegressor", (b"coefficients", text(7, PAIR)), domain=b"ai.onnx.ml")
    with cs.open(model(tmp_path / "x.onnx", linear, W)) as checkpoint:
        assert checkpoint.unreadable == {"y/coefficients": "numbers of a node LinearRegressor"}


def test_graphs_within_graphs_end(tmp_path: Path) -> None:
    deep = tensor(FLOAT, text(9, PAIR), dims=(2,))
    for _ in range(40):
        deep = node(b"Loop", (b"body", branch(deep)))
    problem = refused(model(tmp_path / "x.onnx", deep))
    assert problem.code == "bad-header" and problem.headline.endswith("its graphs nest too deep")


SENSELESS = [
    ("dims", tensor(FLOAT, *([number(1, 1)] * 1025), text(9, bytes(4))), "a tensor has more than 1,024 dimensions"),
    ("long dims", tensor(FLOAT, text(1, bytes((1 << 14) + 1))), "the dimensions of a tensor make no sense"),
    ("float dims", tensor(FLOAT, four(1, 2.0)), "the dimensions of a tensor make no sense"),
    ("long name", tensor(FLOAT, name=b"x" * 65_537), "a name has 65,537 bytes"),
    ("no name", tensor(FLOAT, text(9, bytes(4)), name=b""), "the name '' is given twice, or is none"),
    ("twice", W + W, "the name 'good' is given twice, or is none"),
    ("negative", tensor(FLOAT, dims=(2, -1)), "'w' has a negative dimension"),
    ("huge", tensor(FLOAT, text(9, bytes(4)), dims=(1 << 40, 1 << 40)), "'w' "),
    ("two fields", tensor(FLOAT, text(9, bytes(4)), text(4, bytes(4)), dims=(1,)), "'w' has its data in 2 fields"),
    ("no field", tensor(FLOAT, dims=(1,)), "'w' has its data in 0 fields"),
    ("short", tensor(FLOAT, text(9, bytes(4)), dims=(2,)), "'w' is F32 [2] of 8 bytes, and 4 are there"),
    ("a number as data", tensor(FLOAT, number(9, 4), dims=(0,)), "'w' is F32 [0] of 0 bytes, and 0 are there"),
    ("floats", tensor(INT32, text(4, bytes(4)), dims=(1,)), "'w' is I32 [1], and its data are of another type"),
    ("few", tensor(INT32, text(5, bytes(2)), dims=(3,)), "'w' is I32 [3], and 2 bytes are there"),
    ("place", tensor(FLOAT, text(13, bytes(65_537)), number(14, 1)), "an entry of external data has 65,537 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "words"), [case[1:] for case in SENSELESS], ids=[case[0] for case in SENSELESS])
def test_messages_that_make_no_sense_are_refused(message: bytes, words: str, tmp_path: Path) -> None:
    path = model(tmp_path / "x.onnx", message)
    problem = refused(path)
    assert problem.code == "bad-header"
    assert problem.headline.startswith(f"{str(path)!r} is damaged: {words}")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80", "its numbers are cut off"),
        (b"\1\x80", "its numbers are cut off"),
        (b"\x80" * 10 + b"\1", "its numbers are cut off"),
        (b"\1\2", "I64 [1] needs 8 bytes, the file holds 16"),
    ],
)
def test_numbers_that_end_too_early_are_an_error_of_their_tensor(data: bytes, words: str, tmp_path: Path) -> None:
    path = model(tmp_path / "x.onnx", tensor(INT64, text(7, data), dims=(1,)))
    with pytest.raises(cs.CheckpointError) as caught:
        values(path)
    assert [problem.code for problem in caught.value.diagnostics] == ["damaged-tensor"]
    assert f"'w' cannot be read: {words}" in str(caught.value)


# data beside the model


def external(**pairs: str) -> bytes:
    entries = (text(13, text(1, key.encode()) + text(2, value.encode())) for key, value in pairs.items())
    return tensor(FLOAT, *entries, number(14, 1), dims=(2,))


def test_data_beside_the_model_are_read_where_it_says(tmp_path: Path) -> None:
    (tmp_path / "x.data").write_bytes(struct.pack("<4f", 9, 1, 2, 9))
    path = model(tmp_path / "x.onnx", external(location="x.data", offset="4", length="8"))
    assert values(path).tolist() == [1, 2]
    assert values(model(path, external(location="x.data"))).tolist() == [9, 1]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"offset": "four"}, "the place of the data of 'w' makes no sense"),
        ({"length": "8.0"}, "the place of the data of 'w' makes no sense"),
        ({"offset": "12"}, "'w' is F32 [2]; its data are said to be 8 bytes at 12 of 'x.data'"),
        ({"offset": "-4"}, "'w' is F32 [2]; its data are said to be 8 bytes at -4 of 'x.data'"),
        ({"length": "4"}, "'w' is F32 [2]; its data are said to be 4 bytes at 0 of 'x.data'"),
    ],
)
def test_places_that_make_no_sense_are_refused(place: dict[str, str], words: str, tmp_path: Path) -> None:
    (tmp_path / "x.data").write_bytes(bytes(16))
    problem = refused(model(tmp_path / "x.onnx", external(location="x.data", **place)))
    assert problem.code == "bad-header" and problem.headline.endswith(words)
