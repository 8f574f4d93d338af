"""Runs of bytes: few where tensors are neighbours, shared where blocks line up, and the same bytes either way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.planning.layout import Layout
from ckptsurgery.running.executor import copying
from ckptsurgery.running.executor.copying import ByteRun, merged, moves_of, runs_of
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.contents import Extent
from ckptsurgery.storage.sources.files import OpenFiles
from ckptsurgery.storage.sources.kernel_copies import BLOCK, copy_range


def test_neighbours_become_one_run_whatever_their_order() -> None:
    runs = [ByteRun("t", 10 * n, 10, "s", 100 + 10 * n) for n in (3, 0, 2, 1)]
    assert merged(runs) == [ByteRun("t", 0, 40, "s", 100)]
    apart = [ByteRun("t", 0, 4, "s", 0), ByteRun("t", 4, 4, "s", 8), ByteRun("u", 8, 4, "s", 12)]
    assert merged(reversed(apart)) == apart


def test_a_target_that_is_not_written_has_no_runs() -> None:
    layout = Layout.identity([(2,), (3,)])
    moves = moves_of(layout, [cs.TensorSpec([2], "F32"), cs.TensorSpec([3], "F32")])
    assert list(runs_of(moves, [("s", 0), ("s", 8)], [None, Extent("t", 0, 12)])) == [ByteRun("t", 0, 12, "s", 8)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    cs.save({f"h.{i}.w": torch.randn(300, 1024) for i in range(4)}, tmp_path / "source", "3MB")
    return tmp_path / "source"


def reads_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads into memory from here on."""
    sizes: list[int] = []
    read_into = OpenFiles.read_into

    def counted(self: OpenFiles, path: str, offset: int, buffer: memoryview) -> None:
        sizes.append(len(buffer))
        read_into(self, path, offset, buffer)

    monkeypatch.setattr(OpenFiles, "read_into", counted)
    return sizes


def kernel_copies_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each call of `copy_file_range` copies from here on."""
    sizes: list[int] = []
    copy = os.copy_file_range

    def counted(*args: int) -> int:
        sizes.append(copy(*args))
        return sizes[-1]

    monkeypatch.setattr(os, "copy_file_range", counted)
    return sizes


def refusing(code: int) -> Callable[..., int]:
    def call(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


def test_a_rename_reads_nothing_into_memory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, copied = reads_of(monkeypatch), kernel_copies_of(monkeypatch)
    with cs.open(source) as checkpoint:
        cs.plan(checkpoint, "h.{i}.w -> l.{i}.w").save(source.with_name("out"), "2GB")
        total = checkpoint.nbytes
    assert sum(copied) + sum(read) == total
    assert sum(read) < 2 * 4 * BLOCK  # the rest of a block at either end of the runs
    assert len(copied) <= 2 * 2


def test_bytes_keep_their_place_within_a_block_where_that_is_worth_a_few_spaces(source: Path) -> None:
    with cs.open(source) as checkpoint:
        cs.plan(checkpoint, "h.{i}.w -> some.longer.name.{i}.w").save(source.with_name("out"), "3MB")
        with cs.open(source.with_name("out")) as made:
            for i in range(4):
                old, new = checkpoint.extent(f"h.{i}.w"), made.extent(f"some.longer.name.{i}.w")
                assert old is not None and new is not None
                assert (old.offset - new.offset) % BLOCK == 0


def short(call: Callable[..., int]) -> Callable[..., int]:
    """A system call that does a part of what it is asked for."""
    return lambda a, b, third, fourth, *rest: call(a, b, *_less(call, third, fourth), *rest)


def _less(call: Callable[..., int], third: int, fourth: int) -> tuple[int, int]:
    # copy_file_range takes the count before the offsets, sendfile after its one
    return (max(1, third // 3), fourth) if call is COPY else (third, max(1, fourth // 3))


COPY, SEND = os.copy_file_range, os.sendfile
CALLS = {
    "works": lambda call: call,
    "takes less": short,
    "copies nothing": lambda call: lambda *args: 0,
    **{f"fails with {errno.errorcode[code]}": lambda call, code=code: refusing(code)
       for code in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EIO, errno.ENOSPC)},
}  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("second", ["works", "takes less", "fails with EINVAL"])
@pytest.mark.parametrize("first", CALLS)
def test_what_the_kernel_does_not_copy_goes_through_memory(
    source: Path, first: str, second: str, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cs.plan(source, "h.{i}.w -> l.{i}.w")
    plan.save(source.with_name("plain.safetensors"))
    monkeypatch.setattr(os, "copy_file_range", CALLS[first](COPY))
    monkeypatch.setattr(os, "sendfile", CALLS[second](SEND))
    plan.save(source.with_name("other.safetensors"), resume=resume)
    files = [source.with_name(f"{kind}.safetensors").read_bytes() for kind in ("plain", "other")]
    assert files[0] == files[1]


def test_a_system_without_the_calls_copies_through_memory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(os, "sendfile", refusing(errno.ENOSYS))
    sizes = reads_of(monkeypatch)
    report = cs.plan(source, "h.{i}.w -> l.{i}.w").save(source.with_name("out.safetensors"))
    assert sum(sizes) == report.bytes_written
    assert cs.diff(source, report.files[0], "h.{i}.w -> l.{i}.w").identical


def test_a_signal_interrupts_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def interrupted(*args: int) -> int:
        calls.append(1)
        return COPY(*args) if len(calls) % 3 == 0 else refusing(errno.EINTR)()

    monkeypatch.setattr(os, "copy_file_range", interrupted)
    monkeypatch.setattr(os, "sendfile", refusing(errno.EINVAL))
    (tmp_path / "a").write_bytes(bytes(range(256)) * 400)
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("wb") as b:
        assert copy_range(a.fileno(), 56, b.fileno(), 7, 100_000) == 100_000
    assert (tmp_path / "b").read_bytes() == bytes(7) + (tmp_path / "a").read_bytes()[56:100_056]
    assert len(calls) == 3


def test_the_end_of_the_source_ends_the_copy(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with (tmp_path / "a").open("rb") as a, (tmp_path / "b").open("wb") as b:
        assert copy_range(a.fileno(), 1, b.fileno(), 0, 100) == 2
        assert copy_range(a.fileno(), 50, b.fileno(), 0, 100) == 0
    assert (tmp_path / "b").read_bytes() == b"bc"


def test_a_source_that_ends_meanwhile_is_named_and_leaves_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_first(*args: int) -> int:
        for file in source.glob("*.safetensors"):
            os.truncate(file, 1_500_000)
        return COPY(*args)

    plan = cs.plan(source, "h.{i}.w -> l.{i}.w")
    monkeypatch.setattr(os, "copy_file_range", cut_first)
    with pytest.raises(cs.CheckpointError, match="truncated-file") as caught:
        plan.save(source.with_name("out.safetensors"))
    assert caught.value.diagnostics[0].place in plan.checkpoint.files
    assert not source.with_name("out.safetensors").exists()


def test_a_pair_of_files_that_is_refused_is_asked_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(os, "copy_file_range", lambda *args: asked.append(args[:2]) or refusing(errno.EXDEV)())
    monkeypatch.setattr(os, "sendfile", refusing(errno.EINVAL))
    plan = cs.plan(source, cs.Recipe(["h.{i:0,2}.w -> l.{i}.w", "h.{i:1,3}.w -> k.{i}.w"]))
    plan.save(source.with_name("out.safetensors"))
    assert len(asked) == len(set(asked)) == 2
    assert cs.diff(source, source.with_name("out.safetensors"), plan.recipe).identical


def test_the_block_buffer_is_all_that_a_copy_holds(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "load", lambda self, key: pytest.fail(f"{key} became a tensor"))
    monkeypatch.setattr(copying, "CHUNK", 1000)
    monkeypatch.setattr(os, "copy_file_range", refusing(errno.EXDEV))
    monkeypatch.setattr(os, "sendfile", refusing(errno.EINVAL))
    sizes = reads_of(monkeypatch)
    cs.plan(source, cs.Recipe(rest="keep")).save(source.with_name("out.safetensors"))
    assert max(sizes) == 1000
