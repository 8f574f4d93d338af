"""A process has few descriptors, and a checkpoint may have many files, tensors and readers."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hostile import safetensors_file

import ckptsurgery as cs
from ckptsurgery.storage.output.transactions import MARK, remove_abandoned
from ckptsurgery.storage.sources.files import Descriptor


def opened() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counts, and names no path


@pytest.fixture
def few() -> Iterator[int]:
    """Some hundred descriptors, of which the process has used a part."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = max(int(name) for name in os.listdir("/proc/self/fd")) + 90  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    yield allowed
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_checkpoint_may_have_more_files_than_a_process_may_open(few: int, tmp_path: Path) -> None:
    state = {f"l.{i}.w": torch.full((4,), float(i)) for i in range(300)}
    cs.save(state, tmp_path / "many", max_shard_size=16)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 300
    with cs.open(tmp_path / "many") as checkpoint:
        assert all(checkpoint.load(key)[0] == value[0] for key, value in state.items())
        cs.plan(checkpoint, "l.{i}.w -> m.{i}.w").save(tmp_path / "one.safetensors", check=True)
        cs.plan(checkpoint, "l.{i}.w -> all [i ...]").save(tmp_path / "all.safetensors", check=True)
        assert opened() < few
    again = cs.plan(tmp_path / "one.safetensors", "m.{i}.w -> l.{i}.w | cast(f64)")
    again.save(tmp_path / "many", max_shard_size=32, overwrite=True)  # over files that are there
    again.save(tmp_path / "new", max_shard_size=32, check=True, resume=True)
    for path in (tmp_path / "many", tmp_path / "new"):
        assert all(torch.equal(tensor, state[key].double()) for key, tensor in cs.open(path).state_dict().items())
        assert len(list(path.iterdir())) == 301


def test_tensors_that_are_mapped_leave_descriptors_to_others(few: int, tmp_path: Path) -> None:
    size, count = 1 << 20, 200
    rows = {f"t{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i in range(count)}
    safetensors_file(tmp_path / "x.safetensors", rows)
    start = (tmp_path / "x.safetensors").stat().st_size
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(start + count * size)
        for i in range(count):
            os.pwrite(file.fileno(), bytes([i]), start + i * size)
    before = opened()
    with cs.open(tmp_path / "x.safetensors") as checkpoint:
        state = checkpoint.state_dict()
        assert [int(tensor[0]) for tensor in state.values()] == list(range(count))
        assert opened() < before + 90
        state["t150"].fill_(7)
        assert (int(state["t151"][0]), int(checkpoint.load("t150")[1])) in {(151, 0), (151, 7)}
    assert cs.open(tmp_path / "x.safetensors").read("t150", 0, 2) == b"\x96\0"  # the file is as it was
    del state
    assert opened() <= before


def test_closing_while_others_read_gives_right_bytes_or_a_clean_error(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((1000,), float(i)) for i in range(20)}
    cs.save(state, tmp_path / "x", max_shard_size=4000)
    (tmp_path / "other").write_bytes(b"\xff" * 5000)
    wrong: list[object] = []
    ended: list[str] = []
    for _ in range(20):
        checkpoint = cs.open(tmp_path / "x")
        started = threading.Barrier(9)

        def read(checkpoint: cs.Checkpoint = checkpoint, started: threading.Barrier = started) -> None:
            started.wait()
            try:
                while True:
                    for key, tensor in state.items():
                        if bytes(checkpoint.read(key)) != tensor.numpy().tobytes():
                            wrong.append(key)
            except cs.CheckpointError as error:
                ended.append(error.diagnostics[0].code)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        started.wait()
        checkpoint.close()
        taken = [(tmp_path / "other").open("rb") for _ in range(30)]  # the numbers that were given back
        for thread in threads:
            thread.join()
        for file in taken:
            file.close()
    assert not wrong
    assert ended == ["closed-checkpoint"] * 160


def test_a_descriptor_in_use_is_closed_by_its_last_user() -> None:
    descriptor = Descriptor(os.open("/dev/null", os.O_RDONLY))
    assert descriptor.take() and descriptor.take()
    descriptor.retire()
    assert not descriptor.take()
    descriptor.give()
    os.fstat(descriptor.number)
    descriptor.give()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor.number)
    descriptor.retire()


def test_one_lock_guards_all_files_of_a_run(tmp_path: Path) -> None:
    import fcntl

    names = [tmp_path / f".{stem}{MARK}1-0123abcd" for stem in ("a", "b")]
    for name in names:
        name.touch()
    with names[0].open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_abandoned([tmp_path / "b"])
        assert all(name.exists() for name in names)
    remove_abandoned([tmp_path / "b"])
    assert [name.exists() for name in names] == [True, False]
    remove_abandoned([tmp_path / "a"])
    assert not any(name.exists() for name in names)


def test_threads_plan_and_save_different_outputs_of_one_checkpoint(tmp_path: Path) -> None:
    state = {f"l.{i}.w": torch.full((8, 4), float(i)) for i in range(6)}
    cs.save(state, tmp_path / "x", max_shard_size=128)
    with cs.open(tmp_path / "x") as checkpoint:

        def convert(number: int) -> None:
            source = checkpoint if number % 2 else tmp_path / "x"
            rule = ["l.{i}.w [a b] -> m.{i}.w [b a]", "l.{i}.w -> all [i ...]"][number // 2 % 2]
            cs.plan(source, rule).save(tmp_path / f"{number}.safetensors", check=number % 5 == 0)

        threads = [threading.Thread(target=convert, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(40):
        made = cs.open(tmp_path / f"{number}.safetensors").state_dict()
        whole = torch.stack(list(state.values()))
        assert torch.equal(made["all"] if number // 2 % 2 else torch.stack(list(made.values())).mT, whole)


@pytest.mark.parametrize("count", [2000])
def test_numbered_files_without_an_index_are_asked_once_each(count: int, tmp_path: Path) -> None:
    """Not once for each other: the paths that are looked at are as many as the files."""
    from ckptsurgery.storage.formats.numbering import series_of, shard_names

    names = [f"m-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert len({series_of(name) for name in names}) == 1
    assert all(shard_names(name) == names for name in names[:3])
    assert f"m-{count + 1:05d}-of-{count:05d}.safetensors" not in shard_names(names[0])
