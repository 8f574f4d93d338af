"""Torch zip files as they are written: torch reads them back, in every way that it knows, bit for bit."""

from __future__ import annotations

import argparse
import os
import random
import stat
import subprocess
import sys
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

from ckptsurgery.errors import CheckpointError
from ckptsurgery.specs import DTYPES, TensorSpec
from ckptsurgery.storage.formats.format import Announced
from ckptsurgery.storage.formats.torch_legacy import read_torch_legacy
from ckptsurgery.storage.formats.torch_zip import read_torch_zip
from ckptsurgery.storage.output.torch_writer import TorchZipWriter
from ckptsurgery.storage.tensors import dense_bytes, spec_of


def write(path, tensors, chunk=1 << 20, shuffle=None, **options):
    """Writes tensors in chunks, in file order or in a random one."""
    writer = TorchZipWriter(Announced(Path(path), {key: spec_of(t) for key, t in tensors.items()}, **options))
    pieces = []
    for key in writer.order:
        place, data = writer.places[key], dense_bytes(tensors[key], key)
        assert place.nbytes == len(data)
        pieces += [(place.file, place.offset + i, data[i : i + chunk]) for i in range(0, len(data), chunk)]
    if shuffle is not None:
        random.Random(shuffle).shuffle(pieces)
    with writer:
        for piece in pieces:
            writer.write(*piece)
    return writer


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def every_dtype():
    generator = random.Random(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        if dtype.torch and hasattr(torch, dtype.torch):
            kind = getattr(torch, dtype.torch)
            data = bytearray(generator.randbytes(12 * kind.itemsize) if name != "BOOL" else bytes([0, 1] * 6))
            tensors[f"t.{name}"] = torch.frombuffer(data, dtype=torch.uint8).view(kind).reshape(3, 4)
    return tensors


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_torch_loads_every_dtype_mapped_or_not(tmp_path):
    tensors = {**every_dtype(), "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "last": torch.ones(1)}
    path = tmp_path / "x.pt"
    write(path, tensors)
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert list(found) == list(tensors) and type(found) is OrderedDict
        for key, tensor in tensors.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
            assert raw(found[key]) == raw(tensor), key


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_of_a_kind_are_each_their_own(tmp_path):
    tensors = {f"{i}.{key}": tensor.roll(i, 0) for i in range(4) for key, tensor in every_dtype().items()}
    tensors |= {f"{i}.flat": torch.arange(12.0) + i for i in range(4)}
    write(tmp_path / "x.pt", tensors)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(found) == list(tensors)
    for key, tensor in tensors.items():
        assert (found[key].dtype, found[key].shape, raw(found[key])) == (tensor.dtype, tensor.shape, raw(tensor)), key


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_data_are_aligned_and_lie_where_torch_computes_them(tmp_path, monkeypatch):
    tensors = {**every_dtype(), "empty": torch.empty(0), "odd": torch.ones(7, dtype=torch.int8), "after": torch.ones(3)}
    path = tmp_path / "x.pt"
    write(path, tensors)
    contents = read_torch_zip(path)
    assert all(entry.offset % 64 == 0 and entry.extent is not None for entry in contents.entries.values())
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")  # torch compares computed offsets with those in the headers
    with config.patch("load.calculate_storage_offsets", True):
        torch.load(path, weights_only=True, mmap=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 50), st.none() | st.integers(0, 9))
def test_checksums_hold_whatever_the_order_of_writing(tmp_path_factory, sizes, chunk, shuffle):
    path = tmp_path_factory.getbasetemp() / "order.pt"
    path.unlink(missing_ok=True)
    write(path, {f"k{i}": torch.arange(n, dtype=torch.int32) for i, n in enumerate(sizes)}, chunk, shuffle)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    found = torch.load(path, weights_only=True)
    assert [found[f"k{i}"].tolist() for i in range(len(sizes))] == [list(range(n)) for n in sizes]


def test_threads_may_write_at_once(tmp_path):
    tensors = {f"k{i}": torch.randn(20_000) for i in range(4)}
    writer = TorchZipWriter(Announced(tmp_path / "x.pt", {key: spec_of(t) for key, t in tensors.items()}))

    def some(start):
        for key, tensor in tensors.items():
            data, place = dense_bytes(tensor, key), writer.places[key]
            for i in range(start * 4000, len(data), 8000):
                writer.write(place.file, place.offset + i, data[i : i + 4000])

    with writer:
        threads = [threading.Thread(target=some, args=(start,)) for start in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_tied_names_share_one_storage(tmp_path):
    writer = write(tmp_path / "x.pt", {"embed": torch.randn(50, 4)}, aliases={"head": "embed"})
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["head"].data_ptr() == found["embed"].data_ptr()
    assert (tmp_path / "x.pt").stat().st_size < 3000
    assert writer.files == [str(tmp_path / "x.pt")]
    contents = read_torch_zip(tmp_path / "x.pt")
    assert contents.entries["head"] == contents.entries["embed"]


def test_metadata_alone_is_set_on_the_state_dict(tmp_path):
    module = torch.nn.BatchNorm1d(3)
    state = module.state_dict()
    write(tmp_path / "x.pt", state, extras={"_metadata": state._metadata})
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found._metadata == state._metadata
    torch.nn.BatchNorm1d(3).load_state_dict(found)


class Gone:
    pass


@pytest.mark.parametrize("legacy", [False, True])
def test_extras_of_a_training_checkpoint_go_along_with_their_tensors(tmp_path, legacy):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    shared = torch.arange(6.0).reshape(2, 3)
    value = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "big": 1 << 80,
        "minus": -7,
        "args": argparse.Namespace(lr=0.1, names=("a", None, True)),
        "views": [shared, shared.t(), shared[1]],
        "tags": {"a", "b"},
        "raw": b"\x00\xff" * 5000,
        "complex": 1 - 2j,
        "config": Gone(),
        "nested": {"kept": 1, "lost": Gone()},
    }
    source = tmp_path / "source.pt"
    torch.save(value, source, _use_new_zipfile_serialization=not legacy)
    contents = read_torch_legacy(source) if legacy else read_torch_zip(source)
    writer = write(tmp_path / "x.pt", model.state_dict(), extras=contents.extras)
    assert writer.left_out[:2] == ["config", "nested.lost"]
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(found["state_dict"]["weight"], model.weight)
    assert found["state_dict"]._metadata == model.state_dict()._metadata
    torch.optim.Adam(model.parameters()).load_state_dict(found["optimizer"])
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert [t.tolist() for t in found["views"]] == [t.tolist() for t in value["views"]]
    assert (found["epoch"], found["big"], found["minus"], found["complex"]) == (3, 1 << 80, -7, 1 - 2j)
    assert found["args"] == {"lr": 0.1, "names": ("a", None, True)}
    assert found["tags"] == {"a", "b"} and found["nested"] == {"kept": 1}
    assert found["raw"] == value["raw"]
    assert read_torch_zip(tmp_path / "x.pt").extras["optimizer"]["param_groups"][0]["lr"] == 1e-3


def test_extra_state_stays_in_the_state_dict_and_dotted_extras_nest(tmp_path):
    extras = {"layer._extra_state": b"scale", "checkpoint.args.lr": 0.1, "state_dict": {"other": 1}}
    writer = write(tmp_path / "x.pt", {"layer.w": torch.ones(2)}, extras=extras)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["state_dict"]["layer._extra_state"] == b"scale"
    assert found["checkpoint"] == {"args": {"lr": 0.1}}
    assert writer.left_out == ["state_dict"]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans(), inner, max_size=4)
        | st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(plain)
def test_plain_extras_come_back_equal_through_torch_and_through_the_reader(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "plain.pt"
    path.unlink(missing_ok=True)
    writer = write(path, {"a.w": torch.ones(1)}, extras={"extra": value})
    assert writer.left_out == []
    assert torch.load(path, weights_only=True)["extra"] == value
    assert read_torch_zip(path).extras["extra"] == value


def test_entries_under_names_that_torch_does_not_load_are_left_out(tmp_path):
    value = {None: 1, 2: 3, "kept": {(4, 5): 6, None: None}}
    writer = write(tmp_path / "x.pt", {"w": torch.ones(1)}, extras={"extra": value})
    assert torch.load(tmp_path / "x.pt", weights_only=True)["extra"] == {None: 1, 2: 3, "kept": {None: None}}
    assert writer.left_out == ["extra.kept.(4, 5)"]


def test_metadata_of_other_formats_survives(tmp_path):
    write(tmp_path / "x.pt", {"w": torch.ones(1)}, metadata={"format": "pt", "note": "größer", "empty": ""})
    assert read_torch_zip(tmp_path / "x.pt").metadata == {"note": "größer", "empty": ""}
    torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    tensors = {f"k{i}": torch.arange(i * 10) for i in range(5)}
    for name, shuffle in (("a.pt", None), ("b.pt", 3)):
        write(tmp_path / name, tensors, 64, shuffle, extras={"epoch": 1}, metadata={"a": "b"})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_more_than_65535_records_are_indexed(tmp_path):
    count = 66_000
    write(tmp_path / "x.pt", {f"k.{i}": torch.tensor(i % 128, dtype=torch.int8) for i in range(count)})
    contents = read_torch_zip(tmp_path / "x.pt")
    assert len(contents.entries) == count
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found[f"k.{count - 1}"].item() == (count - 1) % 128


def test_files_and_records_above_four_gigabytes_are_laid_out_as_torch_does(tmp_path):
    big = (1 << 32) + 5
    specs = {"a.small": TensorSpec([3], "U8"), "b.big": TensorSpec([big], "U8"), "c.after": TensorSpec([5], "U8")}
    writer = TorchZipWriter(Announced(tmp_path / "x.pt", specs))
    places = {key: writer.places[key].offset for key in specs}
    data = OrderedDict((key, torch.empty(spec.shape, dtype=torch.uint8)) for key, spec in specs.items())
    with torch.serialization.skip_data():
        torch.save(data, tmp_path / "archive.pt")
    found = read_torch_zip(tmp_path / "archive.pt").entries
    assert places == {key: entry.offset for key, entry in found.items()}


def test_nothing_is_seen_before_the_commit_and_nothing_is_left_after_an_abort(tmp_path):
    path = tmp_path / "x.pt"
    writer = TorchZipWriter(Announced(path, {"w": TensorSpec([4], "F32")}))
    with pytest.raises(RuntimeError), writer:
        writer.write(writer.places["w"].file, writer.places["w"].offset, bytes(16))
        assert not path.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    writer = TorchZipWriter(Announced(path, {"w": TensorSpec([4], "F32")}))
    with pytest.raises(CheckpointError, match="16 bytes of the output were not written"), writer:
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    mask = os.umask(0o022)
    try:
        write(path, {"w": torch.ones(1)})
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_extras_whose_file_is_gone_leave_nothing_behind(tmp_path):
    source, out = tmp_path / "source.pt", tmp_path / "out"
    torch.save({"model": {"a.w": torch.ones(2)}, "moments": [torch.ones(3000)]}, source)
    extras = read_torch_zip(source).extras
    out.mkdir()
    for spoil in (lambda: os.truncate(source, 2000), source.unlink):
        spoil()
        with pytest.raises(CheckpointError, match=r"became shorter|no such file"):
            write(out / "x.pt", {"w": torch.ones(2)}, extras=extras)
        assert list(out.iterdir()) == []


def test_what_torch_cannot_hold_is_refused_at_once(tmp_path):
    specs = {"six": TensorSpec([4], "F6_E2M3"), "odd": TensorSpec([3], "F4"), "fine": TensorSpec([2], "F32")}
    with pytest.raises(CheckpointError) as caught:
        TorchZipWriter(Announced(tmp_path / "x.pt", specs, aliases={"a": "gone"}))
    codes = [problem.code for problem in caught.value.diagnostics]
    assert codes == ["dtype-not-in-torch", "odd-packed-shape", "alias-of-nothing"]


def test_writing_imports_no_torch(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(4)}, "epoch": 1, "o": [torch.ones(3)]}, tmp_path / "x.pt")
    program = (
        "import sys\nfrom pathlib import Path\nfrom ckptsurgery.storage.formats.format import Announced\n"
        "from ckptsurgery.storage.formats.torch_zip import read_torch_zip\n"
        "from ckptsurgery.storage.output.torch_writer import TorchZipWriter\n"
        f"contents = read_torch_zip({str(tmp_path / 'x.pt')!r})\n"
        "specs = {k: e.spec for k, e in contents.entries.items()}\n"
        f"with TorchZipWriter(Announced(Path({str(tmp_path / 'y.pt')!r}), specs, extras=contents.extras)) as w:\n"
        "    for place in w.places.values(): w.write(place.file, place.offset, bytes(place.nbytes))\n"
        "print({'torch', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert torch.load(tmp_path / "y.pt", weights_only=True)["o"][0].tolist() == [1, 1, 1]


def test_shared_parts_of_the_extras_stay_shared_and_circular_ones_are_left_out(tmp_path):
    shared: list = [1]
    for _ in range(40):
        shared = [shared, shared]
    circular: dict = {"kept": 1}
    circular["self"] = circular
    moment = torch.ones(2)
    extras = {"shared": shared, "circular": circular, "moments": [moment, moment]}
    writer = write(tmp_path / "x.pt", {"w": torch.ones(1)}, extras=extras)
    assert writer.left_out == ["circular.self"]
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["shared"][0] is found["shared"][1]
    assert found["circular"] == {"kept": 1}
    assert found["moments"][0].data_ptr() == found["moments"][1].data_ptr()
    assert read_torch_zip(tmp_path / "x.pt").extras["shared"][0] is not None
