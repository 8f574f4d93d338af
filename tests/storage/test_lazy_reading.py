"""A checkpoint reads headers at once, and of the data just what is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptsurgery.errors import CheckpointError
from ckptsurgery.specs import TensorSpec
from ckptsurgery.storage import Checkpoint, LazyTensor, open_checkpoint
from ckptsurgery.storage.contents import Contents, Entry

X = torch.arange(60.0).reshape(5, 4, 3)
OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"x": X, "big": torch.arange(1 << 19, dtype=torch.float32)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.fixture
def strided(tmp_path: Path) -> Iterator[Checkpoint]:
    """Entries as a torch file has them: a view with an offset, a transposed one, an expanded one, a big-endian one."""
    raw = torch.arange(24, dtype=torch.int32)
    file = tmp_path / "raw"
    swapped = raw.view(torch.uint8).reshape(-1, 4).flip(1).contiguous()
    file.write_bytes(b"skip" + raw.numpy().tobytes() + swapped.numpy().tobytes())
    name, spec = str(file), TensorSpec((4, 6), "I32")
    entries = {
        "rows": Entry(TensorSpec((2, 6), "I32"), name, 4 + 6 * 4),
        "transposed": Entry(TensorSpec((6, 4), "I32"), name, 4, strides=(1, 6)),
        "columns": Entry(TensorSpec((4, 2), "I32"), name, 8, strides=(6, 3)),
        "expanded": Entry(TensorSpec((3, 6), "I32"), name, 4, strides=(0, 1)),
        "big": Entry(spec, name, 4 + 96, big_endian=True),
        "big_transposed": Entry(TensorSpec((6, 4), "I32"), name, 4 + 96, strides=(1, 6), big_endian=True),
    }
    with Checkpoint(Contents(entries), name) as ckpt:
        yield ckpt


WHOLE = torch.arange(24, dtype=torch.int32).reshape(4, 6)
VIEWS = {
    "rows": WHOLE[1:3],
    "transposed": WHOLE.T,
    "columns": WHOLE.flatten()[1:].as_strided((4, 2), (6, 3), 1),
    "expanded": WHOLE[:1].expand(3, 6),
    "big": WHOLE,
    "big_transposed": WHOLE.T,
}


def test_every_view_of_a_storage_is_gathered_right(strided: Checkpoint) -> None:
    for key, view in VIEWS.items():
        loaded = strided.load(key)
        assert torch.equal(loaded, view), key
        assert loaded.is_contiguous()
        assert bytes(strided.read(key, 4, 20)) == view.contiguous().numpy().tobytes()[4:20]
        assert torch.equal(strided[key][1:], view[1:])
        assert (strided.extent(key) is None) == (key != "rows")
    assert strided.ties == ()


INDICES: list[Any] = [
    0,
    -1,
    slice(None),
    slice(1, 3),
    slice(3, 1),
    slice(None, None, 2),
    slice(-2, None),
    ...,
    (1, 2),
    None,
]
INDICES += [(slice(1, 4), 2), (slice(None), slice(0, 2)), (-2, ..., 1), (slice(0, 5, 3), slice(1, 2), -1), [0, 2], ()]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_gives_what_it_gives_on_the_loaded_tensor(path: Path, index: Any) -> None:
    with open_checkpoint(path) as ckpt:
        assert torch.equal(ckpt["x"][index], X[index])


@given(st.data())
def test_any_slice_of_rows_is_the_slice_of_the_tensor(data: st.DataObject) -> None:
    path = Path(os.environ["HF_HOME"]) / "rows.safetensors"
    if not path.exists():
        save_file({"x": X}, path)
    with open_checkpoint(path) as ckpt:
        index = data.draw(st.slices(5).filter(lambda s: s.step is None or s.step > 0))
        assert torch.equal(ckpt["x"][index], X[index])


@pytest.mark.parametrize("index", [5, -6, (0, 9)])
def test_an_index_out_of_range_is_an_index_error(path: Path, index: Any) -> None:
    with open_checkpoint(path) as ckpt, pytest.raises(IndexError):
        ckpt["x"][index]


def test_rows_are_read_without_the_rest(path: Path) -> None:
    with open_checkpoint(path) as ckpt:
        extent = ckpt.extent("x")
        assert extent is not None
        read = ckpt._open_files.read
        ranges: list[tuple[int, int]] = []
        ckpt._open_files.read = lambda file, at, n: (ranges.append((at - extent.offset, n)), read(file, at, n))[1]  # type: ignore[method-assign]
        assert torch.equal(ckpt["x"][2:4], X[2:4])
        assert ranges == [(2 * 12 * 4, 2 * 12 * 4)]


def test_byte_ranges_come_alone(path: Path) -> None:
    with open_checkpoint(path) as ckpt:
        raw = X.numpy().tobytes()
        assert bytes(ckpt.read("x")) == raw
        assert bytes(ckpt.read("x", 5, 9)) == raw[5:9]
        buffer = bytearray(6)
        ckpt.read_into("x", 2, memoryview(buffer))
        assert bytes(buffer) == raw[2:8]
        with pytest.raises(CheckpointError, match="bad-range"):
            ckpt.read("x", 0, len(raw) + 1)


def test_writing_into_a_loaded_tensor_never_reaches_the_file(path: Path) -> None:
    before = path.read_bytes()
    with open_checkpoint(path) as ckpt:
        for key in ckpt:
            ckpt.load(key).fill_(-1.0)
        assert ckpt.load("big")[5] == 5.0
    assert path.read_bytes() == before


def test_loaded_tensors_outlive_their_checkpoint(path: Path) -> None:
    with open_checkpoint(path) as ckpt:
        big = ckpt.load("big")
    assert big[-1] == (1 << 19) - 1


def test_a_closed_checkpoint_says_so(path: Path) -> None:
    ckpt = open_checkpoint(path)
    ckpt.load("x")
    ckpt.close()
    ckpt.close()
    with pytest.raises(CheckpointError, match="closed-checkpoint"):
        ckpt.load("x")
    assert ckpt["x"].shape == (5, 4, 3)


def test_a_file_that_was_replaced_is_not_read_at_the_old_offsets(path: Path) -> None:
    ckpt = open_checkpoint(path)
    path.unlink()
    save_file({"other": torch.zeros(9)}, path)
    with pytest.raises(CheckpointError, match="file-changed"):
        ckpt.load("x")


def test_a_file_that_was_opened_before_it_was_replaced_is_still_read(path: Path, tmp_path: Path) -> None:
    ckpt = open_checkpoint(path)
    ckpt.load("x")
    save_file({"other": torch.zeros(9)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert torch.equal(ckpt.load("x"), X)


def test_a_missing_key_is_a_key_error_that_names_its_neighbours(path: Path) -> None:
    ckpt = open_checkpoint(path)
    with pytest.raises(KeyError, match="did you mean 'big'"):
        ckpt["bgi"]
    with pytest.raises(CheckpointError) as caught:
        ckpt["model.x"]
    assert caught.value.diagnostics[0].help == "did you mean 'x'?"
    assert ckpt.get("nothing") is None
    assert "nothing" not in ckpt
    assert isinstance(ckpt.get("x"), LazyTensor)


def test_a_checkpoint_is_a_mapping_that_describes_itself(path: Path) -> None:
    with open_checkpoint(path) as ckpt:
        assert dict(ckpt).keys() == {"x", "big"}
        assert "2 tensors, 2.1 MB" in repr(ckpt)
        assert repr(ckpt["x"]) == "LazyTensor('x', F32 [5, 4, 3])"
        assert len(ckpt["x"]) == 5
        assert ckpt.files == (str(path),)
        assert hash(ckpt) == hash(ckpt)
        assert ckpt != {}


def test_each_file_is_opened_once_for_its_header_and_once_for_its_data(tmp_path: Path) -> None:
    for number, part in enumerate("abc", 1):
        file = tmp_path / f"model-0000{number}-of-00003.safetensors"
        save_file({f"{part}.{i}": torch.ones(2) for i in range(10)}, file)
    OPENED.clear()
    with open_checkpoint(tmp_path) as ckpt:
        weights = [name for name in OPENED if name.endswith(".safetensors")]
        assert sorted(weights) == sorted(set(weights))
        ckpt.state_dict()
        ckpt.state_dict()
    assert len([name for name in OPENED if name.endswith(".safetensors")]) == 6


def test_opening_reading_bytes_and_writing_import_no_torch(path: Path) -> None:
    program = (
        "import sys, json\n"
        "from ckptsurgery.storage import open_checkpoint\n"
        "from ckptsurgery.storage.output.writing import WriterOptions, open_writer\n"
        "with open_checkpoint(sys.argv[1]) as ckpt:\n"
        "    with open_writer(sys.argv[2], ckpt.specs, WriterOptions(max_shard_size='1MB')) as writer:\n"
        "        for key, place in writer.places.items(): writer.write(place.file, place.offset, ckpt.read(key))\n"
        "    repr(ckpt), ckpt.ties, ckpt.nbytes\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'tqdm', 'huggingface_hub'}\n"
        "print(json.dumps([name for name in sys.modules if name.partition('.')[0] in heavy]))"
    )
    command = [sys.executable, "-c", program, str(path), str(path.parent / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    with open_checkpoint(path.parent / "out") as copy:
        assert torch.equal(copy.load("x"), X)


def test_a_tensor_that_is_built_when_asked_for_is_built_once_for_its_ranges() -> None:
    built: list[int] = []

    def build() -> torch.Tensor:
        built.append(1)
        return X.permute(2, 1, 0).contiguous().permute(2, 1, 0)

    entry = Entry(TensorSpec(X.shape, "F32"), tensor=build)
    ckpt = Checkpoint(Contents({"late": entry, "other": entry}), "built")
    assert [tie.names for tie in ckpt.ties] == [("late", "other")]
    assert built == []
    assert bytes(ckpt.read("late", 0, 8)) + bytes(ckpt.read("late", 8, 240)) == X.numpy().tobytes()
    assert built == [1]
    assert torch.equal(ckpt["late"][1:3], X[1:3])
    state = ckpt.state_dict()
    assert state["late"] is state["other"]
    assert state["late"].is_contiguous()
