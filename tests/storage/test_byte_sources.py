"""Bytes are read by ranges from whatever holds them, and all sources keep the same laws."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.running.executor import copying
from ckptsurgery.storage.output.staging import Writer
from ckptsurgery.storage.sources.byte_source import MEMORY, LocalFile, MemoryBuffer, ProcessMemory
from ckptsurgery.storage.sources.files import OpenFiles

DATA = bytes(random.Random(0).randbytes(10_000))


@pytest.fixture(params=["file", "buffer"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> LocalFile | MemoryBuffer:
    if request.param == "buffer":
        return MemoryBuffer("a buffer", DATA)
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    return LocalFile.of(str(path), path.stat())


def test_ranges_are_read_in_any_order(source: LocalFile | MemoryBuffer) -> None:
    rng = random.Random(1)
    starts = [rng.randrange(len(DATA)) for _ in range(50)]
    lengths = [rng.randint(0, len(DATA) - start) for start in starts]
    buffers = [bytearray(n) for n in lengths]
    source.read_into([(start, memoryview(buffer)) for start, buffer in zip(starts, buffers)])
    assert [bytes(b) for b in buffers] == [DATA[s : s + n] for s, n in zip(starts, lengths)]
    assert source.size == len(DATA)
    with source.open() as file:
        assert file.read() == DATA


def test_a_range_past_the_end_is_an_error(source: LocalFile | MemoryBuffer) -> None:
    with pytest.raises(cs.CheckpointError, match=r"truncated-file.*ends at byte 10000, 5 bytes early"):
        source.read_into([(9_000, memoryview(bytearray(1_005)))])


def test_a_checkpoint_reads_all_sources_alike(source: LocalFile | MemoryBuffer) -> None:
    files = OpenFiles([source.name], {source.name: source})
    assert files.read(source.name, 100, 50) == DATA[100:150]
    buffers = [bytearray(8), bytearray(9)]
    files.read_ranges(source.name, [(0, memoryview(buffers[0])), (500, memoryview(buffers[1]))])
    assert [bytes(b) for b in buffers] == [DATA[:8], DATA[500:509]]
    view = files.view(source.name, 3, 4)
    assert view is None if isinstance(source, LocalFile) else bytes(view or b"") == DATA[3:7]
    with files.using(source.name) as descriptor:
        assert (descriptor is None) == isinstance(source, MemoryBuffer)
    files.close()
    with pytest.raises(cs.CheckpointError, match="closed-checkpoint"):
        files.read(source.name, 0, 1)


def test_a_file_that_was_replaced_is_another_source(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(DATA)
    before = LocalFile.of(str(path), path.stat())
    path.rename(tmp_path / "old.bin")
    path.write_bytes(DATA)
    with pytest.raises(cs.CheckpointError, match="file-changed"):
        before.read_into([(0, memoryview(bytearray(1)))])


def test_the_memory_of_the_process_is_a_source() -> None:
    for count in (3, 70_000):
        tensor = torch.arange(count, dtype=torch.float32)
        buffer = bytearray(tensor.nbytes)
        ProcessMemory().read_into([(tensor.data_ptr(), memoryview(buffer))])
        assert torch.equal(torch.frombuffer(buffer, dtype=torch.float32), tensor)


def test_plain_tensors_in_memory_are_runs_of_bytes_and_others_are_not() -> None:
    state = {
        "plain": torch.arange(6.0).reshape(2, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
        "part": torch.arange(10)[4:],
        "empty": torch.empty(0, 3),
    }
    checkpoint = cs.open(state)
    placed = checkpoint.placed()
    assert {key: entry.file == MEMORY for key, entry in placed.entries.items()} == {
        "plain": True, "turned": False, "conjugate": False, "part": True, "empty": True,
    }  # fmt: skip
    assert {key for key, entry in checkpoint.entries.items() if entry.file is not None} == set()
    for key, tensor in state.items():
        assert torch.equal(placed.load(key), checkpoint.load(key)), key
        assert torch.equal(placed.load(key), tensor.resolve_conj()), key


def test_a_storage_that_was_freed_meanwhile_is_not_read(tmp_path: Path) -> None:
    tensor = torch.ones(1000)
    checkpoint = cs.open({"w": tensor})
    tensor.untyped_storage().resize_(0)
    with pytest.raises(cs.CheckpointError, match="whose storage was freed"):
        cs.save(checkpoint, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "folder/"])
def test_small_tensors_in_memory_are_written_many_at_a_time(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"w.{n}": torch.full((n % 5,), float(n)) for n in range(3000)}
    state["long"] = torch.arange(100_000.0)
    calls: list[int] = []
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda self, *args: (calls.append(1), write(self, *args))[1])
    put = Writer._put
    monkeypatch.setattr(Writer, "_put", lambda self, *args: (calls.append(1), put(self, *args))[1])
    cs.save(state, tmp_path / name)
    assert len(calls) < 100
    with cs.open(tmp_path / name) as written:
        assert list(written) == list(state) or name == "folder/"
        for key, tensor in state.items():
            assert torch.equal(written.load(key), tensor), key


def test_small_tensors_of_a_file_are_read_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"w.{n}": torch.full((n % 5,), float(n)) for n in range(3000)}
    cs.save(state, tmp_path / "in.safetensors")
    calls: list[int] = []
    read_into = OpenFiles.read_into
    monkeypatch.setattr(OpenFiles, "read_into", lambda self, *args: (calls.append(1), read_into(self, *args))[1])
    with cs.open(tmp_path / "in.safetensors") as checkpoint:
        made = cs.plan(checkpoint, cs.Recipe(rules=["{k...} -> m.{k...}"])).state_dict()
    assert len(calls) < 10
    assert list(made) == [f"m.{key}" for key in state]
    for key, tensor in state.items():
        assert torch.equal(made[f"m.{key}"], tensor)
        assert made[f"m.{key}"].untyped_storage().nbytes() == tensor.nbytes  # a storage of its own, and no larger


def test_groups_of_neighbours_hold_each_run_once() -> None:
    rng, runs, at = random.Random(2), list[copying.ByteRun](), 0
    for _ in range(500):
        at += rng.choice([0, 0, 1, 50])
        size = rng.randint(1, 30)
        runs.append(copying.ByteRun("t", 0, size, rng.choice(["a", "a", "b"]), at))
        at += size
    runs.sort(key=lambda run: (run.source_file, run.source_offset))
    groups = list(copying.neighbours(runs, short=20, most=100, gap=8))
    assert [run for group in groups for run in group] == runs
    for group in groups:
        first, last = group[0], group[-1]
        assert {run.source_file for run in group} == {first.source_file}
        assert len(group) == 1 or last.source_offset + last.nbytes - first.source_offset <= 100
        assert len(group) == 1 or all(run.nbytes < 20 for run in group)
