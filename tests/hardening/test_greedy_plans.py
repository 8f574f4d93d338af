"""Numbers in keys, headers, configs and pickles ask for as much as they like: they are answered at once, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile import safetensors_file

import ckptsurgery as cs
from ckptsurgery.language.toml import loads
from ckptsurgery.planning.flattening import FlatIndex
from ckptsurgery.running.provenance import PROVENANCE, read_provenance


def specs(**shapes: list[int]) -> dict[str, cs.TensorSpec]:
    return {key.replace("__", "."): cs.TensorSpec(shape, "F32") for key, shape in shapes.items()}


HALVES = cs.Recipe(["w [(h r) d] -> {h}.w [r d]"], dims={"h": "config.h"})


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("too-many-targets", lambda: cs.plan(specs(w=[10**9, 0]), "w [i d] -> x.{i} [d]")),
        ("too-many-targets", lambda: cs.plan(specs(w=[10**18, 0]), HALVES, config={"h": 10**18})),
        ("no-extent", lambda: cs.plan(specs(w=[0, 2]), HALVES, config={"h": 0})),
        ("missing-index", lambda: cs.plan(specs(x__0__w=[2], x__999999999__w=[2]), "x.{i}.w [d] -> w [i d]")),
        ("missing-index", lambda: cs.plan({f"x.{i}.{i}": cs.TensorSpec([2], "F32") for i in range(3000)},
                                          "x.{i}.{j} [d] -> w [i j d]")),
        ("bad-toml", lambda: loads("[dims]\na = 0x" + "f" * 5000)),
        ("bad-toml", lambda: loads("schema = 0x" + "f" * 5000)),
        ("unknown-key", lambda: loads("\n".join(f"k{i} = 1" for i in range(5000)))),
    ],
)  # fmt: skip
def test_what_asks_for_a_billion_is_refused_in_a_few_words(code: str, make: Callable[[], object]) -> None:
    with pytest.raises(cs.CkptSurgeryError) as caught:
        make()
    assert {diagnostic.code for diagnostic in caught.value.diagnostics} == {code}
    assert len(str(caught.value)) < 50_000


def test_a_flat_index_of_any_size_is_counted_at_once() -> None:
    flat = FlatIndex(("s", "b"), (None, 3))
    assert flat.split(10**18 + 1) == (333_333_333_333_333_333, 2)
    assert flat.join((10**17, 2)) == 3 * 10**17 + 2
    assert FlatIndex(("s", "b"), (10**15, 2)).count == 2 * 10**15
    assert FlatIndex(("s", "b"), (4, 2)).split(8) is None


@pytest.mark.parametrize("text", [r"a -> \ b", r"a -> b\ ", r"{p:\ a,b\ } -> \ {p}\ ", "a -> \\\nb", r"? \  -> \  [x]"])
def test_outermost_spaces_that_are_escaped_stay(text: str) -> None:
    rule = cs.Rule.parse(text)
    assert cs.Rule.parse(str(rule)) == rule


def test_a_graph_of_shared_lists_is_diagnosed_at_once(tmp_path: Path) -> None:
    whole: list[object] = [None]
    for _ in range(8):
        whole = [whole] * 1000
    torch.save({"w": torch.ones(2), "extra": whole}, tmp_path / "x.pt")
    assert json.dumps(cs.doctor(tmp_path / "x.pt", progress=False).to_json())


def test_names_of_what_is_left_out_are_bounded(tmp_path: Path) -> None:
    """Sets of tuples cannot be written: a hundred of them, below a key of a million characters."""
    torch.save({"m": {"a.w": torch.ones(2)}, "k" * 1_000_000: [{(1, 2)} for _ in range(100)]}, tmp_path / "x.pt")
    report = cs.plan(tmp_path / "x.pt", "a.w -> b").save(tmp_path / "y.pt", progress=False)
    assert len(str(report)) < 20_000_000
    assert list(cs.open(tmp_path / "y.pt")) == ["b"]


@pytest.mark.parametrize("headers", [{"v": ["F32", 1 << 70]}, {"v": ["F32", *[1] * 1000]}, {"v": [["F32"]]}, [], 3])
def test_provenance_that_makes_no_sense_is_told(headers: object, tmp_path: Path) -> None:
    told = {"recipe": "rules = ['v -> w']", "headers": headers, "target": None, "config": None, "dims": {}}
    text = json.dumps(told | {"dtype": "lossless"})
    row = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    path = safetensors_file(tmp_path / "x.safetensors", {"__metadata__": {PROVENANCE: text}, "w": row}, b"x")
    with cs.open(path) as checkpoint, pytest.raises(cs.CheckpointError, match="bad-provenance"):
        read_provenance(checkpoint)
