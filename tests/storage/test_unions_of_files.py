"""Files that are one checkpoint together give all that each of them holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ckptsurgery as cs
from ckptsurgery.errors import CheckpointError
from ckptsurgery.storage import open_checkpoint


def part(n: int, number: int) -> str:
    return f"model-{n + 1:05d}-of-{number:05d}.safetensors"


def parts(folder: Path, number: int) -> None:
    for n in range(number):
        tensors = {f"{n}.base.weight": torch.full((3,), float(n)), f"{n}.other.weight": torch.full((2,), -float(n))}
        metadata = {f"{n}.tied.weight": f"{n}.base.weight", f"word {n}": "a word"}
        save_file(tensors, folder / part(n, number), metadata)


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_a_folder_of_numbered_files_without_an_index_is_the_union_of_them(number: int, tmp_path: Path) -> None:
    parts(tmp_path, number)
    with open_checkpoint(tmp_path) as checkpoint:
        names = [f"{n}.{m}.weight" for n in range(number) for m in ("base", "other", "tied")]
        assert sorted(checkpoint) == sorted(names)
        assert checkpoint.aliases == {f"{n}.tied.weight": f"{n}.base.weight" for n in range(number)}
        assert {f"word {n}" for n in range(number)} <= checkpoint.metadata.keys()
        assert sorted(checkpoint.files) == sorted(str(tmp_path / part(n, number)) for n in range(number))
        for n in range(number):
            assert (
                checkpoint.load(f"{n}.tied.weight").tolist() == checkpoint.load(f"{n}.base.weight").tolist() == [n] * 3
            )
            assert checkpoint.load(f"{n}.other.weight").tolist() == [-n] * 2


@pytest.mark.parametrize("both", [1, 2, 3, 9])
def test_all_keys_that_two_files_hold_are_counted(both: int, tmp_path: Path) -> None:
    for number in range(2):
        save_file({f"k{n}": torch.zeros(1) for n in range(both)}, tmp_path / part(number, 2))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    (problem,) = caught.value.diagnostics
    assert problem.code == "duplicate-key"
    assert problem.place == str(tmp_path)
    assert ("'k0'" in problem.headline) and (f"{both - 1} more" in problem.headline) is (both > 1)
    rest = [f"k{n}" for n in range(1, both)]
    assert list(problem.notes) == (rest if len(rest) <= 6 else [*rest[:6], f"and {len(rest) - 6} more"])


def test_many_tensors_of_a_file_that_are_held_at_once_are_each_right(tmp_path: Path) -> None:
    # more than one page each, and more of them than get a mapping of their own
    state = {f"t{n:03}": torch.full((2000,), float(n)) for n in range(300)}
    save_file(state, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        keys = sorted(checkpoint, key=lambda key: int(key[1:]) * 7 % 300)
        held = {key: checkpoint.load(key) for key in [*keys, *keys[:9]]}
        again = {key: checkpoint.load(key) for key in keys}
    for made in (held, again):
        assert all(torch.equal(made[key], state[key]) for key in state)


@pytest.mark.parametrize("subtree", ["model", "nest.model"])
def test_what_lies_beside_the_tensors_stays_whole(subtree: str, tmp_path: Path) -> None:
    """Also where the same object stands there twice."""
    model = {"w": torch.ones(2)}
    tree: dict[str, object] = {"model": model, "same": model, "step": 3, "names": ["a"]}
    if "." in subtree:
        tree = {"nest": tree, "outer": model, "epoch": 4}
    torch.save(tree, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt", subtree=subtree) as checkpoint:
        assert list(checkpoint) == ["w"]
        before = subtree.removesuffix("model")
        beside = {f"{before}{name}" for name in ("same", "step", "names")} | ({"outer", "epoch"} if before else set())
        assert {*checkpoint.extras} == beside


@pytest.mark.parametrize("per_shard", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
def test_the_order_of_the_keys_is_kept_through_shards(order: str, per_shard: int, tmp_path: Path) -> None:
    state = {key: torch.full((4,), float(ord(key))) for key in order}
    cs.save(state, tmp_path / "out", max_shard_size=16 * per_shard)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert "".join(checkpoint) == order
        assert all(torch.equal(checkpoint.load(key), state[key]) for key in order)
