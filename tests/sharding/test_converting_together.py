"""One conversion on several ranks: the bytes, the report and the errors of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import Group, RankError
from safetensors.torch import save_file

import ckptsurgery as cs
from ckptsurgery.storage.output.staging import Writer

RULES = [
    "layers.{i}.{p:q,k,v} [(g r) d] -> blocks.{i}.qkv [(g p r) d]",
    "layers.{i}.out [a b] -> blocks.{i}.out [b a] | cast(f32)",
    "{k...} -> {k...}",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = torch.Generator().manual_seed(0)
    state = {"embed": torch.randn(30, 8, generator=generator).half(), "none": torch.empty(0, 3)}
    for i in range(3):
        state |= {f"layers.{i}.{p}": torch.randn(6, 8, generator=generator) for p in "qkv"}
        state[f"layers.{i}.out"] = torch.randn(8, 6, generator=generator).half()
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_file(state, path)
    return str(path)


def recipe() -> cs.Recipe:
    return cs.Recipe(rules=RULES[:-1], rest=RULES[-1], dims={"g": 2})


def convert(source: str, path: str, arguments: dict[str, Any]) -> tuple[str, int, int]:
    report = cs.plan(source, recipe()).save(path, together=True, **arguments)
    return str(report), report.bytes_written, len(report.proofs)


@pytest.mark.parametrize("arguments", [{}, {"max_shard_size": 400}, {"check": True}], ids=str)
def test_ranks_write_what_one_process_writes(
    arguments: dict[str, Any], two: Group, four: Group, source: str, tmp_path: Path
) -> None:
    cs.plan(source, recipe()).save(tmp_path / "one/", **arguments)
    wanted = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    for group in (two, four):
        out = tmp_path / f"by{group.ranks}"
        reports = group(convert, source, f"{out}/", arguments)
        assert len(set(reports)) == 1
        assert {file.name: file.read_bytes() for file in out.iterdir()} == wanted
    assert sorted(file.name for file in tmp_path.iterdir()) == ["by2", "by4", "one"]


def failing(source: str, path: str, how: str) -> str:
    """The code of the error that each rank raises when one of them fails."""
    kept = Writer.write

    def broken(self: Writer, *args: Any) -> None:
        raise cs.CheckpointError(cs.errors.Diagnostic("disk-full", "no space left"))

    try:
        if how == "write" and dist.get_rank() == 1:
            Writer.write = broken  # type: ignore[method-assign]
        rules = recipe() if how != "plan" or dist.get_rank() else cs.Recipe(rest="keep")
        cs.plan(source, rules).save(path, together=True)
    except cs.CkptSurgeryError as error:
        return error.diagnostics[0].code
    finally:
        Writer.write = kept  # type: ignore[method-assign]
    return ""


def test_a_rank_that_fails_leaves_nothing(two: Group, source: str, tmp_path: Path) -> None:
    assert two(failing, source, str(tmp_path / "x.safetensors"), "write") == ["disk-full"] * 2
    assert two(failing, source, str(tmp_path / "x.pt"), "") == ["not-by-ranks"] * 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "y.safetensors").write_bytes(b"there")
    assert two(failing, source, str(tmp_path / "y.safetensors"), "") == ["output-exists"] * 2


def killed(source: str, path: str, rank: int, after: int) -> str:
    """The code of the error of a rank that is left when another is killed after some writes."""
    kept, count = Writer.write, [0]

    def counting(self: Writer, *args: Any) -> None:
        count[0] += 1
        if count[0] > after:
            os.kill(os.getpid(), signal.SIGKILL)
        kept(self, *args)

    if dist.get_rank() == rank:
        Writer.write = counting  # type: ignore[method-assign]
    try:
        cs.plan(source, recipe()).save(path, together=True)
    except cs.CheckpointError as error:
        return error.diagnostics[0].code
    return ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_leaves_no_checkpoint(rank: int, source: str, tmp_path: Path) -> None:
    group = Group(2)
    try:
        with pytest.raises(RankError, match="gone"):
            group(killed, source, str(tmp_path / "x.safetensors"), rank, 0)
    finally:
        group.close()
    visible = [file for file in tmp_path.iterdir() if not file.name.startswith(".")]
    assert not visible and (rank == 0 or not list(tmp_path.iterdir()))
    cs.plan(source, recipe()).save(tmp_path / "x.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def torchrun(ranks: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*command, "-m", "ckptsurgery", *arguments], capture_output=True, text=True, env=environ, timeout=120
    )


def test_the_command_line_shares_the_work_under_torchrun(source: str, tmp_path: Path) -> None:
    rules = [word for rule in RULES for word in ("--rule", rule)] + ["--dim", "g=2"]
    cs.plan(source, recipe()).save(tmp_path / "one.safetensors")
    done = torchrun(
        2, "convert", source, str(tmp_path / "two.safetensors"), *rules[:4], "--rest", RULES[-1], *rules[-2:]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written by 2 ranks") == 1
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
