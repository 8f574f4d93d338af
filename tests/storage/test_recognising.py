"""Files, folders and addresses of other programs: each entry of each table is met, named, and its remedy is run.

A remedy that needs a library which is not installed is parsed; where the library is there, the file is a real one, the
line is run as it is shown, and what it writes opens with the right values.
"""

from __future__ import annotations

import ast
import lzma
import pickle
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from foreign import W, holds_w, pasted, refused, there

import ckptsurgery as cs
from ckptsurgery.storage.formats.recognising import HEADS, ZIPS, is_onnx
from ckptsurgery.storage.places.choosing import weights_in

# files


def openvino_file(path: Path) -> None:
    if not there("openvino"):
        path.write_bytes(b'<?xml version="1.0"?>\n<net name="Model0" version="11">\n<layers>')
        path.with_suffix(".bin").write_bytes(bytes(24))
        return
    import openvino
    from openvino import opset13 as ops

    given = ops.parameter([2, 3], numpy.float32)
    model = openvino.Model([ops.add(given, ops.constant(W))], [given])
    openvino.save_model(model, path, compress_to_fp16=False)


def plain_pickle() -> bytes:
    return pickle.dumps({"w": W})


def written(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def matlab(path: Path) -> None:
    if not there("scipy"):
        path.write_bytes(b"MATLAB 5.0 MAT-file, Platform: posix".ljust(124) + b"\x00\x01IM" + bytes(64))
        return
    import scipy.io

    scipy.io.savemat(path, {"w": W})


def zip_of_w(path: Path) -> bytes:
    numpy.savez(path, w=W)
    return path.read_bytes()


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "zstd": ("x.zst", written(b"\x28\xb5\x2f\xfd" + bytes(50))),
    "zlib": ("x.joblib", written(b"ZF" + bytes(50))),
    "lz4": ("x.lz4", written(b"\x04\x22M\x18" + bytes(50))),
    "tflite": ("x.tflite", written(b"\x1c\0\0\0TFL3" + bytes(100))),
    "openvino": ("x.xml", openvino_file),
    "savedmodel": ("saved_model.pb", written(b"\x08\x01\x12\xd1\x2a\x0a\x1c\x12\x04\x08\x01\x12\0" + bytes(99))),
    "coreml": ("x.mlmodel", written(b"\x08\x05\x12\x9e\x03\x0a\x12\x0a\x05image\x12\0" + bytes(99))),
    "mindspore": ("x.ckpt", written(b"\x0a\x37\x0a\x0cconv1.weight\x12\x27\x08\x02\x08\x03" + bytes(99))),
    "mxnet": ("x.params", written(b"\x12\x01" + bytes(100))),
    "matlab": ("x.mat", matlab),
    "marked": ("x.npz", lambda path: path.write_bytes(b"\xef\xbb\xbf" + zip_of_w(path)) and None),
    "pdf": ("x.pdf", written(b"%PDF-1.7\n")),
}
SHELL = {"zstd": "zstd", "lz4": "lz4"}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_file_of_another_program_is_named_and_its_remedy_works(
    kind: str, in_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, make = FILES[kind]
    path = tmp_path / "model" / name
    path.parent.mkdir()
    make(path)
    problem = refused(path)
    assert problem.code == "unsupported-format"
    assert HEADS[kind][1].text in problem.headline
    assert "{" not in str(problem.help).replace("{}", "").replace("{t.name", "").replace("{op", "").replace("{k", "")
    if in_folder and kind not in ("zstd", "lz4", "pdf", "savedmodel"):
        assert refused(path.parent).headline == problem.headline
    if kind in SHELL:
        command = str(problem.help).removeprefix("unpack it: ")
        assert command.startswith(f"{SHELL[kind]} -dc ")
    elif kind == "marked":
        subprocess.run(str(problem.help).removeprefix("remove it: "), shell=True, check=True, cwd=tmp_path)
        assert holds_w(tmp_path / "new.bin")
    else:
        made = pasted(str(problem.help), tmp_path, monkeypatch)
        assert made is None or holds_w(made)


# zip files


def zipped(path: Path, **records: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), data)


def packaged(path: Path) -> None:
    with torch.package.PackageExporter(path) as exporter:
        exporter.save_pickle("m", "w.pkl", {"w": torch.tensor(W)})


ZIPPED: dict[str, Callable[[Path], Any]] = {
    "package": packaged,
    "old-torchscript": lambda path: zipped(path, x__model_dot_json=b"{}", x__version=b"1"),
    "zipped": lambda path: zipped(path, model_dot_pkl=plain_pickle()),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", ZIPS)
def test_a_zip_file_of_another_program_is_named_and_its_remedy_works(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.keras"
    ZIPPED[kind](path)
    problem = refused(path)
    assert ZIPS[kind][1].text in problem.headline
    if kind == "package":
        call = re.search(r"torch\.package\.\S+\(.*?\)\.load_pickle\(package, resource\)", str(problem.help))
        assert call is not None
        found = eval(call[0], {"torch": torch, "package": "m", "resource": "w.pkl"})
        assert torch.equal(found["w"], torch.tensor(W))
    elif kind == "zipped":
        subprocess.run(str(problem.help).removeprefix("unpack it: "), shell=True, check=True, cwd=tmp_path)
        assert holds_w(tmp_path / "new_folder" / "model.pkl")
    else:
        assert ast.parse(str(problem.help))


# torch's own files that are no state_dict


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_an_exported_program_is_read(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3, bias=False), torch.nn.BatchNorm1d(3)
            self.c = torch.nn.Linear(3, 3, bias=False).to(torch.bfloat16)
            self.d = torch.nn.Linear(3, 3, bias=False)
            self.d.weight = self.a.weight
            self.register_buffer("t", torch.arange(6.0).reshape(2, 3).T[1:])
            self.register_buffer("scale", torch.arange(3.0), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.d(self.b(self.a(x * self.scale))) + self.c(x.to(torch.bfloat16)).float() + self.t.sum()

    module = Tied().eval()
    torch.export.save(torch.export.export(module, (torch.ones(2, 3),)), tmp_path / "x.pt2")
    live = module.state_dict()
    for source in (tmp_path / "x.pt2", tmp_path):
        with cs.open(source) as ckpt:
            assert set(ckpt) == set(live)
            assert all(torch.equal(ckpt[key].load(), live[key]) for key in live)
            assert [sorted(tie.names) for tie in ckpt.ties] == [["a.weight", "d.weight"]]
            assert torch.equal(ckpt.tensor_at(ckpt.extras["constants"]["scale"]), module.scale)


@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_files_are_read_where_they_are_stored(order: Any, tmp_path: Path) -> None:
    arrays = {
        "a/w": numpy.asarray(W, order=order), "big": W.astype(">f8"), "n": numpy.int64(3), "none": numpy.zeros((0, 2)),
        "half": W.astype(numpy.float16), "flags": W > 2, "z": W.astype(numpy.complex64),
    }  # fmt: skip
    numpy.savez(tmp_path / "x.npz", **arrays, names=numpy.array(["a", "b"]), things=numpy.array([{}], dtype=object))
    for source in (tmp_path / "x.npz", tmp_path):
        with cs.open(source) as ckpt:
            assert set(ckpt) == set(arrays)
            for key, value in arrays.items():
                native = numpy.ascontiguousarray(value, dtype=value.dtype.newbyteorder("=")).reshape(value.shape)
                assert torch.equal(ckpt[key].load(), torch.from_numpy(native)), key
            assert set(ckpt.extras) == {"names", "things"}
    numpy.save(tmp_path / "x.npy", numpy.asarray(W, order=order))
    with cs.open(tmp_path / "x.npy") as ckpt:
        assert list(ckpt) == ["tensor"]
        assert torch.equal(ckpt["tensor"].load(), torch.tensor(W))


def test_numpy_files_that_are_not_plain_have_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy.save(tmp_path / "o.npy", numpy.array({"w": W}, dtype=object), allow_pickle=True)
    problem = refused(tmp_path / "o.npy")
    assert "objects" in problem.headline
    assert holds_w(pasted(str(problem.help), tmp_path, monkeypatch))
    raw = (tmp_path / "o.npy").read_bytes()
    for end in range(6, 70):
        (tmp_path / "cut.npy").write_bytes(raw[:end])
        assert refused(tmp_path / "cut.npy").code == "unsupported-format"


def test_files_of_an_old_joblib_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04}\x8c\x01wcjoblib.numpy_pickle\nNDArrayWrapper\n)\x81}\x8c\x05shapeK\x02K\x03\x86sb.")
    problem = refused(path)
    assert problem.code == "unsupported-format"
    assert "joblib" in problem.headline
    assert pasted(str(problem.help), tmp_path, monkeypatch) is None


# names and types that need a second look


@pytest.mark.parametrize("name", ["bert_model.ckpt", "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"])
def test_a_tensorflow_checkpoint_is_named_by_its_prefix_and_by_its_files(name: str, tmp_path: Path) -> None:
    for ending in ("index", "data-00000-of-00001"):
        (tmp_path / f"bert_model.ckpt.{ending}").write_bytes(bytes(range(100)))
    problem = refused(tmp_path / name)
    assert "is a TensorFlow checkpoint" in problem.headline
    assert f"load_checkpoint({str(tmp_path / 'bert_model.ckpt')!r})" in str(problem.help)
    assert ast.parse(str(problem.help))


def test_arrays_of_numbers_that_are_not_read_are_named_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = W.astype("f4").view("u2").reshape(2, 3, 2)[..., 1].copy().view("V2")  # the upper halves: bfloat16
    others = {"long": W.astype("longdouble"), "text": numpy.array(["a"]), "day": numpy.array(["2020-01-01"], "M8[D]")}
    numpy.savez(tmp_path / "x.npz", w=W, half=half, **others)
    with cs.open(tmp_path / "x.npz") as checkpoint:
        assert list(checkpoint) == ["w"]
        assert set(checkpoint.unreadable) == {"half", "long"}
        assert "bfloat16" in checkpoint.unreadable["half"]
    numpy.savez(tmp_path / "half.npz", w=half)
    numpy.save(tmp_path / "half.npy", half)
    numpy.savez(tmp_path / "long.npz", w=others["long"])
    for name in ("half.npz", "half.npy", "long.npz"):
        problem = refused(tmp_path / name)
        made = pasted(str(problem.help), tmp_path, monkeypatch)
        assert made is None or holds_w(made), name
        assert made is not None or name != "long.npz"


def test_an_array_of_records_leads_to_its_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy.save(tmp_path / "x.npy", numpy.array([(1, 2.0)], [("a", "i4"), ("b", "f4")]))
    made = pasted(str(refused(tmp_path / "x.npy").help), tmp_path, monkeypatch)
    assert isinstance(made, cs.Checkpoint)
    assert list(made) == ["a", "b"]


def test_a_compressed_archive_of_several_leads_to_the_file_on_disk(tmp_path: Path) -> None:
    for name in ("a.pkl", "b.pkl"):
        (tmp_path / name).write_bytes(plain_pickle())
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name in ("a.pkl", "b.pkl"):
            archive.add(tmp_path / name, name)
    help = str(refused(tmp_path / "x.tar.gz").help)
    subprocess.run(help.removeprefix("unpack it: "), shell=True, check=True, cwd=tmp_path)
    assert holds_w(tmp_path / "new_folder" / "a.pkl")


@pytest.mark.parametrize("form", [lzma.FORMAT_ALONE, lzma.FORMAT_XZ])
def test_both_forms_of_lzma_are_unpacked(form: int, tmp_path: Path) -> None:
    (tmp_path / "x.pkl.lzma").write_bytes(lzma.compress(plain_pickle(), form))
    assert holds_w(tmp_path / "x.pkl.lzma")
    torn = lzma.compress(plain_pickle(), form)[:-20]
    (tmp_path / "torn").write_bytes(torn)
    assert refused(tmp_path / "torn").code == "damaged-zip"


def test_external_data_of_any_name_is_left_to_the_onnx_file(tmp_path: Path) -> None:
    data = Path(__file__).parents[1] / "data" / "formats"
    for name in ("external.onnx", "external.onnx.data"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    (tmp_path / "one.bin").write_bytes(bytes(64))
    with cs.open(tmp_path) as whole, cs.open(tmp_path / "external.onnx") as alone:
        assert whole.specs == alone.specs
    assert weights_in(["model.onnx", "pytorch_model.bin", "weights.bin"]) == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("head", "is_one"),
    [
        (b"\x08\x07:\x02ab", True),
        (b"\x08\x07\x12\x02ab", True),
        (b"\x10\x07:\x02ab", False),
        (b"\x08\x40:\x02ab", False),
        (b"\x08\x00:\x02ab", False),
        (b"\x08\x07\x12\x02\x01\x02", False),
        (b"\x08\x07:\x01a", False),
    ],
)
def test_a_model_of_onnx_begins_with_a_small_version(head: bytes, is_one: bool) -> None:
    assert is_onnx(head) is is_one
