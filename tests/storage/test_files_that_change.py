"""A file that changes after its header was read is noticed, also before anything else of it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.formats import sniffing
from ckptsurgery.storage.formats.format import OpenedSource

STATE = {"a": torch.arange(4.0), "b": torch.ones(2)}


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("change", [append, replace])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "shards"])
@pytest.mark.parametrize("when", ["while it is opened", "after it was opened"])
def test_a_change_is_noticed(
    when: str, name: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cs.save(STATE, tmp_path / name, **({"max_shard_size": 16} if name == "shards" else {}))  # type: ignore[arg-type]
    file = sorted((tmp_path / name).glob("*.safetensors"))[0] if name == "shards" else tmp_path / name
    read = sniffing.read_opened

    def reading(opened: OpenedSource, *others: Any) -> Any:
        contents = read(opened, *others)
        if Path(opened.name) == file:
            change(file)
        return contents

    if when == "while it is opened":
        monkeypatch.setattr(sniffing, "read_opened", reading)
    checkpoint = cs.open(tmp_path / name)
    if when == "after it was opened":
        change(file)
    for use in (checkpoint.load, checkpoint.read):
        with pytest.raises(cs.CheckpointError) as caught:
            use("a")
        assert str(caught.value.diagnostics[0].place) == str(file)
    checkpoint.close()
