"""Long use and odd input: nothing leaks, threads agree, any name and any dtype comes back bit for bit."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import threading
from pathlib import Path

import pytest
import torch
from hostile import safetensors_file
from safetensors.torch import save_file

import ckptsurgery as cs
from ckptsurgery.specs import DTYPES
from ckptsurgery.storage.output.writing import open_writer

ROUNDS = int(os.environ.get("CKPTSURGERY_ROUNDS", "2000"))
"""Conversions in one process; 10000 by hand."""


def memory() -> int:
    """Bytes that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def held() -> tuple[int, int]:
    """Open descriptors and threads."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


def test_thousands_of_conversions_in_one_process_leak_nothing(tmp_path: Path) -> None:
    memory_folder = Path("/dev/shm")
    folder = Path(os.fspath(memory_folder), f"soak-{os.getpid()}") if memory_folder.is_dir() else tmp_path / "soak"
    folder.mkdir()
    state = {f"layers.{i}.w": torch.full((8, 4), float(i)) for i in range(3)}
    source, bad = folder / "s.safetensors", folder / "bad.safetensors"
    save_file(state, source)
    bad.write_bytes(source.read_bytes()[:-1])

    def once(number: int) -> None:
        with cs.open(source) as checkpoint:
            cs.plan(checkpoint, "layers.{i}.w [a b] -> h.{i}.w [b a]").save(folder / "out.safetensors", overwrite=True)
        if number % 10 == 0:
            cs.plan(source, "layers.{i}.w -> all [i ...]").state_dict()  # not closed: left to the collector
            cs.save(state, folder / "out", overwrite=True, max_shard_size=128)
            with pytest.raises(cs.CheckpointError):
                cs.open(bad)

    try:
        for number in range(ROUNDS // 10):
            once(number)
        gc.collect()
        before, descriptors = memory(), held()
        for number in range(ROUNDS):
            once(number)
        gc.collect()
        assert held() == descriptors
        assert memory() - before < 32 << 20
        assert sorted(path.name for path in folder.iterdir()) == [
            "bad.safetensors",
            "out",
            "out.safetensors",
            "s.safetensors",
        ]
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
    print(f"soak: {ROUNDS:,} conversions")


def test_200_threads_read_one_checkpoint(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((1 << (i % 20),), float(i)) for i in range(60)}
    cs.save(state, tmp_path / "x", max_shard_size="2MB")
    wrong: list[str] = []
    with cs.open(tmp_path / "x") as checkpoint:

        def read(seed: int) -> None:
            for key in random.Random(seed).sample(sorted(state), 20):
                value = float(key[1:])
                if (
                    checkpoint.load(key)[-1] != value
                    or bytes(checkpoint.read(key, 0, 4)) != state[key][:1].numpy().tobytes()
                ):
                    wrong.append(key)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(checkpoint._open_files._files.held()) == len(checkpoint.files)
    assert not wrong


SCRIPTS = (
    "a",
    "é",
    "ß",
    "Ω",
    "ж",
    "א",
    "ع",
    "ह",
    "中",
    "한",
    "🙂",
    "\u202e",
    "\u0301",
    " ",
    "\n",
    "\t",
    '"',
    "'",
    "\\",
    "%",
    "$(x)",
    "{i}",
    "->",
)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_names_of_10_000_characters_in_any_script_come_back(suffix: str, tmp_path: Path) -> None:
    names = [(script * 10_000)[:10_000] for script in SCRIPTS] + [".".join("abc") * 2000]
    state = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    cs.save(state, tmp_path / f"x{suffix}", max_shard_size=None if suffix else 20)
    with cs.open(tmp_path / f"x{suffix}") as checkpoint:
        assert sorted(checkpoint) == sorted(names)
        assert all(float(checkpoint[name].load()[0]) == i for i, name in enumerate(names))
        assert cs.diff(checkpoint, state).identical


@pytest.mark.parametrize("dtype", [name for name, kind in DTYPES.items() if kind.safetensors])
@pytest.mark.parametrize("shape", [[], [0], [0, 3], [8], [3, 8], [1, 1, 8, 2]])
def test_every_dtype_of_the_format_comes_back_bit_for_bit(dtype: str, shape: list[int], tmp_path: Path) -> None:
    spec = cs.TensorSpec(shape, dtype)
    if DTYPES[dtype].bits < 8 and not shape:
        return  # a scalar of less than a byte is in no file
    data = random.Random(f"{dtype} {shape}").randbytes(spec.nbytes)
    source = tmp_path / "s.safetensors"
    safetensors_file(source, {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, spec.nbytes]}}, data)
    cs.plan(source, "w -> m.w").save(tmp_path / "one.safetensors", check=True)
    cs.plan(tmp_path / "one.safetensors", "m.w -> n.w").save(tmp_path / "folder", check=DTYPES[dtype].torch is not None)
    with cs.open(tmp_path / "folder") as checkpoint:
        assert (checkpoint["n.w"].spec, bytes(checkpoint.read("n.w"))) == (spec, data)
    if DTYPES[dtype].torch is not None and (DTYPES[dtype].bits >= 8 or not shape or shape[-1] % 2 == 0):
        cs.plan(source, "w -> w").save(tmp_path / "x.pt")
        with cs.open(tmp_path / "x.pt") as checkpoint:
            assert (checkpoint["w"].spec, bytes(checkpoint.read("w"))) == (spec, data)


@pytest.mark.parametrize("name", ["with spaces", "a\nb", "ü\u0301ber", "-rf", "*?[x]", "'\"$(touch x)`", "a" * 200])
def test_paths_may_hold_anything_that_a_file_system_takes(name: str, tmp_path: Path) -> None:
    state = {"w": torch.arange(3.0)}
    for path in (
        tmp_path / f"{name}.safetensors",
        tmp_path / f"{name}.pt",
        tmp_path / name,
        tmp_path / name / "sub" / "x.safetensors",
    ):
        cs.save(state, path)
        with cs.open(path) as checkpoint:
            assert checkpoint.load("w").tolist() == [0, 1, 2]
    index = json.dumps({"weight_map": {"w": f"{name}.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert list(cs.open(tmp_path / "model.safetensors.index.json")) == ["w"]


def test_paths_need_not_be_utf_8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9 \xff.safetensors"
    cs.save({"w": torch.arange(3.0)}, os.fsdecode(path))
    assert os.path.exists(path)  # noqa: PTH110 - bytes are no Path
    with cs.open(os.fsdecode(path)) as checkpoint:
        cs.plan(checkpoint, "w -> v").save(os.fsdecode(os.fsencode(tmp_path) + b"/\xfe"), max_shard_size=4)
        assert json.dumps(cs.doctor(checkpoint).to_json())
    with pytest.raises(cs.CheckpointError, match="missing-file") as caught:
        cs.open(os.fsdecode(path + b"x"))
    assert str(caught.value).encode("utf-8", "backslashreplace")


def test_a_tensor_beyond_2_31_bytes_is_read_by_range_renamed_and_checked_by_its_header(tmp_path: Path) -> None:
    """A file with a hole in it, which takes a few blocks of the disk, and room that is kept for the output alone."""
    numel, path = (1 << 31) + 4096, tmp_path / "x.safetensors"
    rows = {"big": {"dtype": "U8", "shape": [numel], "data_offsets": [0, numel]},
            "end": {"dtype": "U8", "shape": [4], "data_offsets": [numel, numel + 4]}}  # fmt: skip
    safetensors_file(path, rows)
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start + numel + 4)
        file.seek(start + numel - 2)
        file.write(b"\1\2abcd")
    with cs.open(path) as checkpoint:
        assert bytes(checkpoint.read("big", numel - 2)) == b"\1\2"
        assert checkpoint["big"][numel - 2 :].tolist() == [1, 2]
        assert bytes(checkpoint.read("end")) == b"abcd"
        assert int(checkpoint.load("big")[-1]) == 2  # mapped, not read
        specs = {f"m.{key}": tensor.spec for key, tensor in checkpoint.items()}
        with open_writer(tmp_path / "y.safetensors", specs) as writer:
            for key, place in writer.places.items():
                writer.skip(place.nbytes) if key == "m.big" else writer.write(place.file, place.offset, b"efgh")
    with cs.open(tmp_path / "y.safetensors") as checkpoint:
        assert checkpoint["m.big"].nbytes == numel
        assert bytes(checkpoint.read("m.end")) == b"efgh"
    assert path.stat().st_blocks * 512 < 1 << 20
    (tmp_path / "y.safetensors").unlink()
