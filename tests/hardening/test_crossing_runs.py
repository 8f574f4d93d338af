"""Runs that cross each other, sources that change, and outputs that are something else under another name."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ckptsurgery as cs
from ckptsurgery.storage.output.transactions import MARK, locked
from ckptsurgery.storage.output.writing import WriterOptions, open_writer

ONE, OTHER = {"a": torch.arange(50.0), "b": torch.ones(9)}, {"a": torch.zeros(50), "c": torch.ones(3)}


def writing(path: Path, state: dict[str, torch.Tensor], **options: Any) -> Any:
    """A writer that has got all bytes and has not been committed."""
    specs = {key: cs.TensorSpec(value.shape, value.dtype) for key, value in state.items()}
    writer = open_writer(path, specs, WriterOptions(**options)).__enter__()
    for key, place in writer.places.items():
        writer.write(place.file, place.offset, state[key].numpy())
    return writer


def state_of(path: Path) -> dict[str, list[float]]:
    with cs.open(path) as checkpoint:
        return {key: tensor.load().tolist() for key, tensor in checkpoint.items()}


def listed(state: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {key: value.tolist() for key, value in state.items()}


@pytest.mark.parametrize("name", ["x.safetensors", "x", "x.pt"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 100}])
def test_of_two_runs_that_write_to_one_place_the_first_wins_and_the_other_says_so(
    name: str, before: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    if options and "." in name:
        return
    if before:
        cs.save({"old": torch.ones(1)}, tmp_path / name)
    first, second = (writing(tmp_path / name, s, overwrite=before, **options) for s in (ONE, OTHER))
    first.commit()
    with pytest.raises(cs.CheckpointError, match="output-changed"):
        second.commit()
    assert state_of(tmp_path / name) == listed(ONE)
    assert not [path for path in tmp_path.rglob("*") if MARK in path.name]


def test_runs_that_race_to_one_folder_leave_one_checkpoint_whole(tmp_path: Path) -> None:
    cs.save(OTHER, tmp_path / "out", max_shard_size=100)
    states = [{f"t{i}": torch.full((20,), float(n)) for i in range(6)} for n in range(8)]
    writers = [writing(tmp_path / "out", s, overwrite=True, max_shard_size=80 + 40 * n) for n, s in enumerate(states)]
    ends: list[str] = []

    def commit(writer: Any) -> None:
        try:
            writer.commit()
            ends.append("done")
        except cs.CheckpointError as error:
            ends.append(error.diagnostics[0].code)

    threads = [threading.Thread(target=commit, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["done", *["output-changed"] * 7]
    assert state_of(tmp_path / "out") in [listed(state) for state in states]
    assert not [path for path in (tmp_path / "out").iterdir() if MARK in path.name]


@pytest.mark.parametrize("name", ["x.safetensors", "x"])
def test_what_a_killed_run_left_is_cleared_away_by_the_next_and_a_living_one_is_left_alone(
    name: str, tmp_path: Path
) -> None:
    program = (
        "import sys, os, ckptsurgery as cs\nfrom ckptsurgery.storage.output.writing import WriterOptions, open_writer\n"
        "writer = open_writer(sys.argv[1], {'w': cs.TensorSpec([9], 'U8')}).__enter__()\n"
        "print('ready', flush=True)\nsys.stdin.read()\n"
    )
    for end, left in ((signal.SIGSTOP, 1), (signal.SIGKILL, 0)):
        folder = tmp_path / end.name
        folder.mkdir()
        command = [sys.executable, "-c", program, str(folder / name)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.send_signal(end)
            if end == signal.SIGKILL:
                child.wait()
            cs.save(ONE, folder / name)
            assert len([path for path in folder.iterdir() if MARK in path.name]) == left
            assert state_of(folder / name) == listed(ONE)
            child.kill()


@pytest.mark.parametrize("how", ["replaced before it is read", "changed before it is read", "changed while it is read"])
def test_a_source_that_changes_is_noticed_and_nothing_is_written(how: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(ONE, path)
    with cs.open(path) as checkpoint:
        plan = cs.plan(checkpoint, "{k...} -> m.{k...}")
        if how == "replaced before it is read":
            save_file(OTHER, path)
        else:
            if how == "changed while it is read":
                checkpoint.read("a")
            with path.open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\0\0\0\0")
            os.utime(path, ns=(1, 1))  # a clock may be too coarse to show a change within a millisecond
        with pytest.raises(cs.CheckpointError, match="file-changed"):
            plan.save(tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_that_is_replaced_between_header_and_data_is_noticed_at_the_first_read(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "x.safetensors")
    checkpoint = cs.open(tmp_path / "x.safetensors")
    save_file({key: value + 1 for key, value in ONE.items()}, tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").replace(tmp_path / "x.safetensors")
    with pytest.raises(cs.CheckpointError, match="file-changed"):
        checkpoint.load("a")


@pytest.mark.parametrize("name", ["x.safetensors", "x"])
def test_saving_over_what_a_living_model_is_mapped_from_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(700, 700)
    cs.save(model, tmp_path / name)
    source = cs.open(tmp_path / name)
    model.load_state_dict(source.state_dict(), assign=True)
    before = model.weight.detach().clone()
    cs.save({key: value * 0 for key, value in model.state_dict().items()}, tmp_path / name, overwrite=True)
    assert torch.equal(model.weight, before)
    cs.save(model, tmp_path / name, overwrite=True)
    assert torch.equal(cs.open(tmp_path / name).load("weight"), before)


def test_a_checkpoint_is_converted_over_itself(tmp_path: Path) -> None:
    cs.save(ONE, tmp_path / "x", max_shard_size=100)
    with cs.open(tmp_path / "x") as checkpoint:
        cs.plan(checkpoint, "{k...} -> m.{k...}").save(tmp_path / "x", overwrite=True, max_shard_size=60)
    assert state_of(tmp_path / "x") == {f"m.{key}": value for key, value in listed(ONE).items()}


def test_a_hub_cache_is_never_written_through(tmp_path: Path) -> None:
    """A snapshot is made of links to blobs that other snapshots share: the link is replaced, the blob stays."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    cs.save(ONE, blobs / "model.safetensors")
    (snapshot / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    (snapshot / "other.safetensors").hardlink_to(blobs / "model.safetensors")
    for name in ("model.safetensors", "other.safetensors"):
        cs.save(OTHER, snapshot / name, overwrite=True)
        assert state_of(snapshot / name) == listed(OTHER)
        assert state_of(blobs / "model.safetensors") == listed(ONE)
    (snapshot / "other.safetensors").unlink()
    cs.save(ONE, snapshot, overwrite=True)
    assert state_of(snapshot) == listed(ONE)


def test_a_link_to_nowhere_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "gone" / "y.safetensors")
    cs.save(ONE, tmp_path / "x.safetensors", overwrite=True)
    assert not (tmp_path / "gone").exists()
    assert state_of(tmp_path / "x.safetensors") == listed(ONE)
    (tmp_path / "folder").symlink_to(tmp_path / "gone")
    with pytest.raises(cs.CheckpointError):
        cs.save(ONE, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.safetensors"]


def test_the_modes_of_all_outputs_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        cs.save(ONE, tmp_path / "x", max_shard_size=100)
        cs.save(ONE, tmp_path / "x.pt")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in [*(tmp_path / "x").iterdir(), tmp_path / "x.pt"]} == {0o640}
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o750


def test_a_folder_that_is_being_replaced_is_old_or_new_to_whoever_opens_it_meanwhile(tmp_path: Path) -> None:
    states = [{f"t{i}": torch.full((64,), float(n)) for i in range(6)} for n in range(2)]
    cs.save(states[0], tmp_path / "x", max_shard_size=512)
    seen: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                seen.add(json.dumps(state_of(tmp_path / "x")))
            except cs.CheckpointError as error:
                seen.add(error.diagnostics[0].code)

    reader = threading.Thread(target=look)
    reader.start()
    for n in range(1, 30):
        cs.save(states[n % 2], tmp_path / "x", max_shard_size=512 - 256 * (n % 2), overwrite=True)
    done.set()
    reader.join()
    # A reader that is overtaken between names and data is told so, and opens again.
    assert seen <= {
        *(json.dumps(listed(s)) for s in states),
        "missing-file",
        "file-changed",
        "missing-shard",
        "nothing-to-read",
    }
    assert load_file(tmp_path / "x" / "model-00001-of-00006.safetensors")


def test_a_folder_takes_the_files_of_one_run_at_a_time(tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)  # locks are of the opened folder, hence this is as another process
    try:
        for _ in range(2):
            with locked(tmp_path), pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(other, fcntl.LOCK_UN)
    finally:
        os.close(other)
