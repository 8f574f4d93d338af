"""Space is there before the first tensor is written, where the file system can say so; else everything is as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.output import reserving
from ckptsurgery.storage.output.reserving import reserve

TENSORS = {f"w.{i}": torch.arange(300_000.0) + i for i in range(2)}


def answering(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system that has this to say."""

    def ioctl(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(reserving.fcntl, "ioctl", ioctl)


def test_a_file_has_all_of_its_space_or_none_and_no_other_size(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w+b") as file:
        reserve(file.fileno(), 1000)
        assert os.fstat(file.fileno()).st_blocks == 0
        file.truncate(2_000_000)
        reserve(file.fileno(), 2_000_000)
        status = os.fstat(file.fileno())
        assert status.st_size == 2_000_000
        assert status.st_blocks == 0 or status.st_blocks * 512 >= 2_000_000
        assert file.read() == bytes(2_000_000)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EINTR])
def test_who_cannot_reserve_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    cs.save(TENSORS, tmp_path / "x.safetensors")
    answering(monkeypatch, number)
    cs.save(TENSORS, tmp_path / "y.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_cannot_hold_it_says_so_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    answering(monkeypatch, number)
    with pytest.raises(cs.CheckpointError, match="disk-full"):
        cs.save(TENSORS, tmp_path / name, progress=False)
    assert list(tmp_path.iterdir()) == []
