"""Mappings that tensors share give each its own bytes, however many are alive."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ckptsurgery.storage.sources.files import Windows


@pytest.mark.parametrize("seed", range(3))
def test_a_window_holds_the_range_that_was_asked_for(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    data = draw.randbytes(300_000)
    path = tmp_path / "x"
    path.write_bytes(data)
    windows, alive = Windows(), []
    with path.open("rb") as file:
        for _ in range(300):
            start = draw.randrange(len(data))
            nbytes = draw.randrange(1, min(20_000, len(data) - start) + 1)
            found = windows.over(str(path), file.fileno(), start, nbytes, len(data))
            assert found is not None
            alive.append((*found, start, nbytes))
            if len(alive) > 150:
                alive.pop(draw.randrange(len(alive)))
    for mapping, at, start, nbytes in alive:
        assert mapping[at : at + nbytes] == data[start : start + nbytes]


def test_many_windows_are_shared(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(100_000))
    windows = Windows()
    with path.open("rb") as file:
        alive = [windows.over(str(path), file.fileno(), i * 50, 50, 100_000) for i in range(2000)]
    assert None not in alive
    assert 64 <= len({id(found[0]) for found in alive if found}) < 70
