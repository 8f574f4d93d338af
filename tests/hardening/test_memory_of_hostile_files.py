"""What a hostile file makes of itself in memory: so much for any file, and a few bytes for each of its own."""

from __future__ import annotations

import contextlib
import io
import tracemalloc
from pathlib import Path

import pytest
from nasty import BLOWN_UP, CASES

import ckptsurgery as cs
from ckptsurgery.errors import CheckpointError
from ckptsurgery.storage.unpickling import nesting, pickle_machine
from ckptsurgery.storage.unpickling.pickle_machine import FREE, TIMES, Unpickler


def peak(read: object) -> int:
    """Bytes of Python objects at the highest point of a call."""
    assert callable(read)
    tracemalloc.start()
    try:
        with contextlib.suppress(cs.CkptSurgeryError):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BLOWN_UP)
def test_a_pickle_makes_a_bounded_number_of_bytes_for_each_of_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what is free to any file, which hides the multiple in a small one; reading the tree may double it."""
    monkeypatch.setattr(pickle_machine, "FREE", 1 << 16)
    monkeypatch.setattr(nesting, "_FREE", 1 << 16)
    data = BLOWN_UP[name]

    def unpickle() -> object:
        return Unpickler(io.BytesIO(data), len(data), "x.pt", persistent=lambda identity: None).load()

    assert peak(unpickle) < (TIMES + 9) * len(data) + (1 << 20)  # nine more: the file's bytes, and the machine's stack
    path = CASES[f"a pickle of {name}"].make(tmp_path)
    assert peak(lambda: cs.open(path)) < 2 * TIMES * path.stat().st_size + (1 << 20)


def test_what_is_free_to_any_pickle_is_bounded() -> None:
    sets = b"\x80\x04(" + b"\x8f" * (FREE // 100) + b"t."
    assert peak(lambda: Unpickler(io.BytesIO(sets), 0, "x.pt").load()) < FREE + (4 << 20)
    with pytest.raises(CheckpointError, match="out of proportion"):
        Unpickler(io.BytesIO(sets), 0, "x.pt").load()


@pytest.mark.parametrize("name", [name for name in CASES if "of empty" in name and "pickle" not in name])
def test_json_of_brackets_takes_no_more_than_its_text(name: str, tmp_path: Path) -> None:
    path = CASES[name].make(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert peak(lambda: cs.open(path)) < 5 * size + (1 << 20)
