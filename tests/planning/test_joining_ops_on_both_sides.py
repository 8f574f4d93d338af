"""An op that takes or gives several tensors meets captures that gather and scatter: each group has its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs

PARTS = ["q", "k", "v"]


def parts(rows: int = 4) -> dict[str, torch.Tensor]:
    made = {}
    for n, p in enumerate(PARTS, 1):
        direction = torch.arange(1.0, rows * 3 + 1).reshape(rows, 3) * n
        made |= {f"{i}.{p}.v": direction + i for i in range(2)}
        made |= {f"{i}.{p}.g": torch.full((rows, 1), float(n + i)) for i in range(2)}
    return made


def folded(state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    v = state[f"{key}.v"]
    return state[f"{key}.g"] * v / v.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("cast", ["", " | cast(f64)"])
@pytest.mark.parametrize("axes", ["(p d)", "(d p)"])
def test_pairs_are_joined_part_by_part_and_then_gathered(axes: str, cast: str) -> None:
    state = parts()
    rule = f"{{i}}.{{p:q,k,v}}.g, {{i}}.{{p:q,k,v}}.v [d c] | fold_weight_norm(0){cast} -> {{i}}.w [{axes} c]"
    made = cs.plan(state, rule.replace(".g,", ".g [d c],")).state_dict()
    assert list(made) == ["0.w", "1.w"]
    for i in range(2):
        each = [folded(state, f"{i}.{p}") for p in PARTS]
        wanted = torch.cat(each) if axes == "(p d)" else torch.stack(each, 1).flatten(0, 1)
        torch.testing.assert_close(made[f"{i}.w"], wanted.to(torch.float64 if cast else torch.float32))


def test_a_fused_tensor_is_scattered_and_then_taken_apart_part_by_part() -> None:
    fused = {f"{i}.w": torch.arange(1.0, 37).reshape(12, 3) + i for i in range(2)}
    rule = "{i}.w [(p d) c] -> {i}.{p:q,k,v}.g [d c], {i}.{p:q,k,v}.v [d c] | unfold_weight_norm(0)"
    made = cs.plan(fused, rule).state_dict()
    assert made.keys() == {f"{i}.{p}.{m}" for i in range(2) for p in PARTS for m in "gv"}
    for i in range(2):
        for n, p in enumerate(PARTS):
            rows = fused[f"{i}.w"][4 * n : 4 * n + 4]
            assert torch.equal(made[f"{i}.{p}.v"], rows)
            torch.testing.assert_close(made[f"{i}.{p}.g"], rows.norm(dim=1, keepdim=True))
    back = cs.plan(made, cs.Recipe([rule]).inverse()).state_dict()
    assert all(torch.allclose(back[key], fused[key]) for key in fused)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_that_are_read_to_prove_equality_are_counted(tied: bool, tmp_path: Path) -> None:
    """Names that are one tensor of the file need not be read."""
    one = torch.ones(100)
    cs.save({"x": one, "y": one if tied else one.clone(), "z": torch.ones(7)}, tmp_path / "x.safetensors")
    recipe = cs.Recipe(["a -> x", "c -> z"], tie={"y": "x"}).inverse()
    plan = cs.plan(tmp_path / "x.safetensors", recipe)
    report = plan.save(tmp_path / "y.safetensors")
    assert (report.bytes_read, report.bytes_written) == (428 if tied else 1228, 428)
    if not tied:
        assert plan.cost.bytes_read == 1228
