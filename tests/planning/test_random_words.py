"""Recipes made up at random of `&`, `+`, `take`, `insert_rows` and `drop_rows`, held against torch."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.language.toml import loads


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    rows, columns, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    partners = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    return {
        "shape": (rows, columns),
        "partners": partners,
        "shift": draw(st.integers(0, 3)),
        "ids": draw(st.lists(st.integers(0, columns - 1), min_size=1, max_size=6)),
        "order": draw(st.permutations(range(rows))),
        "new": sorted(draw(st.sets(st.integers(0, rows), min_size=1, max_size=2)) & set(range(rows + 1))),
        "by_name": draw(st.booleans()),
    }


def state_of(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(case["ids"]))
    state = {}
    for i, has in enumerate(case["partners"]):
        state[f"l.{i}.w"] = torch.randn(case["shape"], generator=generator)
        if has:
            state[f"l.{i}.s"] = torch.randn(case["shape"], generator=generator)
    return state


def argument(case: dict[str, Any], name: str, dims: dict[str, Any]) -> str:
    """A list in the rule, or its name, with the list in dims."""
    if not case["by_name"]:
        return str(list(case[name]))
    dims[name] = list(case[name])
    return name


@given(cases())
def test_partners_copies_and_indices(case: dict[str, Any]) -> None:
    dims: dict[str, Any] = {}
    recipe = cs.Recipe(
        [
            "? l.{i}.w & l.{i}.s -> m.{i}.w | apply(2)",
            f"+ l.{{i}}.w [x y] -> m.{{i+{len(case['partners']) + case['shift']}}}.w [x y] "
            f"| take(y, {argument(case, 'ids', dims)}) | take(x, {argument(case, 'order', dims)})",
            f"+ l.{{i}}.w -> n.{{i}}.w | insert_rows({argument(case, 'new', dims)}, value=3) "
            f"| drop_rows({argument(case, 'new', dims)})",
        ],
        dims=dims,
        rest="l.{i}.w -> m.{i}.w",
    )
    assert loads(recipe.dumps()) == recipe
    state, count = state_of(case), len(case["partners"])
    made = cs.plan(state, recipe).state_dict()
    assert len(made) == 3 * count
    for i, has in enumerate(case["partners"]):
        w = state[f"l.{i}.w"]
        assert torch.equal(made[f"m.{i}.w"], w + 2 * state[f"l.{i}.s"] if has else w)
        taken = w[:, case["ids"]][list(case["order"])]
        assert torch.equal(made[f"m.{i + count + case['shift']}.w"], taken)
        assert torch.equal(made[f"n.{i}.w"], w)


@given(cases())
def test_a_permutation_beside_a_copy_is_undone(case: dict[str, Any]) -> None:
    dims: dict[str, Any] = {}
    order = argument(case, "order", dims)
    recipe = cs.Recipe(["l.{i}.w -> m.{i}.w", f"+ l.{{i}}.w [x y] -> n.{{i}}.w [x y] | take(x, {order})"], dims=dims)
    state = {key: tensor for key, tensor in state_of(case).items() if key.endswith("w")}
    plan = cs.plan(state, recipe)
    back = plan.inverse(plan.state_dict()).state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[key], tensor) for key, tensor in state.items())
    again = cs.plan(plan.state_dict(), recipe.inverse()).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
