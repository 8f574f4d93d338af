"""What is written is on the disk before it has its name, unless that was not asked for: then nothing waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.output import staging

Identity = tuple[int, int]
PLACES = ["t.safetensors", "t.pt", "t", "over.safetensors", "over.pt", "over"]


@dataclass
class Waits:
    """What the process waited for: the files and folders, and how often it had the disk begin with something.

    `named` are those for which it waited when `target` was there.
    """

    synced: list[Identity] = field(default_factory=list)
    begun: int = 0
    target: Path | None = None
    named: list[Identity] = field(default_factory=list)

    def note(self, waited: Identity) -> None:
        self.synced.append(waited)
        if self.target is not None and self.target.exists():
            self.named.append(waited)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    found = Waits()
    advise = os.posix_fadvise

    def noting(call: Any) -> Any:
        return lambda descriptor: (found.note(identity(os.fstat(descriptor))), call(descriptor))[1]

    def advised(descriptor: int, start: int, nbytes: int, advice: int) -> None:
        found.begun += advice == os.POSIX_FADV_DONTNEED
        advise(descriptor, start, nbytes, advice)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(staging, "_SEND_EVERY", 64)
    yield found


def identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def of(path: str | Path) -> Identity:
    return identity(Path(path).stat())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    cs.save({f"h.{i}.w": torch.randn(4, 6) for i in range(6)}, tmp_path / "s.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for name in PLACES[3:]:
        old = {f"old.{i}": torch.randn(5) for i in range(4)}
        cs.save(old, tmp_path / name, 40 if "." not in name else None)
    return tmp_path / "s.safetensors"


def convert(source: Path, target: Path, **options: Any) -> cs.Report:
    with cs.open(source) as checkpoint:
        folder = target.suffix == ""
        return cs.plan(checkpoint, "h.{i}.w [a b] -> l.{i}.w [b a]").save(
            target, 250 if folder else None, overwrite=True, companions=folder, **options
        )


@pytest.mark.parametrize("name", PLACES)
def test_each_file_and_its_folder_are_synced(source: Path, waits: Waits, name: str) -> None:
    waits.target = target = source.with_name(name)
    convert(source, target)
    files = [*target.iterdir()] if target.is_dir() else [target]
    assert len(files) == (5 if target.is_dir() else 1)
    assert {of(path) for path in (*files, files[0].parent)} <= set(waits.synced)
    if not name.startswith("over"):
        assert of(target.parent) in waits.named
    assert waits.begun


@pytest.mark.parametrize("name", PLACES)
def test_without_sync_nothing_waits_and_the_bytes_are_the_same(source: Path, waits: Waits, name: str) -> None:
    target, synced = source.with_name(name), source.parent / "synced" / name
    convert(source, synced)
    assert waits.synced and waits.begun
    waits.synced, waits.begun = [], 0
    convert(source, target, sync=False)
    assert (waits.synced, waits.begun) == ([], 0)
    assert content(target) == content(synced)
    assert not [path for path in source.parent.rglob("*") if staging.MARK in path.name]


def content(path: Path) -> dict[str, bytes]:
    files = path.iterdir() if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def test_save_passes_it_on(source: Path, waits: Waits) -> None:
    report = cs.save(source, source.with_name("copy.safetensors"), sync=False, check=True)
    assert waits.synced == [] and report.proofs
    cs.save(source, source.with_name("copy.pt"))
    assert of(source.with_name("copy.pt")) in waits.synced


@pytest.mark.parametrize("option", ["resume", "in_place"])
def test_what_relies_on_sync_is_refused_without(source: Path, option: str) -> None:
    before = source.read_bytes()
    with pytest.raises(cs.PlanError, match=f"{option} .* cannot go without sync") as caught:
        cs.plan(source, "h.{i}.w -> l.{i}.w").save(source, overwrite=True, sync=False, **{option: True})
    (told,) = caught.value.diagnostics
    assert told.code == "bad-argument" and told.remedies[0] == cs.Remedy("sync", True)
    assert source.read_bytes() == before


def test_more_files_than_may_be_open_are_written_without_a_wait(source: Path, waits: Waits) -> None:
    """Files that are closed to make room are synced then, since nobody would hear later of what the disk refused."""
    values = {f"w.{i}": torch.full((3,), float(i)) for i in range(600)}
    many = source.with_name("many")
    cs.save(values, many, 12, sync=False)
    assert waits.synced == [] and len(list(many.iterdir())) == 601
    with cs.open(many) as written:
        assert all(torch.equal(written[key].load(), values[key]) for key in values)
