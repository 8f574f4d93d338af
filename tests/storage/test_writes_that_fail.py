"""A file system that fails in the middle of a save: the error names the file, and one whole checkpoint is there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.output.transactions import Replacement

OLD = {f"k{n}": torch.full((64,), float(n)) for n in range(4)}
NEW = {f"k{n}": torch.full((64,), -float(n)) for n in range(3)}


def assert_holds(path: Path, state: dict[str, torch.Tensor]) -> None:
    with cs.open(path) as checkpoint:
        assert checkpoint.keys() == state.keys()
        assert all(torch.equal(checkpoint.load(key), value) for key, value in state.items())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "shards"])
@pytest.mark.parametrize("how", ["takes nothing", "is full"])
def test_the_file_that_cannot_be_written_is_named(
    how: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_shard_size": 512} if name == "shards" else {}
    cs.save(OLD, tmp_path / name, **options)  # type: ignore[arg-type]
    before = sorted(tmp_path.rglob("*"))

    def full(descriptor: int, data: object, offset: int) -> int:
        if how == "takes nothing":
            return 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(cs.CheckpointError) as caught:
        cs.save(NEW, tmp_path / name, overwrite=True, **options)  # type: ignore[arg-type]
    monkeypatch.undo()
    (problem,) = caught.value.diagnostics
    assert str(problem.place).startswith(str(tmp_path))
    assert str(tmp_path) in problem.headline
    assert sorted(tmp_path.rglob("*")) == before
    assert_holds(tmp_path / name, OLD)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_what_was_decided_on_is_kept_when_it_cannot_be_carried_out(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    cs.save(OLD, folder, max_shard_size=512)
    rename, done = os.replace, []

    def failing(source: str, target: str) -> None:
        if len(done) == steps:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(cs.CheckpointError):
        cs.save(NEW, folder, max_shard_size=512, overwrite=True)
    monkeypatch.undo()
    decided = Replacement.read(folder) is not None
    assert decided is (steps > 0)  # the record itself is renamed first
    assert_holds(folder, NEW if decided else OLD)
    cs.save(NEW, folder, max_shard_size=512, overwrite=True)
    assert_holds(folder, NEW)
