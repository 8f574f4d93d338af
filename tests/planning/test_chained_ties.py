from __future__ import annotations

import pytest
import torch

import ckptsurgery as cs

TIED = cs.Recipe(["a -> b"], tie={"c": "b"})
SOURCE = {"a": torch.arange(3.0)}


@pytest.mark.parametrize(
    ("second", "tied"),
    [
        (cs.Recipe(rest="keep"), ("b", "c")),
        (cs.Recipe(rest="{k...} -> m.{k...}"), ("m.b", "m.c")),
        (cs.Recipe(["{x:b,c} -> m.{x} | mul(2)"]), ("m.b", "m.c")),
        (cs.Recipe(["b -> x", "c -> y"]), ("x", "y")),
    ],
)
def test_names_that_a_stage_ties_stay_tied_where_the_next_treats_them_alike(
    second: cs.Recipe, tied: tuple[str, str]
) -> None:
    for recipe in (TIED.then(second), TIED.then(second).then(cs.Recipe(rest="keep"))):
        plan = cs.plan(SOURCE, recipe)
        made = plan.state_dict()
        assert set(made) == set(plan.keys) == set(tied)
        assert made[tied[0]] is made[tied[1]]


def test_names_that_the_next_stage_treats_differently_are_tied_no_more() -> None:
    made = cs.plan(SOURCE, TIED.then(cs.Recipe(["b -> b | mul(2)", "c -> c"]))).state_dict()
    assert made["b"].tolist() == [0, 2, 4]
    assert made["c"].tolist() == [0, 1, 2]


def test_a_tied_name_may_be_gathered_with_others() -> None:
    made = cs.plan(SOURCE, TIED.then(cs.Recipe(["{k:b,c} [n] -> both [k n]"]))).state_dict()
    assert made["both"].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_a_tie_to_nothing_is_an_error_in_any_stage() -> None:
    with pytest.raises(cs.PlanError, match="unused-tie"):
        cs.plan(SOURCE, cs.Recipe(["a -> b"], tie={"c": "x"}).then(cs.Recipe(rest="keep")))


def test_an_init_before_the_last_stage_is_an_error() -> None:
    with pytest.raises(cs.PlanError, match="init-in-stage"):
        cs.plan(SOURCE, cs.Recipe(["a -> b"], init={"c": "zeros"}).then(cs.Recipe(rest="keep")))


def test_a_dtype_casts_floats_alone_and_says_so() -> None:
    source = {"w": torch.ones(2, 2), "h": torch.ones(2, dtype=torch.float16), "ids": torch.arange(2)}
    plan = cs.plan(source, cs.Recipe(rest="keep"), dtype="bf16")
    made = plan.state_dict()
    assert {k: t.dtype for k, t in made.items()} == {"w": torch.bfloat16, "h": torch.bfloat16, "ids": torch.int64}
    assert dict(plan.casts) == {"w": ("F32", "BF16"), "h": ("F16", "BF16")}


def test_a_dtype_goes_before_the_target_s() -> None:
    source = {"w": torch.ones(2)}
    plan = cs.plan(source, cs.Recipe(rest="keep"), target={"w": cs.TensorSpec([2], "F32")}, dtype="bf16")
    assert plan.specs["w"].dtype == "BF16"


@pytest.mark.parametrize("dtype", ["bf61", "int64", "Lossless"])
def test_what_is_no_float_is_no_dtype_to_cast_to(dtype: str) -> None:
    with pytest.raises(cs.PlanError, match="bad-argument"):
        cs.plan({"w": torch.ones(2)}, cs.Recipe(rest="keep"), dtype=dtype)
