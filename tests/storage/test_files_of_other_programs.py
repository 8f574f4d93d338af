"""Files of other programs: read value for value as the programs' own readers read them (see `scripts/formats`)."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from foreign import W, holds_w, other_programs, refused
from range_server import serving
from safetensors.torch import load_file

import ckptsurgery as cs
from ckptsurgery.storage.sources import unpacked

DATA = other_programs()
JOBLIB = ["arrays.joblib", "zlib.joblib", "gzip.joblib", "bz2.joblib", "xz.joblib"]
KERAS = ["keras.weights.h5", "keras.keras", "keras_old.h5"]
NAMES = [
    "old.h5",
    "new.h5",
    "latest.h5",
    *KERAS,
    "flax.msgpack",
    "plain.msgpack",
    "model.onnx",
    "external.onnx",
    *JOBLIB,
]


def theirs(name: str) -> dict[str, torch.Tensor]:
    """What the program's own reader gives, less what is said to be unreadable."""
    found = load_file(DATA / f"{'arrays.joblib' if name in JOBLIB else name}.safetensors")
    return {key: tensor for key, tensor in found.items() if name != "new.h5" or not key.startswith("chunks/")}


def same(checkpoint: cs.Checkpoint, wanted: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint) == set(wanted)
    for key, tensor in wanted.items():
        found = checkpoint[key].load()
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(found.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), key


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_what_the_program_reads(name: str, tmp_path: Path) -> None:
    with cs.open(DATA / name) as checkpoint:
        same(checkpoint, theirs(name))
        recipe = cs.Recipe(["{k...} -> m.{k...}"], drop=list(checkpoint.unreadable))
        cs.plan(checkpoint, recipe).save(tmp_path / "copy.safetensors", beside="drop", check=True)
    same(cs.open(tmp_path / "copy.safetensors"), {f"m.{key}": tensor for key, tensor in theirs(name).items()})


@pytest.mark.parametrize(
    "name", ["old.h5", "keras.keras", "flax.msgpack", "external.onnx", "arrays.joblib", "gzip.joblib"]
)
def test_they_are_opened_from_a_folder_and_over_http(name: str, tmp_path: Path) -> None:
    for file in DATA.glob(f"{name}*"):
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    with cs.open(tmp_path) as checkpoint:
        same(checkpoint, theirs(name))
    with serving() as server:
        server.files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with cs.open(f"{server.url}/{name}") as checkpoint:
            same(checkpoint, theirs(name))


def test_what_is_not_a_tensor_is_among_the_extras() -> None:
    with cs.open(DATA / "flax.msgpack") as checkpoint:
        assert checkpoint.extras["step"] == 300
        state = checkpoint.extras["opt_state"]
        assert (state["1"], state["2"], state["0"]["none"]) == (0.5, 1 + 2j, None)
        assert checkpoint.tensor_at(state["0"]["mu"]["w"]).shape == (2,)
    with cs.open(DATA / "old.h5") as checkpoint:
        assert "texts" in repr(checkpoint.extras["names"])
        assert checkpoint.config == {"name": "tiny"}
    with cs.open(DATA / "arrays.joblib") as checkpoint:
        assert checkpoint.extras["epoch"] == 3
        assert checkpoint.extras["scalar"] == 2.0
    with cs.open(DATA / "model.onnx") as checkpoint:
        assert list(checkpoint.extras) == ["fields.STRING"]


def test_the_configuration_of_keras_comes_along() -> None:
    assert cs.open(DATA / "keras.keras").config["class_name"] == "Functional"
    with cs.open(DATA / "keras_old.h5", subtree="model_weights") as checkpoint:
        assert checkpoint.config["class_name"] == "Functional"
        assert checkpoint["conv/conv/kernel"].shape == (3, 3, 3, 4)


def test_what_cannot_be_read_is_named() -> None:
    with cs.open(DATA / "keras_old.h5") as checkpoint:  # Keras' legacy files do not say that an array is bfloat16
        assert "bfloat16" in checkpoint.unreadable["model_weights/dense_3/dense_3/kernel"]
        with pytest.raises(cs.CheckpointError, match="unreadable-tensors"):
            checkpoint.state_dict()
    with cs.open(DATA / "new.h5") as checkpoint:
        assert sorted(checkpoint.unreadable) == [f"chunks/{n}" for n in ("many", "one", "plain", "small", "sum")]


def test_links_into_other_files_are_not_followed(tmp_path: Path) -> None:
    for name in ("model.onnx", "external.onnx"):
        shutil.copy(DATA / name, tmp_path)
    missing = refused(tmp_path / "external.onnx")
    assert missing.code == "missing-file" and "external.onnx.data" in missing.headline
    raw = (DATA / "external.onnx").read_bytes()
    for place in (b"../ernal.onnx.data", b"/xternal.onnx.data", b"a\\ternal.onnx.data"):
        (tmp_path / "external.onnx").write_bytes(raw.replace(b"external.onnx.data", place))
        assert refused(tmp_path / "external.onnx").code == "unsafe-index"


def test_a_flax_file_is_written_byte_for_byte(tmp_path: Path) -> None:
    with cs.open(DATA / "plain.msgpack") as checkpoint:
        cs.save(checkpoint, tmp_path / "new.msgpack")
        cs.plan(checkpoint, "params.{k...} -> {k...}").save(tmp_path / "short.msgpack", check=True)
    assert (tmp_path / "new.msgpack").read_bytes() == (DATA / "plain.msgpack").read_bytes()
    same(
        cs.open(tmp_path / "short.msgpack"), {k.removeprefix("params."): t for k, t in theirs("plain.msgpack").items()}
    )


STATE = {
    "a.b": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3).half(), "n": torch.tensor(7),
    "flag": torch.tensor([True]), "none": torch.zeros(0, 4), "z": torch.ones(2, dtype=torch.complex64),
    "long": torch.arange(70_000),
}  # fmt: skip


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    cs.save(STATE, tmp_path / "x.npz")
    with numpy.load(tmp_path / "x.npz") as found:  # zipfile compares each checksum
        assert list(found) == list(STATE)
        for key, tensor in STATE.items():
            assert found[key].shape == tensor.shape and numpy.array_equal(found[key], tensor.numpy())
    with cs.open(tmp_path / "x.npz") as checkpoint:
        same(checkpoint, STATE)
        assert all(checkpoint.extent(key).offset % 64 == 0 for key in STATE)
        cs.plan(checkpoint, ["a.b [x y] -> t [y x]", "{k} -> {k}"]).save(tmp_path / "y.npz", check=True)
    with numpy.load(tmp_path / "y.npz") as found:
        assert numpy.array_equal(found["t"], STATE["a.b"].T.numpy())
    again = (tmp_path / "x.npz").read_bytes()
    cs.save(STATE, tmp_path / "x.npz", overwrite=True)
    assert (tmp_path / "x.npz").read_bytes() == again


@pytest.mark.parametrize(("suffix", "state"), [("npz", torch.bfloat16), ("msgpack", torch.float4_e2m1fn_x2)])
def test_what_a_format_cannot_hold_is_refused(suffix: str, state: torch.dtype, tmp_path: Path) -> None:
    odd = torch.zeros(2, dtype=torch.uint8).view(state)
    with pytest.raises(cs.CheckpointError, match=r"(?s)dtype-not-in-format.*safetensors"):
        cs.save({"w": odd}, tmp_path / f"x.{suffix}")
    shared = torch.ones(2)
    with pytest.raises(cs.CheckpointError, match=r'(?s)tie-not-in-format.*drop = \["b"\]'):
        cs.save({"a": shared, "b": shared}, tmp_path / f"x.{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_key_that_begins_another_has_no_place_in_a_tree(tmp_path: Path) -> None:
    with pytest.raises(cs.CheckpointError, match=r"'a.b' cannot be written"):
        cs.save({"a": torch.ones(1), "a.b": torch.ones(1)}, tmp_path / "x.msgpack")


# archives


def nemo(path: Path, mode: str, *names: str) -> None:
    """As NeMo's connector writes it: the configuration and the weights under `./`."""
    with tarfile.open(path, mode) as archive:
        for name in names:
            data = io.BytesIO()
            torch.save({"w": torch.tensor(W)}, data)
            text = data.getvalue() if name.endswith((".ckpt", ".pt")) else b"name: tiny\n"
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:xz", "w:bz2"])
def test_the_checkpoint_in_an_archive_is_opened(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.nemo"
    nemo(path, mode, "model_config.yaml", "model_weights.ckpt")
    for limit in (64 << 20, 100):  # in memory, and in a file without a name
        monkeypatch.setattr(unpacked, "_IN_MEMORY", limit)
        for source in (path, tmp_path):
            with cs.open(source) as checkpoint:
                assert torch.equal(checkpoint["w"].load(), torch.tensor(W))
                assert checkpoint.extras["model_config.yaml"] == "name: tiny\n"
    with cs.open(path) as checkpoint:
        assert checkpoint.extent("w") is not None
        assert (checkpoint.files == (str(path),)) == (mode == "w:")
        cs.plan(checkpoint, "w -> v").save(tmp_path / "out.safetensors", check=True, resume=True)


def test_an_archive_of_several_checkpoints_lists_them(tmp_path: Path) -> None:
    nemo(tmp_path / "x.tar", "w:", "a.ckpt", "b.pt")
    problem = refused(tmp_path / "x.tar")
    assert (problem.code, problem.notes) == ("ambiguous-folder", ("a.ckpt", "b.pt"))
    nemo(tmp_path / "y.tar", "w:", "readme.txt")
    assert refused(tmp_path / "y.tar").code == "nothing-to-read"
    nemo(tmp_path / "z.tar", "w:", "weights/__0_0.distcp", "weights/.metadata")
    assert "open the folder" in str(refused(tmp_path / "z.tar").help)


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setattr(unpacked, "_FREE", 1 << 20)
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(30 << 20)))
    problem = refused(tmp_path / "x.gz")
    assert problem.code == "unsupported-format" and "gunzip" in str(problem.help)
    (tmp_path / "y.gz").write_bytes(gzip.compress(gzip.compress(b"twice" * 99)))
    assert "more than once" in refused(tmp_path / "y.gz").headline


def test_a_deflated_keras_file_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(DATA / "keras.keras") as old, zipfile.ZipFile(tmp_path / "x.keras", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    same(cs.open(tmp_path / "x.keras"), theirs("keras.keras"))


# torch's own


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_frozen_torchscript_is_read_by_the_names_in_its_code(tmp_path: Path) -> None:
    linear = torch.nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(W))
    scripted = torch.jit.script(linear.eval())
    torch.jit.save(torch.jit.freeze(scripted), str(tmp_path / "frozen.pt"))
    torch.jit.save(scripted, str(tmp_path / "scripted.pt"))
    with cs.open(tmp_path / "frozen.pt") as checkpoint:
        assert list(checkpoint) == ["CONSTANTS.c0", "CONSTANTS.c1"]
        assert torch.equal(checkpoint["CONSTANTS.c1"].load(), linear.bias)
    assert holds_w(tmp_path / "frozen.pt")
    same(cs.open(tmp_path / "scripted.pt"), dict(linear.state_dict()))


def test_a_damaged_array_of_a_flax_optimizer_is_an_error_of_the_file(tmp_path: Path) -> None:
    def array(count: int) -> bytes:
        inner = bytes([0x93, 0x91, count, 0xA7]) + b"float32" + bytes([0xC4, 8]) + bytes(8)
        return bytes([0xC7, len(inner), 1]) + inner

    state = bytes([0x82, 0xA6]) + b"params" + bytes([0x81, 0xA1]) + b"w" + array(2)
    for count in (2, 99):
        path = tmp_path / f"{count}.msgpack"
        path.write_bytes(state + bytes([0xA9]) + b"opt_state" + bytes([0x81, 0xA1]) + b"m" + array(count))
        if count == 2:
            assert list(cs.open(path)) == ["params.w"]
        else:
            problem = refused(path)
            assert problem.code == "bad-header"
            assert "an array beside the model" in problem.headline
