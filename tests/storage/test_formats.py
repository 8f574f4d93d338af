"""The table of formats is open: a package that is installed is read and written like the formats that come along."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.formats import table
from ckptsurgery.storage.formats.format import OpenedSource
from ckptsurgery.storage.formats.sniffing import read_opened
from ckptsurgery.storage.sources.byte_source import MemoryBuffer

PAGE = (Path(__file__).parents[2] / "docs" / "contribute" / "formats.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    match = re.search(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert match is not None
    return match[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package of the page is installed."""
    source, site = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    (source / "plain_format.py").write_text(block("python"))
    (source / "pyproject.toml").write_text(block("toml"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True)
    return site


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(site))
    table._of_packages.cache_clear()
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return site


STATE = {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}


def test_the_page_has_thirty_lines_of_code_or_so() -> None:
    code = block("python").partition("class ")[2]
    assert len(code.splitlines()) <= 32


def test_an_installed_format_is_written_and_read(installed: Path, tmp_path: Path) -> None:
    cs.save(STATE, tmp_path / "x.plain")
    with cs.open(tmp_path / "x.plain") as checkpoint:
        assert list(checkpoint) == list(STATE)
        for key, tensor in STATE.items():
            assert torch.equal(checkpoint[key].load(), tensor)
        cs.plan(checkpoint, "{k...} -> m.{k...}").save(tmp_path / "y.plain")
    with cs.open(tmp_path / "y.plain") as checkpoint:
        assert torch.equal(checkpoint["m.w"].load(), STATE["w"])
    table._of_packages.cache_clear()


def test_the_command_line_and_a_folder_know_it_too(installed: Path, tmp_path: Path) -> None:
    cs.save(STATE, tmp_path / "x.pt")
    run = [sys.executable, "-m", "ckptsurgery"]
    subprocess.run([*run, "convert", str(tmp_path / "x.pt"), str(tmp_path / "folder" / "x.plain")], check=True)
    told = subprocess.run([*run, "inspect", "--json", str(tmp_path / "folder")], check=True, capture_output=True)
    assert b"BF16" in told.stdout
    table._of_packages.cache_clear()


def test_a_damaged_file_of_it_is_refused_in_its_words(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "x.plain").write_bytes(b'{"plain":{"w":["F32",[2]]}}\n')
    with pytest.raises(cs.CheckpointError, match="bad-header"):
        cs.open(tmp_path / "x.plain")
    (tmp_path / "y.plain").write_bytes(b'{"plain":{"w":["F32",[2],0]}}\n' + bytes(7))
    with pytest.raises(cs.CheckpointError, match="truncated-file"):
        cs.open(tmp_path / "y.plain")["w"].load()
    table._of_packages.cache_clear()


def test_a_package_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{table.GROUP}]\nbroken = no_such_module:Format\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    table._of_packages.cache_clear()
    (tmp_path / "x.what").write_bytes(b"nothing that anybody knows \xff")
    with pytest.raises(cs.CheckpointError, match=r"bad-format.*no_such_module"):
        cs.open(tmp_path / "x.what")
    table._of_packages.cache_clear()
    cs.save(STATE, tmp_path / "x.safetensors")
    assert len(cs.open(tmp_path / "x.safetensors")) == 3  # nobody asks packages about what is known


def test_each_format_has_a_name_of_its_own() -> None:
    names = [format.name for format in table.formats()]
    assert len(set(names)) == len(names)
    assert all(format.text for format in table.formats())


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "old.pt"])
def test_what_a_file_holds_is_read_from_memory_as_well(name: str, tmp_path: Path) -> None:
    if name == "old.pt":
        torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=False)
    else:
        cs.save(STATE, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    with OpenedSource(MemoryBuffer("in memory", data)) as opened:
        contents = read_opened(opened)
    with cs.open(tmp_path / name) as checkpoint:
        assert list(contents.entries) == list(checkpoint)
        for key, entry in contents.entries.items():
            assert (entry.offset, entry.spec) == (checkpoint.entries[key].offset, checkpoint.entries[key].spec)
    made = cs.Checkpoint(contents, "in memory")
    for key, tensor in STATE.items():
        assert torch.equal(made[key].load(), tensor)
    cs.save(made, tmp_path / "copy.safetensors")
    assert torch.equal(cs.open(tmp_path / "copy.safetensors")["w"].load(), STATE["w"])


def test_deflated_arrays_are_unpacked_when_they_are_loaded(tmp_path: Path) -> None:
    import numpy

    rng = numpy.random.default_rng(0)
    arrays = {
        "c": rng.normal(size=(30, 40)),
        "f": numpy.asfortranarray(rng.normal(size=(3, 5)).astype("f4")),
        "big": rng.integers(0, 9, 7).astype(">i4"),
        "empty": numpy.zeros((0, 3), "f2"),
        "scalar": numpy.float32(3),
    }
    numpy.savez_compressed(tmp_path / "x.npz", **arrays, names=numpy.array(["a"]))
    with cs.open(tmp_path / "x.npz") as checkpoint, numpy.load(tmp_path / "x.npz") as theirs:
        assert set(checkpoint) == set(arrays)
        for key in arrays:
            assert checkpoint[key].shape == theirs[key].shape
            assert numpy.array_equal(checkpoint[key].load().numpy(), theirs[key])
    raw = bytearray((tmp_path / "x.npz").read_bytes())
    at = raw.index(b"c.npy") + 60
    raw[at : at + 40] = bytes(40)
    (tmp_path / "bad.npz").write_bytes(raw)
    with pytest.raises(cs.CheckpointError) as told:
        cs.open(tmp_path / "bad.npz")["c"].load()
    assert told.value.diagnostics[0].help
