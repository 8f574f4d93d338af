"""Outputs at addresses: whole or not at all. `scripts/formats/try_s3.py` does the same against an S3 server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

import ckptsurgery as cs

STATE = {f"layers.{n}.w": torch.randn(8, 16, generator=torch.Generator().manual_seed(n)) for n in range(9)}


@pytest.fixture
def store() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def same(source: str) -> None:
    with cs.open(source) as checkpoint:
        assert set(checkpoint) == set(STATE)
        assert all(torch.equal(checkpoint[key].load(), tensor) for key, tensor in STATE.items())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.npz", "folder", "deep/er/folder/"])
def test_what_is_saved_at_an_address_is_what_is_saved_locally(name, store, tmp_path):
    report = cs.save(STATE, f"memory://bucket/{name}")
    same(f"memory://bucket/{name}")
    cs.save(STATE, tmp_path / name)
    here = tmp_path / name
    local = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in here.rglob("*") if p.is_file()}
    local = local or {name: here.read_bytes()}
    assert {path.removeprefix("/bucket/"): store.cat_file(path) for path in store.find("/bucket")} == local
    assert report.target == f"memory://bucket/{name}"
    assert set(report.files) == {f"memory://bucket/{path}" for path in local}


def test_shards_and_companions_go_along_and_the_index_is_named_last(store, tmp_path, monkeypatch):
    cs.save(STATE, tmp_path / "in", max_shard_size="2kB")
    (tmp_path / "in" / "config.json").write_text(json.dumps({"architectures": ["Tiny"]}))
    order = []
    commit = MemoryFile.commit
    monkeypatch.setattr(MemoryFile, "commit", lambda self: (order.append(self.path), commit(self))[1])
    plan = cs.plan(tmp_path / "in", cs.Recipe(rest="keep"))
    plan.save("memory://bucket/out", max_shard_size="2kB", companions=True, check=True)
    same("memory://bucket/out")
    assert len(order) > 3
    assert order[-1] == "/bucket/out/model.safetensors.index.json"
    assert json.loads(store.cat_file("/bucket/out/config.json"))["architectures"] == ["Tiny"]


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_failure_leaves_nothing(at, store, monkeypatch):
    calls = []
    commit = MemoryFile.commit

    def failing(self):
        calls.append(self.path)
        if len(calls) == at + 1:
            raise OSError("the store is gone")
        commit(self)

    monkeypatch.setattr(MemoryFile, "commit", failing)
    with pytest.raises(cs.CheckpointError, match="the store is gone"):
        cs.save(STATE, "memory://bucket/out", max_shard_size="2kB")
    assert store.find("/bucket") == []


def test_a_failure_while_bytes_are_sent_discards_all(store, monkeypatch):
    discarded = []
    monkeypatch.setattr(MemoryFile, "discard", lambda self: discarded.append(self.path))

    def refusing(self, data):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(MemoryFile, "write", refusing)
    with pytest.raises(cs.CheckpointError, match=r"(?s)write-failed.*reset by peer"):
        cs.save(STATE, "memory://bucket/out.safetensors")
    assert discarded == ["/bucket/out.safetensors"]
    assert store.find("/bucket") == []


def test_a_file_that_exists_is_replaced_when_asked_and_kept_when_that_fails(store, monkeypatch):
    cs.save({"old": torch.ones(2)}, "memory://bucket/x.safetensors")
    before = store.cat_file("/bucket/x.safetensors")
    with pytest.raises(cs.CheckpointError, match="output-exists"):
        cs.save(STATE, "memory://bucket/x.safetensors")
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFile, "commit", lambda self: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(cs.CheckpointError, match="write-failed"):
            cs.save(STATE, "memory://bucket/x.safetensors", overwrite=True)
    assert store.cat_file("/bucket/x.safetensors") == before
    cs.save(STATE, "memory://bucket/x.safetensors", overwrite=True)
    same("memory://bucket/x.safetensors")


def test_what_a_store_remembers_of_a_file_is_asked_anew(store, monkeypatch):
    """The clients of S3 keep listings until they are told that something changed."""
    cs.save({"old": torch.ones(2)}, "memory://bucket/x.safetensors")
    info, known = MemoryFileSystem.info, {}
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: known.setdefault(path, info(self, path)))
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: known.clear())
    store.info("/bucket/x.safetensors")
    cs.save(STATE, "memory://bucket/x.safetensors", overwrite=True)
    same("memory://bucket/x.safetensors")


def test_a_folder_that_exists_is_not_replaced(store):
    cs.save(STATE, "memory://bucket/out")
    for overwrite in (False, True):
        with pytest.raises(cs.CheckpointError, match="output-exists") as caught:
            cs.save(STATE, "memory://bucket/out", overwrite=overwrite)
        assert "remove it first" in str(caught.value)
    same("memory://bucket/out")


def test_a_dry_run_writes_nothing(store):
    report = cs.plan(STATE, cs.Recipe(rest="keep")).save("memory://bucket/x.safetensors", dry_run=True)
    assert report.files == ("memory://bucket/x.safetensors",)
    assert store.find("/bucket") == []


@pytest.mark.parametrize("option", ["in_place", "resume"])
def test_what_needs_files_of_this_machine_is_refused(option, store):
    with pytest.raises(cs.PlanError, match=f"bad-argument.*{option}"):
        cs.plan(STATE, cs.Recipe(rest="keep")).save("memory://bucket/x.safetensors", **{option: True})


@pytest.mark.parametrize("address", ["https://example.org/x.safetensors", "hf://org/repo/x.safetensors"])
def test_what_is_read_only_is_refused_with_the_way_to_upload(address):
    with pytest.raises(cs.CheckpointError, match=r"(?s)unsupported-output.*upload it"):
        cs.save(STATE, address)


def test_a_store_whose_files_appear_while_they_are_written_is_refused(store, monkeypatch):
    monkeypatch.setattr(MemoryFile, "commit", AbstractBufferedFile.commit)
    with pytest.raises(cs.CheckpointError, match=r"(?s)unsupported-output.*appear while they are written"):
        cs.save(STATE, "memory://bucket/x.safetensors")
