"""Parts without elements: an empty half of a split, no repetitions, a stage without blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs

W = torch.arange(60.0).reshape(20, 3)
EMPTY = torch.empty(0, 3)

CASES: dict[str, tuple[str, dict[str, object], dict[str, torch.Tensor]]] = {
    "first": ("w [(p r:p) d] -> {p:a,b} [r:p d]", {"r": {"a": 0, "b": 20}}, {"a": EMPTY, "b": W}),
    "last": ("w [(p r:p) d] -> {p:a,b} [r:p d]", {"r": {"a": 20, "b": 0}}, {"a": W, "b": EMPTY}),
    "turned": ("w [(p r:p) d] -> {p:a,b} [d r:p]", {"r": {"a": 0, "b": 20}}, {"a": EMPTY.T, "b": W.T}),
    "computed": ("w [(p r:p) d] -> {p:a,b} [r:p d] | add(1)", {"r": {"a": 0, "b": 20}}, {"a": EMPTY, "b": W + 1}),
    "repeated": ("w [r d] -> w [n r d] | repeat_over(n)", {"n": 0}, {"w": torch.empty(0, 20, 3)}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stored", ["in memory", "in memory, turned", "in a file"])
@pytest.mark.parametrize("output", ["out.safetensors", "out.pt", None])
def test_parts_without_elements(name: str, stored: str, output: str | None, tmp_path: Path) -> None:
    rule, dims, wanted = CASES[name]
    source: object = {"w": W.T.contiguous().T if "turned" in stored else W}
    if stored == "in a file":
        cs.save({"w": W}, tmp_path / "w.safetensors")
        source = tmp_path / "w.safetensors"
    plan = cs.plan(source, cs.Recipe([rule], dims=dims))  # type: ignore[arg-type]
    made = plan.state_dict()
    if output is not None:
        plan.save(tmp_path / output)
        made = cs.open(tmp_path / output).state_dict()
    assert list(made) == list(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(made[key], tensor.contiguous(), rtol=0, atol=0)


def test_a_stage_without_blocks_is_passed_over() -> None:
    source = {f"b.{i}.w": torch.full((2,), float(i)) for i in range(5)}
    plan = cs.plan(source, cs.Recipe(["b.{(s t)}.w -> s.{s}.{t}.w"], dims={"t": [2, 0, 3]}))
    made = plan.state_dict()
    assert [(key, tensor[0].item()) for key, tensor in made.items()] == [
        ("s.0.0.w", 0), ("s.0.1.w", 1), ("s.2.0.w", 2), ("s.2.1.w", 3), ("s.2.2.w", 4)
    ]  # fmt: skip
    back = plan.inverse(made).state_dict()
    assert back.keys() == source.keys() and all(torch.equal(back[key], source[key]) for key in source)
