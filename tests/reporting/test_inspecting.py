from __future__ import annotations

import json
import os

import pytest

from ckptsurgery.errors import CheckpointError
from ckptsurgery.reporting.inspecting import inspection
from ckptsurgery.specs import TensorSpec
from ckptsurgery.storage import Checkpoint
from ckptsurgery.storage.contents import Contents, Entry


def checkpoint() -> Checkpoint:
    """Two layers, an embedding tied to the head, and what a trainer leaves beside them."""
    specs = {"embed.weight": TensorSpec([10, 4], "BF16")}
    for i in range(2):
        specs[f"h.{i}.fc.weight"] = TensorSpec([4, 4], "BF16")
        specs[f"h.{i}.fc.bias"] = TensorSpec([4], "F32")
    entries, offset = {}, 0
    for key, spec in specs.items():
        entries[key] = Entry(spec, os.devnull, offset)
        offset += spec.nbytes
    entries["head.weight"] = entries["embed.weight"]
    extras = {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, "args": object()}
    return Checkpoint(Contents(entries, {}, {"format": "pt"}, extras, {"width": 4, "sizes": [1, 2]}), "m.bin")


TEXT = """\
m.bin

embed.weight       BF16 [10, 4]      80 B
h.{0,1}.fc.weight  BF16 [4, 4]   x2  64 B
h.{0,1}.fc.bias    F32 [4]       x2  32 B
head.weight        BF16 [10, 4]      80 B

tensors   6 tensors (5 distinct), 80 numbers, 176 B
dtypes    BF16: 3 tensors, 72 numbers, 144 B
          F32: 2 tensors, 8 numbers, 32 B
ties      embed.weight = head.weight  (storage)
extras    epoch: 3
          optimizer: dict of 2
          args: object
metadata  format: pt
config    2 entries (width: 4)"""


def test_keys_fold_and_everything_that_is_no_tensor_is_listed() -> None:
    assert str(inspection(checkpoint())) == TEXT


def test_unfolded_gives_each_key_a_line() -> None:
    text = inspection(checkpoint()).render(fold=False)
    assert [line.split()[0] for line in text.splitlines()[2:8]] == list(checkpoint())


def test_a_tree_carries_totals() -> None:
    assert inspection(checkpoint()).render(as_tree=True).splitlines()[2:7] == [
        "embed.weight      BF16 [10, 4]  80 B  ███▏",
        "h.{0,1}.fc    x4  40 numbers    96 B  ███▊",
        "├ weight      x2  BF16 [4, 4]   64 B  ██▌",
        "└ bias        x2  F32 [4]       32 B  █▎",
        "head.weight       BF16 [10, 4]  80 B  ███▏",
    ]


def test_a_tree_is_cut_at_its_depth() -> None:
    whole, cut = (inspection(checkpoint()).render(depth=depth).splitlines()[2:] for depth in (9, 1))
    assert [line.split()[0] for line in cut[:3]] == ["embed.weight", "h.{0,1}.fc", "head.weight"] and cut[3] == ""
    assert whole[:5] == inspection(checkpoint()).render(as_tree=True).splitlines()[2:7]


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("h.0", ["h.0.fc.weight", "h.0.fc.bias"]),
        ("h.{i}.fc.bias", ["h.0.fc.bias", "h.1.fc.bias"]),
        ("{m}.weight", ["embed.weight", "head.weight"]),
        ("{rest...}.bias", ["h.0.fc.bias", "h.1.fc.bias"]),
        ("head.weight", ["head.weight"]),
    ],
)
def test_a_filter_is_a_key_pattern_or_a_module_path(pattern: str, keys: list[str]) -> None:
    assert list(inspection(checkpoint(), pattern).specs) == keys


def test_a_filter_that_matches_nothing_is_an_error_with_samples() -> None:
    with pytest.raises(CheckpointError) as caught:
        inspection(checkpoint(), "layers.{i}")
    assert caught.value.diagnostics[0].code == "no-such-keys"
    assert "h.{0,1}.fc.weight" in caught.value.diagnostics[0].notes


def test_a_tie_with_a_filtered_name_is_not_shown() -> None:
    assert inspection(checkpoint(), "head.weight").ties == ()


def test_of_a_tie_the_filtered_names_are_shown_where_they_are_several() -> None:
    entry = Entry(TensorSpec([4], "F32"), os.devnull)
    tied = Checkpoint(Contents({"a.w": entry, "a.v": entry, "b.w": entry}), "m.bin")
    text = str(inspection(tied, "a"))
    assert "\ntensors   2 tensors (1 distinct), 4 numbers, 16 B\n" in text
    assert "\nties      a.w = a.v  (storage)" in text


def test_one_is_not_many_and_thousands_stand_apart() -> None:
    spec = TensorSpec([], "F32")
    assert "1 tensor, 1 number, 4 B" in str(inspection(Checkpoint(Contents({"w": Entry(spec, os.devnull)}), "one")))
    entries = {f"w.{i}": Entry(spec, os.devnull, 4 * i) for i in range(1234)}
    assert "F32: 1,234 tensors, 1.2 k numbers, 4.9 kB" in str(inspection(Checkpoint(Contents(entries), "many")))


def test_json_holds_every_tensor_and_is_plain() -> None:
    data = json.loads(json.dumps(inspection(checkpoint()).to_json()))
    assert data["tensors"]["h.1.fc.bias"] == {"dtype": "F32", "shape": [4], "nbytes": 16}
    assert (data["parameters"], data["nbytes"]) == (80, 176)
    assert data["ties"] == [{"names": ["embed.weight", "head.weight"], "kind": "storage"}]
    assert data["extras"] == {"epoch": 3, "optimizer": "dict of 2", "args": "object"}


def test_a_checkpoint_without_tensors_is_shown_as_such() -> None:
    assert "0 tensors, 0 numbers, 0 B" in str(inspection(Checkpoint(Contents({}), "empty")))


@pytest.mark.parametrize("width", [1, 20, 40, 200])
def test_no_width_cuts_a_key(width: int) -> None:
    for as_tree in (False, True):
        text = inspection(checkpoint()).render(width, as_tree=as_tree)
        assert "embed.weight" in text
