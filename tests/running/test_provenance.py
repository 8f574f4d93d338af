"""An output can say what it was made from, and goes back by that alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs

KEY = "ckptsurgery.provenance"
RULES = ["h.{i}.{p:q,k}.w [rows:p d] -> l.{i}.qk [(p rows:p) d]", "wte [v d] -> embed [d v]"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shapes = {"wte": (6, 4), "h.0.q.w": (8, 4), "h.0.k.w": (2, 4), "h.1.q.w": (8, 4), "h.1.k.w": (2, 4)}
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    cs.save(state, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


@pytest.mark.parametrize(
    ("out", "options"), [("o.safetensors", {}), ("o", {"max_shard_size": 150}), ("o.pt", {}), ("o", {"resume": True})]
)
def test_an_output_goes_back_by_its_provenance_alone(source: Path, out: str, options: dict[str, Any]) -> None:
    before = source.read_bytes()
    made = cs.plan(source, RULES).save(source.parent / out, provenance=True, **options)
    told = json.loads(cs.open(source.parent / out).metadata[KEY])
    assert told["sources"] == [
        {"file": "s.safetensors", "nbytes": len(before), "blake2b": hashlib.blake2b(before, digest_size=32).hexdigest()}
    ]
    assert (told["version"], "rows:p" in told["recipe"]) == (cs.__version__, True)
    assert sum(KEY.encode() in Path(file).read_bytes() for file in made.files) == 1
    source.unlink()
    back = cs.plan_back(source.parent / out)
    back.save(source.parent / "back.safetensors", check=True)
    assert (source.parent / "back.safetensors").read_bytes() == before


def test_target_config_dims_and_dtype_are_part_of_it(source: Path) -> None:
    target = {
        "embed": cs.TensorSpec([6, 4], "F32"),
        "r.0": cs.TensorSpec([2, 4], "F32"),
        "r.1": cs.TensorSpec([2, 4], "F32"),
    }
    rules = ["wte -> embed", "? h.{i}.k.w -> r.{i}"]
    small = cs.plan(source, cs.Recipe(rules, drop=["h.{i}.q.w"]), target=target, config={"a": 1}, dims={"n": 2})
    small.save(source.parent / "o.safetensors", provenance=True)
    with pytest.raises(cs.PlanError, match="dropped"):
        cs.plan_back(source.parent / "o.safetensors")
    with cs.open(source) as checkpoint:
        cast = cs.plan(checkpoint, "{k...} -> m.{k...}", dtype="f64")
        cast.save(source.parent / "wide.safetensors", provenance=True)
    told = json.loads(cs.open(source.parent / "wide.safetensors").metadata[KEY])
    assert told["dtype"] == "f64"


def test_ties_go_there_and_back(tmp_path: Path) -> None:
    w = torch.randn(3, 4)
    cs.save({"a": w, "b": w}, tmp_path / "s.safetensors")
    cs.plan(tmp_path / "s.safetensors", "{k} [x y] -> m.{k} [y x]").save(tmp_path / "o.safetensors", provenance=True)
    cs.plan_back(tmp_path / "o.safetensors").save(tmp_path / "back.safetensors")
    with cs.open(tmp_path / "back.safetensors") as checkpoint:
        assert [tie.names for tie in checkpoint.ties] == [("a", "b")]
        assert torch.equal(checkpoint.load("a"), w)


def test_provenance_of_a_source_is_not_that_of_its_copy(source: Path) -> None:
    cs.plan(source, RULES).save(source.parent / "o.safetensors", provenance=True)
    report = cs.plan(source.parent / "o.safetensors", "{k...} -> {k...}").save(source.parent / "p.safetensors")
    assert "provenance" in str(report)
    assert KEY not in cs.open(source.parent / "p.safetensors").metadata


@pytest.mark.parametrize("text", ["", "3", "{}", '{"recipe": "= =", "target": null, "headers": {}, "config": null}'])
def test_provenance_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors", metadata={KEY: text})
    with pytest.raises(cs.CkptSurgeryError):
        cs.plan_back(tmp_path / "x.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(cs.CheckpointError, match="no-provenance"):
        cs.plan_back(tmp_path / "y.safetensors")


def test_the_command_goes_back_without_a_recipe(source: Path) -> None:
    before, folder = source.read_bytes(), source.parent
    command = [sys.executable, "-m", "ckptsurgery", "convert"]
    there = [str(source), str(folder / "o"), *(word for rule in RULES for word in ("--rule", rule)), "--provenance"]
    subprocess.run([*command, *there], check=True, capture_output=True)
    source.unlink()
    subprocess.run([*command, str(folder / "o"), str(source), "--inverse", "--check"], check=True, capture_output=True)
    assert source.read_bytes() == before
