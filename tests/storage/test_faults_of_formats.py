"""Small files of many formats, written by hand with one fault each: the fault is named, with its code."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from foreign import refused

import ckptsurgery as cs
from ckptsurgery.storage.formats.plain_pickle import read_pickle
from ckptsurgery.storage.formats.torch_zip import read_torch_zip

# GGUF


def gguf(path: Path, pairs: list[tuple[str, int, bytes]], rows: list[tuple[str, int, int]], order: str = "<") -> Path:
    """A file of some pairs, and tensors of 32 elements: their name, type and offset."""

    def text(value: str) -> bytes:
        return struct.pack(f"{order}Q", len(value)) + value.encode()

    data = b"GGUF" + struct.pack(f"{order}I2Q", 3, len(rows), len(pairs))
    data += b"".join(text(key) + struct.pack(f"{order}I", kind) + value for key, kind, value in pairs)
    data += b"".join(text(name) + struct.pack(f"{order}IQIQ", 1, 32, kind, at) for name, kind, at in rows)
    path.write_bytes(data + bytes(-len(data) % 32) + bytes(18 if rows and rows[0][1] == 2 else 128 * len(rows)))
    return path


ONE, F32, Q4_0 = struct.pack("<I", 1), 0, 2
GGUF: list[tuple[str, Callable[[Path], Path], str]] = [
    ("key twice", lambda p: gguf(p, [("a", 4, ONE), ("a", 4, ONE)], []), "the key 'a' is given twice"),
    ("alignment", lambda p: gguf(p, [("general.alignment", 4, struct.pack("<I", 12))], []), "its alignment is 12"),
    ("no alignment", lambda p: gguf(p, [("general.alignment", 4, bytes(4))], []), "its alignment is 0"),
    (
        "twice",
        lambda p: gguf(p, [], [("w", F32, 0), ("w", F32, 128)]),
        "the tensor name 'w' is given twice, or is none",
    ),
    ("no name", lambda p: gguf(p, [], [("", F32, 0)]), "the tensor name '' is given twice, or is none"),
]


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in GGUF], ids=[case[0] for case in GGUF])
def test_headers_of_gguf_that_make_no_sense_are_refused(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "x.gguf")
    problem = refused(path)
    assert (problem.code, problem.headline) == ("bad-header", f"{str(path)!r} is damaged: {words}")


def test_big_endian_files_of_gguf_have_no_blocks(tmp_path: Path) -> None:
    with cs.open(gguf(tmp_path / "x.gguf", [], [("w", F32, 0)], ">")) as checkpoint:
        assert torch.equal(checkpoint["w"].load(), torch.zeros(32))
    problem = refused(gguf(tmp_path / "y.gguf", [], [("w", Q4_0, 0)], ">"))
    assert problem.code == "unsupported-format"
    assert problem.headline == "the tensor 'w' is of big-endian Q4_0 blocks, which are not read here"
    assert problem.help == "convert the file to little-endian: gguf-convert-endian FILE little"


# msgpack


def packed(value: object) -> bytes:
    """A value in msgpack; arrays as Flax writes them, bytes as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool) or value is None:
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return struct.pack(">Bq", 0xD3, value)
    if isinstance(value, str):
        return struct.pack(">BB", 0xD9, len(value)) + value.encode()
    if isinstance(value, list):
        return bytes([0x90 | len(value)]) + b"".join(map(packed, value))
    assert isinstance(value, dict)
    return bytes([0x80 | len(value)]) + b"".join(packed(key) + packed(part) for key, part in value.items())


def array(shape: list[int], data: bytes, kind: int = 1, dtype: str = "float32") -> bytes:
    inner = b"\x93" + packed(shape) + packed(dtype) + struct.pack(">BB", 0xC4, len(data)) + data
    return struct.pack(">BBb", 0xC7, len(inner), kind) + inner


def chunked(shape: list[int]) -> dict[str, Any]:
    sizes = {str(n): size for n, size in enumerate(shape)}
    return {
        "__msgpack_chunked_array__": True,
        "shape": sizes,
        "chunks": {"0": array([1], bytes(4)), "1": array([1], bytes(4))},
    }


COMPLEX = struct.pack(">BBb", 0xC7, 10, 2) + b"\x91" + packed(1)
MSGPACK = [
    ({"w": array([3], bytes(8))}, "'w' cannot be read: F32 [3] at element 0 with strides [1] reaches outside its"),
    ({"w": array([1], bytes(8))}, "'w' is F32 [1] of 4 bytes, and 8 are there"),
    ({"w": array([1 << 62, 4], bytes(8))}, "'w' cannot be read: it "),
    ({"w": array([0, 3], bytes(4))}, "'w' is F32 [0, 3] of 0 bytes, and 4 are there"),
    ({"w": chunked([3])}, "the chunks of 'w' do not add up to its shape"),
    ({"w": chunked([1 << 62, 4])}, "the chunks of 'w' do not add up to its shape"),
    ({"w": chunked([-2])}, "the shape of an array in chunks makes no sense"),
    ({"w": b"\xc1"}, "a value begins with the byte 0xc1, which means nothing"),
    ({"w": COMPLEX}, "a complex number is none"),
    ({"w": b"\x91" * 99 + b"\xc0"}, "it holds more than 1,000,000 values, or is nested deeper than 64"),
]


@pytest.mark.parametrize(("tree", "words"), MSGPACK)
def test_trees_of_msgpack_that_make_no_sense_are_refused(tree: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.msgpack"
    path.write_bytes(packed(tree))
    problem = refused(path)
    assert problem.code == "bad-header"
    assert problem.headline.startswith(f"{str(path)!r} is damaged: {words}")


def test_an_array_of_another_type_in_a_tree_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.msgpack"
    path.write_bytes(packed({"w": array([1], bytes(4), dtype="f12")}))
    problem = refused(path)
    assert problem.code == "unreadable-tensors" and "f12" in str(problem)


def test_trees_of_msgpack_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.msgpack"
    path.write_bytes(packed({"w": array([1], b"\0\0\x80?"), "c": chunked([2, 1]), "s": array([], b"\0\0\0@", 3)}))
    with cs.open(path) as checkpoint:
        assert {key: checkpoint[key].load().tolist() for key in checkpoint} == {
            "w": [1.0],
            "c": [[0.0], [0.0]],
            "s": 2.0,
        }
    path.write_bytes(packed({"a": 1, "b": [True, None]}))
    problem = refused(path)
    assert problem.code == "no-tensors" and problem.headline == f"{str(path)!r} holds no arrays"


# numpy


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize("shape", ["(-1,)", "[1]", "(1.0,)", "5"])
def test_arrays_of_numpy_without_a_shape_are_refused(shape: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}", bytes(4)))
    assert refused(path).headline.endswith("is a numpy array whose header cannot be read: its shape makes no sense")


def test_archives_of_numpy_without_numbers_are_refused(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "x.npz", a=numpy.array(["a"]))
    problem = refused(tmp_path / "x.npz")
    assert problem.code == "no-tensors" and problem.headline.endswith("holds no arrays of numbers")


def test_a_deflated_array_that_unpacks_to_less_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}", bytes(12)))
        size = archive.getinfo("w.npy").file_size
    data = path.read_bytes()
    assert data.count(struct.pack("<I", size)) == 2
    path.write_bytes(data.replace(struct.pack("<I", size), struct.pack("<I", size + 4)))
    with cs.open(path) as checkpoint, pytest.raises(cs.CheckpointError) as caught:
        checkpoint["w"].load()
    (problem,) = caught.value.diagnostics
    assert problem.code == "damaged-zip"
    assert problem.headline == f"{str(path)!r} is damaged: 'w.npy' unpacks to 12 bytes of 16"


# zip files of torch


def zipped(path: Path, parts: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def parts(value: object) -> dict[str, bytes]:
    data = io.BytesIO()
    torch.save(value, data)
    with zipfile.ZipFile(data) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_zip_files_of_torch_with_odd_records_are_refused(tmp_path: Path) -> None:
    sound = parts({"w": torch.ones(2)})
    path = zipped(tmp_path / "x.pt", sound)
    with cs.open(path) as checkpoint:
        assert torch.equal(checkpoint["w"].load(), torch.ones(2))
    order = next(name for name in sound if name.endswith("byteorder"))
    problem = refused(zipped(path, sound | {order: b"little" + b" " * (1 << 20)}))
    assert problem.code == "damaged-zip" and problem.headline.endswith(f"has an absurdly large record {order!r}")
    data = bytearray(zipped(path, sound).read_bytes())
    central = data.index(b"PK\1\2")
    data[6] |= 1
    data[central + 8] |= 1
    path.write_bytes(data)
    assert "is encrypted" in refused(path).headline
    with pytest.raises(cs.CheckpointError) as caught:
        read_torch_zip(tmp_path / "none.pt")
    assert [problem.code for problem in caught.value.diagnostics] == ["missing-file"]


# torch.export


def weights(**change: Any) -> dict[str, Any]:
    meta = {
        "dtype": 7,
        "sizes": [{"as_int": 2}],
        "strides": [{"as_int": 1}],
        "storage_offset": {"as_int": 0},
        "layout": 7,
    }
    meta |= {key: value for key, value in change.items() if key in meta}
    about = {"path_name": "weight_0", "use_pickle": change.get("use_pickle", False), "tensor_meta": meta}
    return {"config": {"w": about, "nothing": {"tensor_meta": None}}}


def exported(path: Path, *configs: object) -> Path:
    made = {"x/archive_format": b"pt2", "x/data/weights/weight_0": torch.arange(2.0).numpy().tobytes()}
    for number, config in enumerate(configs):
        made[f"x/data/weights/{number}_weights_config.json"] = json.dumps(config).encode()
    return zipped(path, made)


EXPORTS = [
    ((), "is an archive of torch.export (.pt2) that is of an older version, which is not read here"),
    ((weights(), weights()), "is an archive of torch.export (.pt2) that holds 2 programs"),
    (([],), "whose weights are described in an unknown way: TypeError("),
    ((weights(use_pickle=True),), "described in an unknown way: ValueError('a weight is not plain bytes')"),
    ((weights(layout=1),), "described in an unknown way: ValueError('a weight is not plain bytes')"),
    ((weights(sizes=[{"as_int": -2}]),), "described in an unknown way: ValueError('a shape makes no sense')"),
    ((weights(dtype=99),), "described in an unknown way: KeyError(99)"),
]


@pytest.mark.parametrize(("configs", "words"), EXPORTS)
def test_programs_that_are_described_otherwise_are_refused(
    configs: tuple[Any, ...], words: str, tmp_path: Path
) -> None:
    path = exported(tmp_path / "x.pt2", *configs)
    problem = refused(path)
    assert problem.code == "unsupported-format" and words in problem.headline
    assert problem.help == f"import torch; torch.save(torch.export.load({str(path)!r}).state_dict, 'new.pt')"


def test_a_program_that_is_described_as_usual_is_read(tmp_path: Path) -> None:
    with cs.open(exported(tmp_path / "x.pt2", weights())) as checkpoint:
        assert {key: checkpoint[key].load().tolist() for key in checkpoint} == {"w": [0.0, 1.0]}


# legacy files of torch


class Kept:
    """A storage, by a persistent id of its own."""

    def __init__(self, *identity: object) -> None:
        self.identity = identity


def legacy(value: object, keys: object = ("0",)) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> object:
            return thing.identity if isinstance(thing, Kept) else None

    data = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {}):
        pickle.dump(part, data, 2)
    Pickler(data, 2).dump(value)
    pickle.dump(list(keys) if isinstance(keys, tuple) else keys, data, 2)
    return data.getvalue() + struct.pack("<Q2f", 2, 1.0, 2.0)


class View:
    def __init__(self, *view: object, kind: type = torch.FloatStorage) -> None:
        self.kept = Kept("storage", kind, "0", "cpu", 2, view[0] if view else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor, (self.kept, 0, (1,), (1,))


LEGACY = [
    ({"w": View()}, 5, "the list of its storages is none"),
    ({"w": View()}, [5], "the list of its storages is none"),
    ({"w": View(), "v": View(kind=torch.IntStorage)}, ("0",), "storage '0' is of two types"),
    ({"w": View(("0v", -1, 1))}, ("0",), "a view of a storage makes no sense"),
    ({"w": View(("0v", 0, "1"))}, ("0",), "a view of a storage makes no sense"),
]


@pytest.mark.parametrize(("value", "keys", "words"), LEGACY)
def test_legacy_files_that_make_no_sense_are_refused(value: object, keys: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(legacy(value, keys))
    problem = refused(path)
    assert problem.code == "damaged-pickle" and problem.headline.endswith(f"cannot be read: {words}")


def test_legacy_views_of_storages_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(legacy({"w": View(), "v": View(("0v", 1, 1))}))
    with cs.open(path) as checkpoint:
        assert {key: checkpoint[key].load().tolist() for key in checkpoint} == {"w": [1.0], "v": [2.0]}


def test_bytes_that_hold_no_storage_are_a_record(tmp_path: Path) -> None:
    class Loads:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch.storage._load_from_bytes, (legacy([1], ())[:-16],)

    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"w": numpy.ones(2), "odd": Loads()}, 4))
    assert read_pickle(path).extras["odd"].note == "it holds no storage"


# plain pickles


class Call:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts[0], self.parts[1:]


def pickled(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value, 4))
    return path


def test_slices_that_are_described_otherwise_are_left_alone(tmp_path: Path) -> None:
    odd = {"w": 5, "v": {"slices": 3, "OriginShape": [2]}, "u": {"slices": ["w"], "OriginShape": 2}}
    path = pickled(tmp_path / "x.pdparams", {"w": numpy.ones(2), "UnpackBigParamInfor@@": odd})
    with cs.open(path) as checkpoint:
        assert list(checkpoint) == ["w"] and checkpoint["w"].load().tolist() == [1, 1]


def test_code_that_an_unknown_class_would_be_given_is_refused_by_name(tmp_path: Path) -> None:
    odd = Call(torch.nn.Linear, 3, Call(os.system, "true"))
    problem = refused(pickled(tmp_path / "x.pkl", {"w": numpy.ones(2), "odd": odd}))
    assert "'odd'" in problem.headline and f"{os.name}.system" in problem.headline


def test_a_damaged_array_beside_the_model_is_a_record(tmp_path: Path) -> None:
    path = pickled(tmp_path / "x.pkl", {"model": {"w": numpy.ones(3)}, "optimizer": {"m": numpy.ones((7, 1))}})
    path.write_bytes(path.read_bytes().replace(b"K\x07K\x01\x86", b"K\x08K\x01\x86"))
    with cs.open(path) as checkpoint:
        assert list(checkpoint) == ["w"]
        note = checkpoint.extras["optimizer"]["m"].note
    assert note.endswith("cannot be read: F64 [8, 1] needs 64 bytes, the file holds 56")


# archives around a checkpoint


def tarred(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_what_is_beside_the_model_in_an_archive_is_read(tmp_path: Path) -> None:
    data = io.BytesIO()
    moments = {"exp_avg": torch.arange(3.0), "list": [torch.ones(2), (torch.zeros(1),)]}
    torch.save({"state_dict": {"w": torch.ones(2)}, "optimizer_states": [moments]}, data)
    with cs.open(tarred(tmp_path / "x.nemo", {"readme": b"x" * 999, "model.ckpt": data.getvalue()})) as checkpoint:
        (held,) = checkpoint.extras["optimizer_states"]
        assert checkpoint.tensor_at(held["exp_avg"]).tolist() == [0, 1, 2]
        assert checkpoint.tensor_at(held["list"][0]).tolist() == [1, 1]
        assert checkpoint.tensor_at(held["list"][1][0]).tolist() == [0]


def test_data_beside_a_model_in_an_archive_are_missing(tmp_path: Path) -> None:
    model = (Path(__file__).parents[1] / "data" / "formats" / "external.onnx").read_bytes()
    problem = refused(tarred(tmp_path / "x.tar", {"external.onnx": model}))
    assert (problem.code, problem.help) == ("missing-file", "open the file in its folder")
    assert problem.headline.endswith("needs the file 'external.onnx.data' beside it, and has no folder")


def test_files_of_torch_before_0_2_are_refused(tmp_path: Path) -> None:
    path = tarred(tmp_path / "x.pt", dict.fromkeys(("sys_info", "pickle", "storages", "tensors"), b"x"))
    problem = refused(path)
    assert problem.code == "unsupported-format"
    assert problem.headline == f"{str(path)!r} is a torch file from before version 0.2, which is not read here"
    assert "torch.load" in str(problem.help) and "whose code runs" in str(problem.help)


# files that are none


def test_a_path_that_no_system_takes_is_an_error() -> None:
    problem = refused("x" * 5000)
    assert (problem.code, problem.help) == ("bad-path", "choose a shorter name")


def test_a_name_with_a_folder_that_is_there_may_be_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    for path in ("org/model", "other/model"):
        problem = refused(path)
        assert (problem.code, problem.help) == ("missing-file", f"for a repository of the hub write 'hf://{path}'")


def test_an_index_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b'{"weight_map": {"a": "\xff"}}')
    problem = refused(path)
    assert problem.place == str(path) and "utf-8" in problem.headline.lower()
