"""Recipes inferred from values: every conversion of the corpus, exactly, with random weights."""

from __future__ import annotations

import sys
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.checkpoint import Checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
from conversions import PAIRS, pair, recipe_for

Tensors = dict[str, torch.Tensor]


def weights(specs: dict[str, cs.TensorSpec], generator: torch.Generator) -> Tensors:
    """Random numbers in every tensor."""
    return {
        k: torch.randn(s.shape, generator=generator)
        if s.dtype == "F32"
        else torch.randint(0, 2**40, s.shape, generator=generator)
        for k, s in specs.items()
    }


@pytest.mark.parametrize("name", PAIRS)
def test_every_conversion_is_found_whole(name: str) -> None:
    case, generator = pair(name), torch.Generator().manual_seed(0)
    source = weights(case.source, generator)
    for first, *others in case.tied_source:
        source.update(dict.fromkeys(others, source[first]))
    wanted = cs.plan(source, recipe_for(name), config=case.config).state_dict()
    found = cs.suggest(source, {**weights(case.target, generator), **wanted}, by="values")
    made = cs.plan(source, found.recipe).state_dict()
    assert [k for k in wanted if k not in made or not torch.equal(made[k], wanted[k])] == []
    assert set(found.unmatched_target) == case.unmatched_target


def test_rows_in_another_order_are_read_off_a_coarse_dtype_where_values_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    source = {"q.weight": torch.randn(32, 64, generator=generator), "q.bias": torch.randn(32, generator=generator)}
    target = {
        k: v.reshape(4, 4, 2, *v.shape[1:]).transpose(1, 2).reshape(v.shape).to(torch.bfloat16)
        for k, v in source.items()
    }
    found = cs.suggest(source, target, by="values")
    made = cs.plan(source, found.recipe).state_dict()
    assert all(torch.equal(made[k].to(torch.bfloat16), target[k]) for k in target)
    assert [a.kind for a in found.assumptions] == ["cast"]


def test_a_square_matrix_that_was_turned_is_seen() -> None:
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    found = cs.suggest({"a.weight": weight}, {"b.weight": weight.T.contiguous()}, by="values")
    assert [str(r) for r in found.recipe.rules] == ["a.weight [a b] -> b.weight [b a]"]


def test_names_that_say_nothing_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    source = {f"layer{i}": torch.randn(8, 8, generator=generator) for i in range(6)}
    target = {f"t{5 - i}": v for i, v in enumerate(source.values())}
    found = cs.suggest(source, target, by="values")
    made = cs.plan(source, found.recipe).state_dict()
    assert all(torch.equal(made[k], target[k]) for k in target)


def test_values_that_differ_match_nothing() -> None:
    found = cs.suggest({"w": torch.zeros(4)}, {"w": torch.ones(4)}, by="values")
    assert found.coverage == 0.0
    assert found.unmatched_source == found.unmatched_target == ("w",)


def test_what_is_held_does_not_grow_with_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names say nothing here, so that every tensor is looked for by its values: alone, turned, and interleaved."""
    generator = torch.Generator().manual_seed(0)

    def sides(count: int) -> tuple[Path, Path]:
        source, target = {}, {}
        for n in range(count):
            parts = [torch.randn(256, 128, generator=generator) for _ in range(4)]
            source |= {f"s{n}{name}": part for name, part in zip("abcd", parts)}
            target[f"t{count - n}x"] = torch.stack(parts[:2], dim=1).reshape(512, 128)
            target |= {f"t{count - n}y": parts[2].t().contiguous(), f"t{count - n}z": parts[3].clone()}
        paths = tmp_path / f"s{count}.safetensors", tmp_path / f"t{count}.safetensors"
        cs.save(source, paths[0])
        cs.save(target, paths[1])
        return paths

    held = [0, 0]
    load = Checkpoint.load

    def watched(self: Checkpoint, key: str) -> torch.Tensor:
        tensor = load(self, key)
        size = tensor.untyped_storage().nbytes()
        held[0] += size
        held[1] = max(held)
        weakref.finalize(tensor, lambda: held.__setitem__(0, held[0] - size))
        return tensor

    monkeypatch.setattr(Checkpoint, "load", watched)
    cs.suggest(*sides(1), by="values")  # what is imported is traced too
    peaks = []
    for count in (4, 24):
        source, target = sides(count)
        held[:] = 0, 0
        tracemalloc.start()
        found = cs.suggest(source, target, by="values")
        peaks.append((held[1], tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
        assert found.coverage == 1.0, str(found)
    assert peaks[0][0] == peaks[1][0] <= 8 * 256 * 128 * 4
    # Arrays are traced too: beside keys, rules and probes, no more for six times as much data.
    assert peaks[1][1] - peaks[0][1] < (24 - 4) * 4 * 256 * 128 * 4 / 2
