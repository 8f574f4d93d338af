"""A GGUF model in several files is one checkpoint, from its folder and from its first file, and never a part of one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from foreign import refused
from range_server import serving

import ckptsurgery as cs

NAMES = [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
STATE = {f"blk.{i}.weight": torch.full((2, 32), float(i)) for i in range(4)}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def part(number: int, keys: list[str], count: int = 3, tensors: int = 4, **pairs: str) -> bytes:
    """One file, laid out by hand as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md has it."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(keys), 3 + len(pairs))
    for key, value in pairs.items():
        head += text(key.replace("__", ".")) + struct.pack("<I", 8) + text(value)
    head += text("split.no") + struct.pack("<IH", 2, number) + text("split.count") + struct.pack("<IH", 2, count)
    head += text("split.tensors.count") + struct.pack("<Ii", 5, tensors)
    for i, key in enumerate(keys):
        head += text(key) + struct.pack("<IQQIQ", 2, 32, 2, 0, i * 256)
    head += bytes(-len(head) % 32)
    return head + b"".join(STATE[key].numpy().tobytes() for key in keys)


def written(folder: Path) -> list[Path]:
    keys = list(STATE)
    data = [part(0, [], general__architecture="tiny"), part(1, keys[:3]), part(2, keys[3:])]
    for name, held in zip(NAMES, data):
        (folder / name).write_bytes(held)
    return [folder / name for name in NAMES]


def same(source: object) -> None:
    with cs.open(source) as checkpoint:
        assert list(checkpoint) == list(STATE)
        assert all(torch.equal(checkpoint[key].load(), tensor) for key, tensor in STATE.items())
        assert checkpoint.config == {"general": {"architecture": "tiny"}}


def test_the_folder_and_the_first_file_are_the_whole_model(tmp_path: Path) -> None:
    first, *_ = written(tmp_path)
    same(tmp_path)
    same(first)
    cs.plan(tmp_path, "{k...} -> {k...}").save(tmp_path / "whole" / "x.gguf", check=True)
    same(tmp_path / "whole" / "x.gguf")  # and does not call itself one of three files


def test_they_are_opened_by_the_address_of_the_first(tmp_path: Path) -> None:
    written(tmp_path)
    with serving() as server:
        server.files = {name: (tmp_path / name).read_bytes() for name in NAMES}
        same(f"{server.url}/{NAMES[0]}")


def test_another_file_than_the_first_leads_to_it(tmp_path: Path) -> None:
    files = written(tmp_path)
    for file in files[1:]:
        problem = refused(file)
        assert problem.code == "part-of-a-folder"
        (remedy,) = problem.remedies
        same(remedy.value[str(file)])


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    first, second, _ = written(tmp_path)
    second.unlink()
    for source in (tmp_path, first):
        problem = refused(source)
        assert problem.code == "missing-file" and NAMES[1] in problem.headline
    first.rename(tmp_path / "renamed.gguf")
    assert refused(tmp_path / "renamed.gguf").code == "missing-shard"


@pytest.mark.parametrize(
    ("third", "why"),
    [
        (part(1, ["blk.3.weight"]), "file 3 of 3"),
        (part(2, ["blk.3.weight"], count=4), "file 3 of 3"),
        (part(2, ["blk.2.weight"]), "'blk.2.weight' is in"),
        (part(2, []), "3 tensors of 4"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(third: bytes, why: str, tmp_path: Path) -> None:
    written(tmp_path)[2].write_bytes(third)
    assert why in refused(tmp_path).headline


def test_numbered_files_of_other_formats_are_one_checkpoint_too(tmp_path: Path) -> None:
    for i, (key, tensor) in enumerate(STATE.items(), 1):
        cs.save({key: tensor}, tmp_path / f"flax_model-{i:05d}-of-00004.msgpack")
    with cs.open(tmp_path) as checkpoint:
        assert {key: checkpoint[key].shape for key in checkpoint} == {
            key: tensor.shape for key, tensor in STATE.items()
        }
    (tmp_path / "flax_model-00002-of-00004.msgpack").unlink()
    assert refused(tmp_path).code == "missing-shard"
