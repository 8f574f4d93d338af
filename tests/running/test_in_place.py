"""A change in place touches the header alone, can be taken back, and is refused wherever it would be more than that."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.output.header_swap import backup_of, restore_header

RULE = "layers.{i}.weight -> l.{i}.w"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    cs.save({f"layers.{i}.weight": torch.full((2, 3), float(i)) for i in range(4)}, path)
    return path


def data_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def test_names_change_and_the_data_stays(file: Path) -> None:
    before = file.read_bytes()
    expected = cs.plan(file, RULE).state_dict()
    inode = file.stat().st_ino
    report = cs.plan(file, RULE).save(file, in_place=True)
    after = file.read_bytes()
    assert len(after) == len(before) and data_of(file) == before[-len(data_of(file)) :]
    assert file.stat().st_ino == inode
    with cs.open(file) as changed:
        assert list(changed) == list(expected)
        assert all(torch.equal(changed[key].load(), tensor) for key, tensor in expected.items())
    assert report.bytes_read == 0 and report.bytes_written == len(before) - len(data_of(file))
    assert "restore-header" in report.notes[0]


def test_the_old_header_is_restored_bit_for_bit(file: Path) -> None:
    before = file.read_bytes()
    cs.plan(file, RULE).save(file, in_place=True)
    assert backup_of(file).exists()
    restore_header(file)
    assert file.read_bytes() == before
    assert not backup_of(file).exists()


def test_a_header_that_a_crash_tore_is_restored(file: Path) -> None:
    before = file.read_bytes()
    cs.plan(file, RULE).save(file, in_place=True)
    with file.open("r+b") as torn:
        torn.seek(20)
        torn.write(b"\0" * 40)
    with pytest.raises(cs.CheckpointError):
        cs.open(file)
    restore_header(file)
    assert file.read_bytes() == before


def test_what_others_have_mapped_of_the_data_does_not_change(file: Path) -> None:
    with file.open("rb") as held:
        mapped = mmap.mmap(held.fileno(), 0, access=mmap.ACCESS_READ)
        data = mapped[-96:]
        with cs.open(file) as checkpoint:
            tensor = checkpoint["layers.1.weight"].load()
            cs.plan(file, RULE).save(file, in_place=True)
            assert torch.equal(tensor, torch.full((2, 3), 1.0))
        assert mapped[-96:] == data
        mapped.close()


def test_shapes_may_change_and_ties_may_come(file: Path) -> None:
    recipe = cs.Recipe(["layers.{i}.weight [a b] -> l.{i} [(a b) 1]"], tie={"head": "l.0"})
    cs.plan(file, recipe).save(file, in_place=True)
    with cs.open(file) as changed:
        assert changed.ties[0].names == ("l.0", "head")
        assert changed["l.2"].shape == (6, 1)


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("layers.{i}.weight -> l.{i} | cast(bf16)", "in-place-bytes"),
        ("layers.{i}.weight [a b] -> l.{i} [b a]", "in-place-bytes"),
        (
            "layers.{i}.weight -> a.much.longer.name.than.there.is.room.for.in.the.old.header.{i}.weight",
            "in-place-room",
        ),
        ("layers.{i:0..2}.weight -> l.{i}", "in-place-drop"),
        ("layers.{i}.weight -> l.{i}, m.{i}", "in-place-holes"),
    ],
)
def test_what_is_more_than_a_header_is_refused_and_changes_nothing(file: Path, rule: str, code: str) -> None:
    before = file.read_bytes()
    with pytest.raises(cs.CkptSurgeryError) as told:
        cs.plan(file, cs.Recipe([rule], rest="drop")).save(file, in_place=True)
    assert [d.code for d in told.value.diagnostics] == [code]
    assert file.read_bytes() == before
    assert not backup_of(file).exists()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_with_another_name_is_refused(file: Path, link: object) -> None:
    other = file.with_name("other.safetensors")
    link(file, other)  # type: ignore[operator]
    with pytest.raises(cs.CheckpointError, match="in-place-link"):
        cs.plan(other, RULE).save(other, in_place=True)


def test_another_path_another_format_and_several_files_are_refused(file: Path, tmp_path: Path) -> None:
    cs.plan(file, cs.Recipe(rest="keep")).save(tmp_path / "copy.safetensors")
    with pytest.raises(cs.PlanError, match="in-place-other"):
        cs.plan(file, RULE).save(tmp_path / "copy.safetensors", in_place=True)
    torch.save({"layers.0.weight": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(cs.PlanError, match="in-place-format"):
        cs.plan(tmp_path / "model.pt", RULE).save(tmp_path / "model.pt", in_place=True)
    cs.plan(file, cs.Recipe(rest="keep")).save(tmp_path / "shards", "50B")
    with pytest.raises(cs.PlanError, match="in-place-format"):
        cs.plan(tmp_path / "shards", RULE).save(tmp_path / "shards", in_place=True)


def test_options_that_write_files_do_not_go_with_it(file: Path) -> None:
    with pytest.raises(cs.PlanError, match="max_shard_size"):
        cs.plan(file, RULE).save(file, "1GB", in_place=True)


def test_two_processes_do_not_change_one_file(file: Path) -> None:
    import fcntl

    with file.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(cs.CheckpointError, match="output-busy"):
            cs.plan(file, RULE).save(file, in_place=True)


def test_a_backup_of_another_file_is_not_restored(file: Path) -> None:
    with pytest.raises(cs.CheckpointError, match="missing-file"):
        restore_header(file)
    backup_of(file).write_bytes(b"\4\0\0\0\0\0\0\0{}  ")
    with pytest.raises(cs.CheckpointError, match="in-place-backup"):
        restore_header(file)


def test_a_change_that_was_interrupted_is_told_as_such_and_taken_back(file: Path) -> None:
    """Its first byte goes first and comes back last, so that old and new names are never mixed."""
    before = file.read_bytes()
    cs.plan(file, RULE).save(file, in_place=True)
    with file.open("r+b") as torn:
        torn.seek(8)
        torn.write(b"!")
    for name in (file, file.with_name("another-suffix.bin")):
        name.write_bytes(file.read_bytes())
        with pytest.raises(cs.CheckpointError, match="interrupted-change") as told:
            cs.open(name)
        assert "restore-header" in (told.value.diagnostics[0].help or "")
    restore_header(file)
    assert file.read_bytes() == before
