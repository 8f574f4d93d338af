"""A save that is checked reads back what it wrote, not what lay there before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs

SHAPES = {f"l.{n}.w": (4, 6) for n in range(5)}


def state(sign: float) -> dict[str, torch.Tensor]:
    return {key: sign * torch.arange(24.0).reshape(shape) for key, shape in SHAPES.items()}


@pytest.mark.parametrize("rule", ["l.{i}.w -> m.{i}.w", "l.{i}.w [a b] -> m.{i}.w [b a]"])
@pytest.mark.parametrize(("name", "limit"), [("x.safetensors", None), ("x.pt", None), ("one", None), ("shards", 100)])
@pytest.mark.parametrize("before", [None, 100, 1000])
def test_a_checked_save_over_another_checkpoint_is_the_new_one(
    before: int | None, name: str, limit: int | None, rule: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if before is not None:
        old = {key.replace("l.", "m."): value for key, value in state(-1).items()}
        cs.save(old, path, max_shard_size=None if path.suffix else before)
    report = cs.plan(state(1), rule).save(path, max_shard_size=limit, overwrite=True, check=True)
    assert sum(proof.tensors for proof in report.proofs) == len(SHAPES)
    with cs.open(path) as checkpoint:
        for key, value in state(1).items():
            made = checkpoint.load(key.replace("l.", "m."))
            assert torch.equal(made, value.T if "[b a]" in rule else value)
