"""A system that refuses, or a file that another process changed: the error names the file, and nothing is half done."""

from __future__ import annotations

import contextlib
import errno
import gzip
import mmap
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.specs import TensorSpec
from ckptsurgery.storage.contents import Extent
from ckptsurgery.storage.output import header_swap
from ckptsurgery.storage.output.dcp_writer import DcpWriter
from ckptsurgery.storage.output.durability import Durability
from ckptsurgery.storage.output.following import Follower, Outline
from ckptsurgery.storage.output.staging import Output, Writer
from ckptsurgery.storage.output.transactions import MARK, RECORD, Replacement, _in_use
from ckptsurgery.storage.places.folders import read_folder
from ckptsurgery.storage.sources import unpacked
from ckptsurgery.storage.sources.byte_source import LocalFile, MemoryBuffer, read_fully
from ckptsurgery.storage.sources.files import Descriptors, OpenFiles

UNSYNCED = Durability(False)


def refused(call: Callable[[], object]) -> tuple[str, str, str]:
    with pytest.raises(cs.CheckpointError) as caught:
        call()
    (problem,) = caught.value.diagnostics
    return problem.code, problem.headline, str(problem.place)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may be longer than 4 KiB."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """The process has no descriptor left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))  # noqa: PTH208
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    try:
        yield
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# A distributed checkpoint


@pytest.mark.parametrize("count", [3000, 3])
def test_a_distributed_checkpoint_that_does_not_fit_leaves_nothing(
    tmp_path: Path, count: int, small_files: None
) -> None:
    """A long tensor fails when it is written, short ones when what is buffered is."""

    def write() -> None:
        with DcpWriter(tmp_path / "out", 1, UNSYNCED) as writer:
            for n in range(1 if count == 3000 else 5):
                writer.add(f"w{n}", torch.ones(count))

    code, headline, place = refused(write)
    assert code == "file-too-large"
    assert headline.startswith(f"cannot write {str(tmp_path / 'out')!r}") and place == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_distributed_checkpoint_whose_folder_is_taken_away_is_refused(tmp_path: Path) -> None:
    def write() -> None:
        with DcpWriter(tmp_path / "out", 1, UNSYNCED) as writer:
            writer.add("w", torch.ones(3))
            for folder in tmp_path.iterdir():
                shutil.rmtree(folder)

    code, headline, place = refused(write)
    assert code == "missing-file" and place == str(tmp_path / "out")
    assert headline == f"cannot write {place!r}: no such file"


def test_a_distributed_checkpoint_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "out"

    def enter() -> None:
        with DcpWriter(path, 2, UNSYNCED):
            raise AssertionError

    code, headline, place = refused(enter)
    assert (code, place) == ("not-a-folder", str(path)) and str(path) in headline
    assert (tmp_path / "file").read_text() == "x"


# Descriptors


def test_a_file_is_closed_when_its_last_user_is_done(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x")
    files = Descriptors(lambda name: os.open(name, os.O_RDONLY))
    with files.using(str(path)) as number:
        files.close()
        os.fstat(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_files_make_room_where_the_process_has_no_descriptor_left(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}" for n in range(4)]
    for n, path in enumerate(paths):
        path.write_bytes(bytes([n]))
    files = OpenFiles(map(str, paths))
    read = [files.read(str(path), 0, 1) for path in paths[:3]]
    with no_descriptors():
        read.append(files.read(str(paths[3]), 0, 1))
        held = files._files.held()
    assert read == [b"\0", b"\1", b"\2", b"\3"]
    assert held == {str(paths[0]), str(paths[3])}
    files.close()
    lone = OpenFiles([str(paths[0])])
    with no_descriptors():
        assert refused(lambda: lone.read(str(paths[0]), 0, 1))[0] == "too-many-files"


def three(folder: Path) -> Writer:
    """A writer of three files of eight bytes."""
    outputs = [Output(folder / f"{n}.bin", folder / f".{n}.part", 8) for n in range(3)]
    places = {str(n): Extent(str(output.temporary), 0, 8) for n, output in enumerate(outputs)}
    return Writer(outputs, places, durability=UNSYNCED)


def test_outputs_make_room_where_the_process_has_no_descriptor_left(tmp_path: Path) -> None:
    writer = three(tmp_path)
    with writer:
        writer._descriptors.make_room()
        for key in ("2", "1", "0"):
            with no_descriptors() if key == "1" else contextlib.nullcontext():
                writer.write(writer.places[key].file, 0, key.encode() * 8)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != RECORD} == {
        f"{n}.bin": f"{n}".encode() * 8 for n in range(3)
    }


def test_a_file_that_another_took_the_place_of_is_not_written(tmp_path: Path) -> None:
    writer = three(tmp_path)

    def write() -> None:
        writer.write(writer.places["2"].file, 0, b"2" * 8)

    with pytest.raises(cs.CheckpointError, match="stop here"), writer:
        writer._descriptors.make_room()
        other = Path(writer.places["2"].file)
        other.with_name("other").write_bytes(b"theirs..")
        other.with_name("other").replace(other)
        for _ in range(2):  # the second time as well
            code, headline, place = refused(write)
            assert "something else took the place of a file that is being written" in headline
            assert other.read_bytes() == b"theirs.."
            assert place == str(other) and code
        raise cs.CheckpointError([cs.Diagnostic("stop", "stop here")])


def test_nothing_is_written_after_an_output_was_given_up(tmp_path: Path) -> None:
    def abandon() -> None:
        with three(tmp_path) as writer:
            writer.abort()
            _, headline, place = refused(lambda: writer.write(writer.places["1"].file, 0, b"1" * 8))
            assert "the output was given up" in headline and place == writer.places["1"].file

    assert refused(abandon)[0] == "incomplete-output"
    assert list(tmp_path.iterdir()) == []


def test_a_follower_that_fails_leaves_the_files_to_the_leader(tmp_path: Path) -> None:
    with three(tmp_path) as leader:
        with pytest.raises(ZeroDivisionError), Follower(Outline.of(leader)) as follower:
            follower.write(leader.places["0"].file, 0, b"x" * 8)
            raise ZeroDivisionError
        assert refused(lambda: follower.write(leader.places["0"].file, 0, b"x" * 8))[1].find("given up") > 0
        assert len(list(tmp_path.iterdir())) == 3
        for place in leader.places.values():
            leader.write(place.file, 0, b"y" * 8)
    assert all(path.read_bytes() == b"y" * 8 for path in tmp_path.glob("*.bin"))


# Transactions


def test_what_cannot_be_looked_at_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    found = {name: _in_use(tmp_path / name) for name in ("link", "file", "folder", "nothing")}
    assert found == {"link": True, "file": False, "folder": False, "nothing": False}


def test_what_another_run_decided_is_carried_out_first(tmp_path: Path) -> None:
    cs.save({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with cs.open({"b": torch.zeros(3)}) as checkpoint:
        cs.save(checkpoint, tmp_path / "y.safetensors")
        hidden = tmp_path / f".y.safetensors{MARK}0123456789abcdef"
        (tmp_path / "y.safetensors").rename(hidden)
    Replacement(tmp_path, (), ((hidden.name, "y.safetensors"),), ()).write(UNSYNCED)
    cs.save({"a": torch.zeros(2)}, tmp_path / "x.safetensors", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "y.safetensors"}
    assert list(cs.open(tmp_path / "y.safetensors")) == ["b"]


# Headers in place


@pytest.fixture
def file(tmp_path: Path) -> Path:
    cs.save({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def places_of(path: Path) -> dict[str, tuple[TensorSpec, int]]:
    with cs.open(path) as checkpoint:
        return {key: (entry.spec, entry.offset) for key, entry in checkpoint.entries.items()}


@pytest.mark.parametrize("call", [header_swap.refuse_shared, lambda path: header_swap.fitted_header(path, {}, {}, {})])
def test_a_header_of_no_file_is_not_swapped(tmp_path: Path, call: Callable[[Path], object]) -> None:
    code, headline, place = refused(lambda: call(tmp_path / "none.safetensors"))
    assert code == "missing-file" and place == str(tmp_path / "none.safetensors") and place in headline


def test_a_file_that_may_not_be_written_keeps_its_header(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(path: Any, flags: int, *rest: Any, then: Any = os.open) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return int(then(path, flags, *rest))

    monkeypatch.setattr(os, "open", refusing)
    code, headline, _ = refused(lambda: header_swap.replace_header(file, b"", {}))
    assert code == "permission-denied" and "writ" in headline and str(file) in headline


def test_tensors_that_leave_bytes_over_are_no_header(file: Path) -> None:
    places = places_of(file)
    last = max(places, key=lambda key: places[key][1])
    left = places.pop(last)[0].nbytes
    code, headline, _ = refused(lambda: header_swap.fitted_header(file, places, {}, {}))
    assert code == "in-place-holes" and f"the last {left} bytes would belong to no tensor" in headline


@pytest.mark.parametrize("how", ["another length", "shorter", "other places"])
def test_a_file_that_changed_meanwhile_keeps_its_header(file: Path, how: str) -> None:
    places = places_of(file)
    header = header_swap.fitted_header(file, {f"{key}2": place for key, place in places.items()}, {}, {})
    data = file.read_bytes()
    if how == "another length":
        file.write_bytes(data := (len(header)).to_bytes(8, "little") + data[8:] + b" " * 8)
    elif how == "shorter":
        file.write_bytes(data := data[:20])
    code, headline, place = refused(lambda: header_swap.replace_header(file, header, places))
    expected = {
        "other places": ("in-place-check", "the header reads otherwise than it was written"),
    }.get(how, ("file-changed", "the file changed after its header was read"))
    assert code == expected[0] and expected[1] in headline and place == str(file)
    assert file.read_bytes() == data
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# Reading


def test_a_tensor_is_read_where_it_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cs.save({"w": torch.arange(1 << 18)}, tmp_path / "x.safetensors")

    def refusing(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with cs.open(tmp_path / "x.safetensors") as checkpoint:
        monkeypatch.setattr(mmap, "mmap", refusing)
        assert torch.equal(checkpoint.load("w"), torch.arange(1 << 18))


def test_what_is_not_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    beside = LocalFile.of(str(tmp_path / "x"), (tmp_path / "x").stat())
    found = refused(lambda: beside.beside("../"))
    assert found[0] == "not-a-file" and found[1].endswith("is neither a file nor a folder")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        found = refused(lambda: read_fully(descriptor, 0, memoryview(bytearray(1)), "a name"))
    finally:
        os.close(descriptor)
    assert "'a name'" in found[1] and found[2] == "a name"
    assert refused(lambda: read_folder(str(tmp_path / "none")))[::2] == ("missing-file", str(tmp_path / "none"))
    assert "~nobody-of-this-name" in refused(lambda: cs.open("~nobody-of-this-name/x.pt"))[1]


@pytest.mark.parametrize("names", [(), ("notes.txt",)])
def test_a_folder_without_weights_has_no_files_to_mount(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(cs.CheckpointError) as caught:
        cs.open(tmp_path, by_file=True)
    (problem,) = caught.value.diagnostics
    assert problem.code == "nothing-to-read"
    assert problem.headline == f"the folder {str(tmp_path)!r} holds no checkpoint files"
    assert problem.notes == (tuple(f"there is {name}" for name in names) or ("it is empty",))
    assert problem.help == "name the file, or another folder"


# Unpacking


def named_gzip(data: bytes, size: int) -> bytes:
    """A gzip file of just so many bytes, whose header has a long name."""
    plain = gzip.compress(data, mtime=0)
    name = b"n" * (size - len(plain) - 1)
    return plain[:3] + b"\x08" + plain[4:10] + name + b"\0" + plain[10:]


def test_a_file_unpacks_to_twenty_times_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked, "_FREE", 0)
    data = bytes(20_000)
    source = unpacked.unpack(MemoryBuffer("x.gz", named_gzip(data, 1000)), "gzip")
    assert source.size == 20_000
    code, headline, _ = refused(lambda: unpacked.unpack(MemoryBuffer("x.gz", named_gzip(data, 999)), "gzip"))
    assert (code, headline) == ("unsupported-format", "'x.gz' unpacks to more than 19,980 bytes")


@pytest.mark.parametrize("how", ["no folder", "no room"])
def test_a_large_file_needs_a_temporary_one(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(unpacked, "_IN_MEMORY", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none" if how == "no folder" else tmp_path))
    source = MemoryBuffer("x.gz", gzip.compress(bytes(9000)))
    if how == "no room":
        request.getfixturevalue("small_files")
    code, headline, place = refused(lambda: unpacked.unpack(source, "gzip"))
    assert code == ("missing-file" if how == "no folder" else "file-too-large"), headline
    assert place == "x.gz (unpacked)" and "'x.gz (unpacked)'" in headline
