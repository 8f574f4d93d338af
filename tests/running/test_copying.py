"""Runs of bytes: few where tensors are neighbours, shared where blocks line up, and the same bytes either way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.planning.layout import Layout
from ckptsurgery.running import copying
from ckptsurgery.running.copying import ByteRun, merged, moves_of, runs_of
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.cloning import BLOCK
from ckptsurgery.storage.contents import Extent
from ckptsurgery.storage.files import OpenFiles
from ckptsurgery.storage.staging import Writer


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
    sizes: list[int] = []
    read_into = OpenFiles.read_into

    def counted(self: OpenFiles, path: str, offset: int, buffer: memoryview) -> None:
        sizes.append(len(buffer))
        read_into(self, path, offset, buffer)

    monkeypatch.setattr(OpenFiles, "read_into", counted)
    return sizes


def test_a_rename_reads_each_byte_once_in_large_blocks(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = reads_of(monkeypatch)
    with cs.open(source) as checkpoint:
        cs.plan(checkpoint, "h.{i}.w -> l.{i}.w").save(source.with_name("out"), "2GB")
        total = checkpoint.nbytes
    assert sum(sizes) == total
    assert len(sizes) == sum(-(-size // (1 << 20)) for size in (total // 2, total // 2))


def test_bytes_keep_their_place_within_a_block_where_that_is_worth_a_few_spaces(source: Path) -> None:
    with cs.open(source) as checkpoint:
        cs.plan(checkpoint, "h.{i}.w -> some.longer.name.{i}.w").save(source.with_name("out"), "3MB")
        with cs.open(source.with_name("out")) as made:
            for i in range(4):
                old, new = checkpoint.extent(f"h.{i}.w"), made.extent(f"some.longer.name.{i}.w")
                assert old is not None and new is not None
                assert (old.offset - new.offset) % BLOCK == 0


def shares_blocks(self: Writer, file: str, offset: int, source: int, source_offset: int, nbytes: int) -> bool:
    """What a file system that shares extents does, done by copying in the kernel."""
    assert offset % BLOCK == source_offset % BLOCK == nbytes % BLOCK == 0
    done = 0
    with self._descriptors.using(file) as target:
        while done < nbytes:
            done += os.copy_file_range(source, target, nbytes - done, source_offset + done, offset + done)
    self.skip(nbytes)
    self._note(file, offset, nbytes)
    return True


@pytest.mark.parametrize("resume", [False, True])
def test_shared_blocks_and_copied_ones_make_the_same_file(
    source: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cs.plan(source, "h.{i}.w -> l.{i}.w")
    plan.save(source.with_name("copied.safetensors"))
    monkeypatch.setattr(Writer, "clone", shares_blocks)
    sizes = reads_of(monkeypatch)
    plan.save(source.with_name("shared.safetensors"), resume=resume)
    assert sum(sizes) < plan.checkpoint.nbytes
    files = [source.with_name(f"{kind}.safetensors").read_bytes() for kind in ("copied", "shared")]
    assert files[0] == files[1]


def test_a_file_system_that_does_not_share_is_asked_once_a_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Writer, "clone", lambda self, file, *rest: asked.append(file) is not None)
    plan = cs.plan(source, cs.Recipe(["h.{i:0,2}.w -> l.{i}.w", "h.{i:1,3}.w -> k.{i}.w"]))
    plan.save(source.with_name("out.safetensors"))
    assert len(asked) <= 2
    assert cs.diff(source, source.with_name("out.safetensors"), plan.recipe).identical


def test_the_block_buffer_is_all_that_a_copy_holds(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "load", lambda self, key: pytest.fail(f"{key} became a tensor"))
    monkeypatch.setattr(copying, "CHUNK", 1000)
    sizes = reads_of(monkeypatch)
    cs.plan(source, cs.Recipe(rest="keep")).save(source.with_name("out.safetensors"))
    assert max(sizes) == 1000
