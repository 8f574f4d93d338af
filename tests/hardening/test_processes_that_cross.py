"""Processes that write to one place, or change what another reads: one wins, the other says so, no model suffers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.output.header_swap import restore_header
from ckptsurgery.storage.output.staging import MARK

# Each step that a process takes is asked for by a line, and answered by one. No process imports torch.
PROGRAM = """
import os, sys
import ckptsurgery as cs
from ckptsurgery.storage.output.writing import WriterOptions, open_writer

def told(step):
    try:
        return step() or "done"
    except cs.CkptSurgeryError as error:
        return error.diagnostics[0].code

def fill(writer, data, count=None):
    for place in list(writer.places.values())[:count]:
        writer.write(place.file, place.offset, data * place.nbytes)

what, path, letter, *rest = sys.argv[1:]
specs = {f"t{i}": cs.TensorSpec([400], "U8") for i in range(6)}
if what == "write":
    shards = int(rest[0]) or None
    writer = open_writer(path, specs, WriterOptions(max_shard_size=shards, overwrite=True))
    steps = [lambda: (writer.__enter__(), fill(writer, letter.encode()))[1], writer.commit]
elif what == "resume":
    writer = open_writer(path, specs, WriterOptions(overwrite=True, resume="0123456789abcdef"))
    def begin():
        writer.__enter__()
        fill(writer, letter.encode(), 3)
        writer._record()
    def go_on():
        writer.__enter__()
        there = writer.resumed
        fill(writer, letter.encode())
        writer.commit()
        return str(there)
    steps = [go_on if rest else begin]
else:
    checkpoint = cs.open(path)
    plan = cs.plan(checkpoint, "{k...} -> m.{k...}")
    steps = [lambda: None, lambda: (plan.save(letter, check=True), None)[1]]
for step in steps:
    sys.stdin.readline()
    print(told(step), flush=True)
"""


class Process:
    """A process that does the next step when it is told to."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, "-c", PROGRAM, *words]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    def end(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def step(self) -> str:
        self.start()
        return self.end()


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:

        def begin(*words: object) -> Process:
            made = Process(*map(str, words))
            stack.enter_context(made.popen)
            stack.callback(made.popen.kill)
            return made

        yield begin


def letters(path: Path) -> set[str]:
    with cs.open(path) as checkpoint:
        return {chr(byte) for key in checkpoint for byte in set(bytes(checkpoint.read(key)))}


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if MARK in path.name]


@pytest.mark.parametrize(("name", "shards"), [("x.safetensors", 0), ("x", 0), ("x", 800)])
@pytest.mark.parametrize("before", [False, True])
def test_of_processes_that_race_to_one_place_one_wins_and_the_others_say_so(
    name: str, shards: int, before: bool, process: Callable[..., Process], tmp_path: Path
) -> None:
    if before:
        cs.save({"old": torch.ones(3)}, tmp_path / name)
    runs = [process("write", tmp_path / name, letter, shards) for letter in "abc"]
    assert [run.step() for run in runs] == ["done"] * 3
    for run in runs:
        run.start()
    ends = [run.end() for run in runs]
    assert sorted(ends) == ["done", "output-changed", "output-changed"]
    assert letters(tmp_path / name) == {"abc"[ends.index("done")]}
    assert not left(tmp_path)


@pytest.mark.parametrize("name", ["x.safetensors", "x"])
def test_a_process_that_was_killed_hinders_nobody_and_a_living_one_is_respected(
    name: str, process: Callable[..., Process], tmp_path: Path
) -> None:
    killed, living = (process("write", tmp_path / name, letter, 0) for letter in "ab")
    assert [killed.step(), living.step()] == ["done", "done"]
    killed.popen.kill()
    killed.popen.wait()
    assert len(left(tmp_path)) >= 2
    cs.save({"new": torch.ones(3)}, tmp_path / name)
    assert living.step() == "output-changed"
    assert not left(tmp_path)
    assert set(cs.open(tmp_path / name)) == {"new"}


def test_two_runs_that_resume_one_output_do_not_mix_and_the_second_goes_on_when_the_first_is_dead(
    process: Callable[..., Process], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    first = process("resume", path, "a")
    assert first.step() == "done"
    first.popen.send_signal(signal.SIGSTOP)
    assert process("resume", path, "a", "on").step() == "output-busy"
    first.popen.kill()
    first.popen.wait()
    assert process("resume", path, "a", "on").step() == "1200"  # bytes that were there
    assert letters(path) == {"a"}
    assert not left(tmp_path)


def rewrite(path: Path) -> None:
    """Change a file in place, until the clock of its file system shows it."""
    before = path.stat()
    data = path.read_bytes()
    while path.stat().st_mtime_ns == before.st_mtime_ns:
        with path.open("r+b") as file:
            file.write(data[:-8] + bytes(8))
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def replace(path: Path) -> None:
    cs.save({"t": torch.zeros(50)}, path, overwrite=True)


@pytest.mark.parametrize("change", [rewrite, truncate, replace])
def test_a_source_that_another_process_changes_is_noticed_and_nothing_is_written(
    change: Callable[[Path], None], process: Callable[..., Process], tmp_path: Path
) -> None:
    source = tmp_path / "s.safetensors"
    cs.save({"t": torch.ones(50)}, source)
    reader = process("convert", source, tmp_path / "x.safetensors")
    assert reader.step() == "done"
    change(source)
    assert reader.step() == "file-changed"
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, torch.nn.Module, torch.Tensor]:
    """A file, a model whose weights are that file, and what they are."""
    path = tmp_path / "m.safetensors"
    model = torch.nn.Linear(700, 700)
    before = model.weight.detach().clone()
    cs.save(model, path)
    with torch.no_grad():
        model.weight.zero_()
    cs.load_into(model, path, assign=True)
    assert str(path.resolve()) in Path("/proc/self/maps").read_text()
    return path, model, before


def changed(before: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": before * 0, "bias": torch.zeros(700)}


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_saving_over_what_a_living_model_is_mapped_from_leaves_it_as_it_was(
    link: Callable[..., None] | None, mapped: tuple[Path, torch.nn.Module, torch.Tensor]
) -> None:
    path, model, before = mapped
    over = path
    if link is not None:
        over = path.with_name("link.safetensors")
        link(path, over)
    cs.save(changed(before), over, overwrite=True)
    assert torch.equal(model.weight, before)
    assert torch.equal(cs.open(over).load("weight"), before * 0)
    # What else has the file under another name keeps it.
    assert link is None or torch.equal(cs.open(path).load("weight"), before)
    cs.save(model, over, overwrite=True, check=True)
    assert torch.equal(cs.open(over).load("weight"), before)


def test_changing_the_header_of_what_a_model_is_mapped_from_leaves_its_weights(
    mapped: tuple[Path, torch.nn.Module, torch.Tensor],
) -> None:
    path, model, before = mapped
    cs.plan(path, ["weight -> w", "bias -> b"]).save(path, in_place=True)
    assert torch.equal(model.weight, before)
    restore_header(path)
    assert torch.equal(model.weight, before)


def test_training_a_model_that_is_mapped_never_reaches_the_file(
    mapped: tuple[Path, torch.nn.Module, torch.Tensor],
) -> None:
    path, model, before = mapped
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(cs.open(path).load("weight"), before)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_whatever_is_written_has_the_mode_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    state = {f"layer.{i}.weight": torch.randn(9) for i in range(4)}
    before = os.umask(umask)
    try:
        cs.save(state, tmp_path / "s", max_shard_size=80)
        (tmp_path / "s" / "config.json").write_text("{}")
        with cs.open(tmp_path / "s") as source:
            plan = cs.plan(source, "layer.{i}.weight -> l.{i}")
            plan.save(tmp_path / "x.safetensors", check=True)
            plan.save(tmp_path / "x.safetensors", overwrite=True)
            plan.save(tmp_path / "x.pt")
            plan.save(tmp_path / "made" / "on the way" / "x.bin")
            plan.save(tmp_path / "y", max_shard_size=80, companions=True)
            plan.save(tmp_path / "y", overwrite=True, provenance=True)
            plan.save(tmp_path / "z", max_shard_size=80, resume=True, companions=True)
            plan.save(tmp_path / "r.safetensors", resume=True)
        cs.plan(tmp_path / "r.safetensors", "l.{i} -> {i}").save(tmp_path / "r.safetensors", in_place=True)
    finally:
        os.umask(before)
    paths = list(tmp_path.rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o777 & ~umask}
    kinds = {path.suffix for path in paths if path.is_file()}
    assert kinds == {".safetensors", ".pt", ".bin", ".json", ".header-backup"}
