"""Legacy torch files: beyond what `test_torch_zip` holds for both formats."""

from __future__ import annotations

import importlib.metadata
import io
import pickle

import pytest
import torch

from ckptsurgery.errors import CheckpointError
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.formats.torch_legacy import read_torch_legacy


def legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def test_real_legacy_files_with_transposed_tensors_are_read():
    paths = [str(f.locate()) for f in importlib.metadata.files("facenet-pytorch") if str(f).endswith("net.pt")]
    assert len(paths) == 3
    strided = 0
    for path in paths:
        live = torch.load(path, weights_only=True)
        with Checkpoint(read_torch_legacy(path), path) as checkpoint:
            found = checkpoint.state_dict()
        assert list(found) == list(live)
        assert all(torch.equal(found[key], live[key]) for key in live)
        strided += sum(entry.strides is not None for entry in checkpoint.entries.values())
    assert strided > 10


def test_every_truncation_is_one_error(tmp_path):
    data = legacy({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "x.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    for end in range(len(data)):
        cut.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_torch_legacy(cut)


def test_views_of_storages_of_very_old_files_are_shifted(tmp_path):
    # PyTorch 0.1 to 0.3 saved a storage's view as (key, offset, numel) beside its root
    stand_in = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "7", "cpu", 10, ("8", 4, 3)) if value is stand_in else None

    class View:
        def __reduce__(self):
            return torch._utils._rebuild_tensor, (stand_in, 1, (2,), (1,))

    buffer = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, buffer, protocol=2)
    Pickler(buffer, protocol=2).dump({"w": View()})
    pickle.dump(["7"], buffer, protocol=2)
    data = torch.arange(10.0)
    path = tmp_path / "x.pt"
    path.write_bytes(buffer.getvalue() + (10).to_bytes(8, "little") + data.numpy().tobytes())
    assert torch.load(path, weights_only=True)["w"].tolist() == [5.0, 6.0]
    with Checkpoint(read_torch_legacy(path), "x") as checkpoint:
        assert checkpoint["w"].load().tolist() == [5.0, 6.0]


def test_storage_lists_that_lie_are_refused(tmp_path):
    path = legacy({"a": torch.ones(3)}, tmp_path / "x.pt")
    data = path.read_bytes()
    path.write_bytes(data[:-20] + (4).to_bytes(8, "little") + data[-12:])
    with pytest.raises(CheckpointError, match="holds 4 elements where 3 are announced"):
        read_torch_legacy(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1002, 2))
    with pytest.raises(CheckpointError, match="unknown version"):
        read_torch_legacy(path)


@pytest.mark.parametrize("keys", [("0",), {"0": 1}, [0], ["0", None]])
def test_a_list_of_storages_that_is_none_is_refused(keys, tmp_path):
    data = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, {}, keys))
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="the list of its storages is none"):
        read_torch_legacy(tmp_path / "x.pt")
