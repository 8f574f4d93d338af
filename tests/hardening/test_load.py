"""Many rounds, many keys, odd paths: what is kept and what is done is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

import pytest
import torch
from hostile import safetensors_file
from soak import jobs, soak

import ckptsurgery as cs
from ckptsurgery.specs import DTYPES


@pytest.mark.parametrize("name", [
    "re-sharding of a torch zip", "failing conversions", "cs.open", "reading a torch zip", "load_into", "cs.doctor",
    "cs.suggest", "cs.diff",
])  # fmt: skip
def test_nothing_is_kept_of_what_is_done_again_and_again(name: str, tmp_path: Path) -> None:
    assert soak(name, jobs(tmp_path)[name], 16, tmp_path) is None


def test_threads_with_a_checkpoint_each_read_the_same(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((1000,), float(i)) for i in range(8)}
    cs.save(state, tmp_path / "x.safetensors")
    right: list[int] = []

    def read(number: int) -> None:
        with cs.open(tmp_path / "x.safetensors") as checkpoint:
            key = f"t{number % 8}"
            if bytes(checkpoint.read(key)) == state[key].numpy().tobytes():
                right.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == list(range(200))


def steps_of_a_round(count: int, folder: Path) -> int:
    """Calls, of functions in Python and in C, that a checkpoint of so many keys takes from open to diff."""
    state = {f"l.{i // 20}.e.{i % 20}.w": cs.TensorSpec([1], "U8") for i in range(count)}
    from ckptsurgery.storage.output.writing import open_writer

    with open_writer(folder / f"{count}.safetensors", state) as writer:
        for place in writer.places.values():
            writer.write(place.file, place.offset, b"\1")
    calls = 0

    def counted(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        with cs.open(folder / f"{count}.safetensors") as checkpoint:
            cs.plan(checkpoint, "l.{i}.e.{j}.w -> l.{i}.w [j ...]").save(folder / f"{count}-stacked.safetensors")
            plan = cs.plan(checkpoint, "l.{i}.{r...} -> m.{i}.{r...}")
            str(plan)
            str(plan.save(folder / f"{count}-renamed.safetensors"))
            str(cs.doctor(folder / f"{count}-renamed.safetensors"))
            str(cs.diff(checkpoint, folder / f"{count}-renamed.safetensors"))
    finally:
        sys.setprofile(before)
    return calls


def test_ten_times_the_keys_take_ten_times_the_steps(tmp_path: Path) -> None:
    steps_of_a_round(20, tmp_path)  # what is imported and kept
    few, many = steps_of_a_round(200, tmp_path), steps_of_a_round(2000, tmp_path)
    assert many < 12 * few


def test_a_format_that_has_no_such_dtype_says_which_has(tmp_path: Path) -> None:
    for dtype in [name for name, kind in DTYPES.items() if kind.safetensors and kind.torch is None]:
        spec = cs.TensorSpec([8], dtype)
        row = {"dtype": dtype, "shape": [8], "data_offsets": [0, spec.nbytes]}
        safetensors_file(tmp_path / "x.safetensors", {"w": row}, bytes(spec.nbytes))
        with pytest.raises(cs.CheckpointError, match="dtype-not-in-torch") as caught:
            cs.plan(tmp_path / "x.safetensors", "w -> v").save(tmp_path / "x.pt")
        assert caught.value.diagnostics[0].help == "write a .safetensors file"
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


PLACES = [
    b"caf\xe9 \xff.safetensors", b"new\nline", b"\xf0\x9f\x99\x82.pt", b"sub/../plain", b"x.safetensors/",
    b"\x1b[31m.safetensors", b"/".join([b"d" * 200] * 12) + b"/deep.safetensors",
]  # fmt: skip

PROGRAM = """
import os, sys
from ckptsurgery.cli import main
folder, *places = sys.argv[1:]
for place in places:
    path = os.path.join(folder, place)
    rule = ["--rule", "{r...} -> m.{r...}"]
    for command in (["inspect", path], ["inspect", path + "-"],
                    ["convert", path, os.path.join(folder, "out"), *rule, "--overwrite"]):
        for more in ([], ["--json"]):
            sys.argv = ["ckptsurgery", *command, *more]
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code or 0
            sys.stdout.buffer.write(b"\\0%d\\0" % code)
            sys.stderr.buffer.write(b"\\0")
            sys.stdout.flush(), sys.stderr.flush()
"""


def test_the_program_prints_any_path_where_all_is_ascii_and_its_json_is_json(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.safetensors").mkdir()
    for place in PLACES:
        cs.save({"é🙂\n": torch.arange(3.0)}, os.path.join(tmp_path, os.fsdecode(place)))  # noqa: PTH118 - keeps the "/"
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", PROGRAM, tmp_path, *PLACES]
    done = subprocess.run(command, capture_output=True, env=ascii_only, check=False)
    assert b"Traceback" not in done.stderr, done.stderr.decode("utf-8", "replace")
    texts, errors = done.stdout.split(b"\0"), done.stderr.split(b"\0")
    outs, codes = texts[:-1:2], [int(code) for code in texts[1::2]]
    assert codes == [0, 0, 1, 1, 0, 0] * len(PLACES)
    assert all(isinstance(json.loads(o or e), dict) for o, e in list(zip(outs, errors))[1::2])
    assert not any(b"\x1b" in text for text in (*outs, *errors))
