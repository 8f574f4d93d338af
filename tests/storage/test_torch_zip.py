"""Torch zip files: the reader agrees with torch.load, bit for bit, and refuses what is not sound."""

from __future__ import annotations

import importlib.metadata
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsurgery.errors import CheckpointError
from ckptsurgery.specs import DTYPES
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.formats.sniffing import FileReader
from ckptsurgery.storage.formats.torch_legacy import read_torch_legacy
from ckptsurgery.storage.formats.torch_zip import read_torch_zip
from ckptsurgery.storage.unpickling.inert import Opaque


def state_dict(contents):
    with Checkpoint(contents, "x") as checkpoint:
        return checkpoint.state_dict()


def same(a, b):
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a[key], b[key])]
        assert torch.equal(*raw), key


def installed(package, suffix):
    files = importlib.metadata.files(package)
    return sorted(str(f.locate()) for f in files if str(f).endswith(suffix))


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def saved(request, tmp_path):
    """Saves a value in one of torch's two formats and gives a function that reads it."""

    def save(value, name="x.pt"):
        path = tmp_path / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # legacy files keep the source of modules, or warn that they cannot
            torch.save(value, path, _use_new_zipfile_serialization=request.param)
        read = read_torch_zip if request.param else read_torch_legacy
        return lambda subtree=None: read(path, subtree)

    return save


def random_tensor(dtype, *shape):
    size = max(1, torch.empty((), dtype=dtype).element_size())
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    count = size
    for n in shape:
        count *= n
    return torch.randint(0, 255, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if d.torch and hasattr(torch, d.torch)])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_is_read(saved, name):
    value = {"a": random_tensor(getattr(torch, DTYPES[name].torch), 3, 4), "b": torch.ones(2)}
    contents = saved(value)()
    assert contents.entries["a"].spec.dtype == name
    same(state_dict(contents), value)


def test_views_strides_scalars_and_empties_are_read(saved):
    base = torch.arange(24.0)
    value = {
        "whole": base,
        "tail": base[20:],
        "transposed": base.view(4, 6).t(),
        "strided": base[::3],
        "expanded": base[:1].expand(5),
        "broadcast": base.view(4, 1, 6).expand(4, 3, 6),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "ones": base.view(1, 24, 1).transpose(0, 2),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 7),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    contents = saved(value)()
    same(state_dict(contents), value)
    assert contents.entries["ones"].strides is None
    assert contents.entries["tail"].offset == contents.entries["whole"].offset + 80
    assert contents.entries["transposed"].extent is None


def test_tied_names_have_equal_places_and_disjoint_views_have_not(saved):
    w, packed = torch.randn(3, 3), torch.randn(8)
    contents = saved({"a": w, "b": w, "c": packed[:4], "d": packed[4:]})()
    assert contents.entries["a"] == contents.entries["b"]
    assert [tie.names for tie in Checkpoint(contents, "x").ties] == [("a", "b")]


def test_metadata_of_a_state_dict_is_kept(saved):
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    contents = saved(module.state_dict())()
    same(state_dict(contents), module.state_dict())
    assert contents.extras == {"_metadata": {"": {"version": 1}, "0": {"version": 2}}}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.tied = self.inner
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_parameter("absent", None)


def test_a_pickled_module_gives_its_state_dict(saved):
    module = Block()
    for value in (module, {"model": module, "epoch": 3}, torch.nn.DataParallel(module)):
        contents = saved(value)()
        live = module.state_dict() if not isinstance(value, torch.nn.DataParallel) else value.state_dict()
        found = state_dict(contents)
        same({k: found[k] for k in live}, dict(live))
        assert set(found) == set(live)


def test_optimizers_arguments_and_lost_classes_are_extras(saved):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    contents = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7, "kind": Block})()
    assert list(contents.entries) == ["weight", "bias"]
    assert contents.extras["epoch"] == 7
    assert repr(contents.extras["kind"]).endswith(".Block>")
    state = contents.extras["optimizer"]["state"][0]
    assert state["exp_avg"].spec.shape == (2, 2)
    assert contents.extras["optimizer"]["param_groups"][0]["lr"] == 1e-3


def test_a_bare_tensor_and_a_list_have_keys(saved):
    assert list(saved(torch.ones(3))().entries) == ["tensor"]
    assert list(saved([torch.ones(3), torch.zeros(2)])().entries) == ["0", "1"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_plain_tensor_is_an_opaque_extra_with_the_reason(saved):
    value = {
        "w": torch.ones(3),
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "meta": torch.empty(3, device="meta"),
    }
    contents = saved(value)()
    assert list(contents.entries) == ["w"]
    notes = {key: extra.note for key, extra in contents.extras.items() if isinstance(extra, Opaque)}
    assert "sparse" in notes["sparse"] and "sparse" in notes["csr"] and "quantised" in notes["quantised"]
    assert "conj" in notes["conjugate"] and "meta" in notes["meta"]


class Named(torch.nn.Parameter):
    pass


class Wrapped(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_tensor_subclasses_with_plain_data_are_read_and_wrappers_are_not(saved):
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.note = "an attribute"
    wrapper = torch.Tensor._make_wrapper_subclass(Wrapped, (2,), dtype=torch.float32)
    contents = saved({"named": Named(torch.randn(2)), "noted": parameter, "wrapped": wrapper})()
    assert list(contents.entries) == ["named", "noted"]
    assert "keeps its data in a form of its own" in contents.extras["wrapped"].note
    with pytest.raises(CheckpointError, match="wrapped: a tensor of the class"):
        state_dict(contents)
    assert torch.equal(Checkpoint(contents, "x").load("noted"), parameter.data)


class Reduces:
    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


def test_a_tensor_that_only_code_would_make_is_refused_by_its_name(saved, tmp_path):
    marker = tmp_path / "pwned"
    value = {"a.w": torch.ones(2), "b.w": Reduces(eval, f"open({str(marker)!r}, 'w')")}
    with pytest.raises(CheckpointError, match=r"'b.w' would be made by running .*eval") as caught:
        saved(value)()
    assert caught.value.diagnostics[0].code == "unsafe-pickle"
    with pytest.raises(CheckpointError, match=r"unsafe-pickle.*'b.w' would be made by running .*eval"):
        saved({**value, "b.w": Reduces(eval, "w", {"w": torch.ones(2)})})()
    # beside the model it is an inert extra
    assert repr(saved({"model": {"a.w": torch.ones(2)}, "hook": value["b.w"]})().extras["hook"]).endswith(".eval>")
    assert not marker.exists()


names = st.text("abc", min_size=1, max_size=3)
dtypes = st.sampled_from([torch.float32, torch.int8])
tensors = st.builds(lambda n, dtype: torch.zeros(n, dtype=dtype), st.integers(0, 4), dtypes)
trees = st.recursive(
    tensors, lambda inner: st.dictionaries(names, inner, max_size=3) | st.lists(inner, max_size=3), max_leaves=8
)


def flat(tree, prefix=""):
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for name, part in parts for k, v in flat(part, f"{prefix}.{name}" if prefix else str(name)).items()}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, trees, max_size=4))
def test_any_tree_of_tensors_flattens_to_its_paths(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "x.pt"
    torch.save(tree, path)
    expected = flat(tree)
    if not expected:
        with pytest.raises(CheckpointError, match="no tensors"):
            read_torch_zip(path, "")
    else:
        same(state_dict(read_torch_zip(path, "")), expected)


def test_big_endian_files_are_read(tmp_path):
    value = {"a": torch.arange(5.0), "b": torch.arange(3), "c": torch.tensor([1 + 2j, 3 - 4j]), "d": torch.ones(3) > 0}
    torch.save(value, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as source, zipfile.ZipFile(tmp_path / "big.pt", "w") as target:
        for info in source.infolist():
            data = source.read(info)
            width = {"0": 4, "1": 8, "2": 4}.get(info.filename.rpartition("data/")[2], 0)
            if info.filename.endswith("byteorder"):
                data = b"big"
            elif width:
                data = b"".join(data[i : i + width][::-1] for i in range(0, len(data), width))
            target.writestr(info.filename, data)
    contents = read_torch_zip(tmp_path / "big.pt")
    assert contents.entries["a"].big_endian and contents.entries["a"].extent is None
    same(state_dict(contents), value)


def test_every_truncation_is_one_error(tmp_path):
    path, cut = tmp_path / "x.pt", tmp_path / "cut.pt"
    torch.save({"a": torch.ones(3), "b": {"c": torch.ones(1)}}, path)
    data = path.read_bytes()
    for end in range(len(data)):
        cut.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_torch_zip(cut)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_give_contents_or_one_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "flip.pt"
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2).t()}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        contents = read_torch_zip(path)
    except CheckpointError:
        return
    for entry in contents.entries.values():
        assert entry.offset + (entry.spec.nbytes if entry.strides is None else 0) <= len(raw)


def repacked(path, target, method=zipfile.ZIP_STORED, rename=lambda name: name):
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", method) as new:
        for info in source.infolist():
            new.writestr(rename(info.filename), source.read(info), method)


def test_archives_that_are_not_sound_are_refused(tmp_path):
    path, bad = tmp_path / "x.pt", tmp_path / "bad.pt"
    torch.save({"a": torch.ones(300)}, path)
    repacked(path, bad, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"compressed(.|\n)*torch.save\(torch.load"):
        read_torch_zip(bad)
    for rename in (lambda n: "/" + n, lambda n: "../" + n, lambda n: n.replace("data/0", "data/../0")):
        repacked(path, bad, rename=rename)
        with pytest.raises(CheckpointError, match="outside of its folder"):
            read_torch_zip(bad)
    raw = path.read_bytes()
    local = raw.index(b"x/data/0")
    bad.write_bytes(raw[:local] + b"x/data/1" + raw[local + 8 :])
    with pytest.raises(CheckpointError, match="contradicts itself"):
        read_torch_zip(bad)
    # the directory says that two records begin at the same header
    first, second = raw.rindex(b"x/version"), raw.rindex(b"x/data/0")
    offset = slice(first - 4, first)
    same_place = raw[: offset.start] + raw[second - 4 : second] + raw[offset.stop :]
    bad.write_bytes(same_place)
    with pytest.raises(CheckpointError):
        read_torch_zip(bad)


def test_absurd_offsets_in_the_directory_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(3)}, path)
    raw = path.read_bytes()
    entry = raw.rindex(b"PK\x01\x02")
    name = int.from_bytes(raw[entry + 28 : entry + 30], "little")
    extra = struct.pack("<HHQ", 1, 8, (1 << 64) - 5)
    head = bytearray(raw[entry : entry + 46])
    head[30:32], head[42:46] = len(extra).to_bytes(2, "little"), b"\xff" * 4
    inserted = raw[:entry] + head + raw[entry + 46 : entry + 46 + name] + extra + raw[entry + 46 + name :]
    end = inserted.rindex(b"PK\x05\x06")
    wide = inserted.rindex(b"PK\x06\x06")
    size = int.from_bytes(raw[raw.rindex(b"PK\x05\x06") + 12 :][:4], "little") + len(extra)
    patched = bytearray(inserted)
    patched[wide + 40 : wide + 48] = size.to_bytes(8, "little")
    patched[wide + 56 + 8 : wide + 56 + 16] = wide.to_bytes(8, "little")
    patched[end + 12 : end + 16] = size.to_bytes(4, "little")
    path.write_bytes(patched)
    with pytest.raises(CheckpointError, match=r"truncated|no readable zip"):
        read_torch_zip(path)


def test_views_that_reach_outside_of_their_storage_are_refused_by_key(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(3), "b": torch.ones(200)}, path)
    raw = path.read_bytes()
    at = raw.index(struct.pack("<BBBB", ord("K"), 200, 0x85, ord("q")))
    longer = bytearray(raw)
    longer[at + 1] = 201
    path.write_bytes(longer)
    with pytest.raises(CheckpointError, match=r"'b' cannot be read: F32 \[201\].*outside its storage of 800 bytes"):
        read_torch_zip(path)


def test_other_zip_files_are_named(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(CheckpointError, match="numpy array whose header cannot be read"):
        FileReader().read(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"")
    with pytest.raises(CheckpointError, match=r"no torch file: it holds readme.txt"):
        FileReader().read(str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archives_give_their_modules_tensors(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).eval()
    torch.jit.save(torch.jit.trace(module, torch.ones(1, 2)), str(tmp_path / "x.pt"))
    found = state_dict(read_torch_zip(tmp_path / "x.pt"))
    live = module.state_dict()
    assert set(found) == set(live)
    same({k: found[k] for k in live}, dict(live))


def test_real_lightning_files_are_read_also_where_weights_only_refuses(tmp_path):
    paths = installed("pesto-pitch", ".ckpt")
    assert len(paths) == 2
    refused = []
    for path in paths:
        contents = read_torch_zip(path)
        try:
            live = torch.load(path, weights_only=True)["state_dict"]
        except Exception:
            refused.append(path)
            copy = tmp_path / "copy.ckpt"
            shutil.copy(path, copy)
            with torch.serialization.safe_globals([]), zipfile.ZipFile(copy) as archive:
                assert b"omegaconf" in archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
            assert all(torch.isfinite(t.float()).all() for t in state_dict(contents).values())
        else:
            same(state_dict(contents), dict(live))
        assert {"epoch", "global_step", "pytorch-lightning_version", "loops", "_metadata"} <= set(contents.extras)
    assert len(refused) == 1


def test_reading_imports_neither_torch_nor_numpy(tmp_path):
    torch.save({"state_dict": {"a.w": torch.ones(3)}, "epoch": 1}, tmp_path / "x.pt")
    torch.save({"a.w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    program = (
        "import sys\n"
        "from ckptsurgery.storage.formats.torch_zip import read_torch_zip\n"
        "from ckptsurgery.storage.formats.torch_legacy import read_torch_legacy\n"
        "from ckptsurgery.storage.formats.plain_pickle import read_pickle\n"
        f"print(len(read_torch_zip({str(tmp_path / 'x.pt')!r}).entries))\n"
        f"print(len(read_torch_legacy({str(tmp_path / 'old.pt')!r}).entries))\n"
        "print({'torch', 'numpy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["1", "1", "set()"]
