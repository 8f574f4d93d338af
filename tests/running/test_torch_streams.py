"""A torch zip file of very many tensors is written a buffer at a time, and is what it is tensor by tensor."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.output.writing import open_writer
from ckptsurgery.storage.tensors import dense_bytes

RULES = [
    "s.{i} -> m.{i}",
    "none.{i} -> m.{i}.none",
    "fused.{i:0,1,2}.{p:q,k,v} [rows:p] -> m.{i}.fused [(p rows:p)]",
    "odd.{i} -> m.{i}.odd | cast(f16)",
    "big -> big",
]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"s.{i}": torch.randn(1 + i % 50) for i in range(300)}
    made |= {f"none.{i}": torch.zeros(0, 3) for i in range(0, 300, 7)}
    made |= {f"fused.{i}.{p}": torch.randn(n) for i in range(3) for p, n in (("q", 5), ("k", 1), ("v", 2))}
    made |= {f"odd.{i}": torch.randn(1) for i in range(0, 300, 11)}
    made["big"] = torch.randn(40_000)
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    cs.save(tensors(), tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def test_neighbours_written_together_make_the_bytes_that_each_alone_makes(source: Path, tmp_path: Path) -> None:
    plan = cs.plan(source, RULES)
    plan.save(tmp_path / "together.pt")
    made = plan.state_dict()
    with open_writer(tmp_path / "alone.pt", plan.specs) as writer:
        for key, place in writer.places.items():
            writer.write(place.file, place.offset, dense_bytes(made[key], key))
    assert (tmp_path / "together.pt").read_bytes() == (tmp_path / "alone.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "together.pt") as archive:
        assert archive.testzip() is None
    for mapped in (False, True):
        found = torch.load(tmp_path / "together.pt", weights_only=True, mmap=mapped)
        assert list(found) == list(plan.specs)
        assert all(torch.equal(found[key], made[key]) for key in found)


def test_what_is_computed_among_copies_parts_them(source: Path, tmp_path: Path) -> None:
    """A storage that comes from elsewhere lies between two that are written together, however small it is."""
    rules = ["s.{i} -> m.{i}", "odd.{i} -> m.{i}.odd | cast(f16)"]
    plan = cs.plan(source, cs.Recipe(rules, rest="drop"))
    plan.save(tmp_path / "out.pt", check=True)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in plan.state_dict().items())


def test_many_small_tensors_take_few_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cs.save({f"w.{i}": torch.full((16,), i, dtype=torch.int32) for i in range(5000)}, tmp_path / "source.safetensors")
    sizes: list[int] = []
    pwrite = os.pwrite

    def counted(descriptor: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    cs.plan(tmp_path / "source.safetensors", "w.{i} -> v.{i}").save(tmp_path / "out.pt")
    assert len(sizes) < 20
    assert sum(sizes) <= 1.05 * (tmp_path / "out.pt").stat().st_size
