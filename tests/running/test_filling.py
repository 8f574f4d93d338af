"""Copies go from the file into the model's own memory, once, and a load that breaks off says what it left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import ckptsurgery as cs
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.sources.files import OpenFiles

Reads = list[tuple[int, int]]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1000))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = model()
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.add_(1)
    cs.save(made.state_dict(), tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    """What is read of the files' data: (offset, bytes); a tensor that is loaded on its own is a failure."""
    seen: Reads = []
    read_into = OpenFiles.read_into

    def counted(self: OpenFiles, path: str, offset: int, buffer: memoryview) -> None:
        seen.append((offset, len(buffer)))
        read_into(self, path, offset, buffer)

    monkeypatch.setattr(OpenFiles, "read_into", counted)
    yield seen


def test_plain_copies_are_read_once_straight_into_the_model(
    source: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = model()
    addresses = {k: t.data_ptr() for k, t in target.state_dict().items()}
    monkeypatch.setattr(Checkpoint, "load", lambda self, key: pytest.fail(f"{key} became a tensor of its own"))
    cs.load_into(target, source)
    monkeypatch.undo()
    with cs.open(source) as checkpoint:
        assert sum(count for _, count in reads) == checkpoint.nbytes
        for key, tensor in target.state_dict().items():
            assert torch.equal(tensor, checkpoint[key].load())
            assert tensor.data_ptr() == addresses[key]


def test_autograd_sees_that_the_values_changed(source: Path) -> None:
    target = model()
    before = target[0].weight._version
    cs.load_into(target, source)
    assert target[0].weight._version > before


def test_a_transposed_parameter_and_a_cast_are_filled_by_tensors(source: Path) -> None:
    target = model()
    target[0].weight = nn.Parameter(torch.zeros(6, 5).t())
    target[2].double()
    cs.load_into(target, source)
    with cs.open(source) as checkpoint:
        assert torch.equal(target[0].weight, checkpoint["0.weight"].load())
        assert torch.equal(target[2].weight, checkpoint["2.weight"].load().double())
        assert target[0].weight.stride() == (1, 5)


class Watched(nn.Parameter):
    """A parameter that has a say in what is written into it."""

    written = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.copy_:
            cls.written += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_parameter_with_a_class_of_its_own_is_copied_into_by_torch(source: Path) -> None:
    target = model()
    target[0].weight = Watched(torch.zeros(5, 6))
    cs.load_into(target, source)
    assert Watched.written == 1
    with cs.open(source) as checkpoint:
        assert torch.equal(target[0].weight.as_subclass(torch.Tensor), checkpoint["0.weight"].load())


def test_a_read_that_fails_tells_new_old_and_mixed_tensors(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = model()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with cs.open(source) as checkpoint:
        broken = checkpoint.extent("2.weight")
    assert broken is not None
    read_into = OpenFiles.read_into

    def failing(self: OpenFiles, path: str, offset: int, buffer: memoryview) -> None:
        if offset == broken.offset:
            buffer[:4] = b"\1\1\1\1"
            raise cs.CheckpointError(cs.Diagnostic("read-failed", "the disk gave up"))
        read_into(self, path, offset, buffer)

    monkeypatch.setattr(OpenFiles, "read_into", failing)
    with pytest.raises(cs.LoadError, match="the disk gave up") as told:
        cs.load_into(target, source)
    error = told.value
    assert "2.weight" not in {*error.written, *error.untouched}
    assert "a mix of both (2.weight)" in str(error)
    assert {*error.written, *error.untouched, "2.weight"} == set(before)
    for key in error.untouched:
        assert torch.equal(before[key], target.state_dict()[key])
    monkeypatch.undo()
    with cs.open(source) as checkpoint:
        for key in error.written:
            assert torch.equal(checkpoint[key].load(), target.state_dict()[key])
