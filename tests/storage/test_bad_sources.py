"""What is no checkpoint is named for what it is, with the way out, and never as a traceback."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from ckptsurgery.errors import CheckpointError, Diagnostic
from ckptsurgery.storage import open_checkpoint

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return buffer.getvalue()


def refused(source: object) -> Diagnostic:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    assert len(caught.value.diagnostics) == 1
    return caught.value.diagnostics[0]


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"", "empty-file", "empty"),
        (LFS, "lfs-pointer", "git lfs pull"),
        (b"\n  <!DOCTYPE html><html><body>Sign in</body>", "html-page", "resolve"),
        (b"<HTML><head>", "html-page", "HTML"),
        (b"\xef\xbb\xbf<html>", "html-page", "HTML"),
        (b'{"error": "Repository not found"}', "json-page", "Repository not found"),
        (b'["error"]', "json-page", "JSON"),
        (b"Entry not found", "text-file", "Entry not found"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "bad-header", "damaged"),
        (b"\xde\x00\x02\xa6params", "bad-header", "damaged"),
        (b"\x1f\x8b\x08\x00" + b"\x99" * 50, "damaged-zip", "cannot be unpacked"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "unsupported-format", "numpy"),
        (tar(), "nothing-to-read", "tar"),
        (b"\x00\x01\x02\x03" * 100, "unknown-format", "00 01 02 03"),
    ],
)
@pytest.mark.parametrize("name", ["model.bin", "model.safetensors", "weights"])
def test_a_file_is_judged_by_its_content(content: bytes, code: str, said: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if code == "unknown-format" and name.endswith(".safetensors"):
        code, said = "header-too-large", "limit"
    problem = refused(path)
    assert problem.code == code
    assert said in str(problem)
    assert problem.place == str(path)
    assert problem.help


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    problem = refused(tmp_path / "modle.safetensors")
    assert problem.code == "missing-file"
    assert str(tmp_path / "model.safetensors") in str(problem.help)
    assert "does not exist either" in str(refused(tmp_path / "no" / "such" / "file.pt").help)
    assert refused("some-org/some-model").help == "for a repository of the hub write 'hf://some-org/some-model'"


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "gone")
    assert "link" in refused(tmp_path / "x.safetensors").headline


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe").code == "not-a-file"
    assert refused("a\0b").code == "bad-path"
    assert refused("x" * 5000).code == "bad-path"


@pytest.mark.parametrize("source", [3, None, ["a"], b"bytes".join])
def test_an_object_that_is_no_source_is_refused(source: object) -> None:
    assert refused(source).code == "bad-source"


def test_a_folder_without_a_checkpoint_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello world")
    problem = refused(tmp_path)
    assert problem.code == "nothing-to-read"
    assert problem.notes == ("there is README.md",)
    assert refused(tmp_path / "README.md").code == "text-file"


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "model.bin").write_bytes(save({"w": torch.ones(3)}))
    for name in ("model.safetensors", "model.bin"):
        assert open_checkpoint(tmp_path / name).load("w").tolist() == [1, 1, 1]


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = save({"w": torch.ones(3), "v": torch.zeros(2)})
    for size in range(len(whole)):
        (tmp_path / "x.safetensors").write_bytes(whole[:size])
        assert refused(tmp_path / "x.safetensors").code in ("empty-file", "truncated-file")


def test_a_file_truncated_after_it_was_opened_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(1 << 19)}, path)
    with open_checkpoint(path) as ckpt:
        assert bytes(ckpt.read("w", 0, 4)) == torch.ones(1).numpy().tobytes()
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match="truncated-file"):
            ckpt.load("w")


def test_a_path_may_be_a_pathlike_and_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "x.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(open_checkpoint("~/x.safetensors")) == ["w"]
    assert list(open_checkpoint(tmp_path / "x.safetensors")) == ["w"]
