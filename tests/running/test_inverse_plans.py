"""The plan back: from what was written, with the keys and sizes of the way there; exact, or refused with reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe

SOURCE = {
    "emb": torch.randn(6, 4),
    "h.0.qkv": torch.randn(6, 4),
    "h.1.qkv": torch.randn(6, 4),
    "e.0.w": torch.randn(2, 3).bfloat16(),
    "e.1.w": torch.randn(2, 3).bfloat16(),
    "step": torch.tensor(7),
}
RULES = [
    "emb -> embed, head",
    "h.{i}.qkv [(p d) x] -> l.{i}.{p:q,k,v} [x d]",
    "e.{e}.w [f d] -> experts [e d f]",
    "step -> step",
]


def test_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    cs.save(SOURCE, tmp_path / "a.safetensors")
    plan = cs.plan(tmp_path / "a.safetensors", Recipe(RULES))
    plan.save(tmp_path / "b")
    back = plan.inverse(tmp_path / "b")
    back.save(tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert list(back.specs) == list(plan.source)


def test_the_way_back_from_the_way_back_is_the_way_there() -> None:
    plan = cs.plan(SOURCE, Recipe(RULES))
    made = plan.state_dict()
    there = plan.inverse(made).inverse(SOURCE).state_dict()
    assert all(torch.equal(there[key], made[key]) for key in made) and list(there) == list(made)


def test_copies_that_differ_are_found_before_they_are_merged() -> None:
    plan = cs.plan(SOURCE, Recipe(RULES))
    made = {key: t.clone() for key, t in plan.state_dict().items()}
    made["head"][0, 0] += 1
    with pytest.raises(cs.CkptSurgeryError, match="differs from source 0 in 1 of 24 elements"):
        plan.inverse(made).state_dict()


def test_what_was_changed_in_between_is_told() -> None:
    plan = cs.plan(SOURCE, Recipe(RULES))
    made = plan.state_dict()
    changed = {key: t for key, t in made.items() if key != "l.0.q"} | {
        "new": torch.ones(1),
        "experts": made["experts"].float(),
    }
    with pytest.raises(cs.PlanError) as caught:
        plan.inverse(changed)
    assert {d.code for d in caught.value.diagnostics} == {"missing-keys", "unexpected-keys", "shape-mismatch"}
    assert all(key in str(caught.value) for key in ("l.0.q", "new", "experts"))


def test_each_lossy_step_is_listed_once_a_rule() -> None:
    rules = [
        "h.{i}.qkv -> m.{i} | cast(bf16)",
        "emb -> emb | add(1)",
        "e.{e}.w [f d] -> w [f d] | mean_over(e)",
        "step -> step",
    ]
    plan = cs.plan(SOURCE, Recipe(rules))
    with pytest.raises(cs.PlanError) as caught:
        plan.inverse(plan.state_dict())
    assert [d.code for d in caught.value.diagnostics] == ["lossy-step"] * 3
    assert [d.notes[0] for d in caught.value.diagnostics] == [rules[1], rules[0], rules[2]]


def test_exact_casts_turn_back() -> None:
    plan = cs.plan({"w": SOURCE["e.0.w"]}, "w -> v | cast(f32)")
    assert torch.equal(plan.inverse(plan.state_dict()).state_dict()["w"], SOURCE["e.0.w"])


@pytest.mark.parametrize("op", ["mul(2)", "cast(f64)", "mul(-1) | mul(4)"])
def test_an_op_on_each_of_several_parts_turns_back(op: str) -> None:
    whole = torch.randn(12, 2)
    plan = cs.plan({"w": whole}, f"w [(p r) c] -> {{p:a,b,c,d}} [r c] | {op}")
    assert torch.equal(plan.inverse(plan.state_dict()).state_dict()["w"], whole)


def test_a_cast_that_the_target_asked_for_turns_back_where_no_bit_was_lost() -> None:
    plan = cs.plan({"w": SOURCE["e.0.w"]}, "w -> v", {"v": cs.TensorSpec([2, 3], "F32")})
    assert torch.equal(plan.inverse(plan.state_dict()).state_dict()["w"], SOURCE["e.0.w"])


def test_ties_and_initialised_keys_do_not_stand_in_the_way() -> None:
    target = {key: cs.TensorSpec([6, 4], "F32") for key in ("embed", "head", "new")}
    plan = cs.plan(
        {"emb": SOURCE["emb"]}, Recipe(["emb -> embed"], tie={"head": "embed"}, init={"new": "zeros"}), target
    )
    made = {"embed": SOURCE["emb"], "head": SOURCE["emb"], "new": torch.zeros(6, 4)}
    assert torch.equal(plan.inverse(made).state_dict()["emb"], SOURCE["emb"])
    with pytest.raises(cs.CkptSurgeryError):
        plan.inverse({**made, "head": SOURCE["emb"] + 1}).state_dict()
