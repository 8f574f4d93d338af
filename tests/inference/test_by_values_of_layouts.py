"""By values: layouts that only values tell apart, coarse dtypes, tensors that were tuned, tensors of one value."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ckptsurgery as cs

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from score_values import Case, drawn, every_pair, score

Tensors = dict[str, Tensor]


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotary(x: Tensor, heads: int) -> Tensor:
    return x.view(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape).contiguous()


# Seeds that between them have grouped and ragged kernels, rotary rows, stacked experts in as many layers, regrouped and
# swapped blocks, coarse dtypes, tuned tensors and tensors of one value.
@pytest.mark.parametrize("seed", [3, 7, 17, 32, 37, 57])
def test_what_is_moved_comes_from_where_it_should_and_tuned_tensors_are_listed(seed: int) -> None:
    case = drawn(seed)
    found = score(case)
    assert not found.fails
    assert (found.wrong, found.open, found.unlisted) == ([], [], [])
    if case.tuned:
        assert found.rules <= 2 * score(drawn(seed, tune=False)).rules


def cut_twice(case: Case) -> bool:
    """Whether a stack of two parts in front is to be cut into experts, and these into parts: no view cuts twice."""
    feeds = [layout.feed for layout in case.layouts]
    stacked = [layout.stacked and bool(case.net.experts) for layout in case.layouts]
    return set(feeds) == {"leading", "up gate"} and stacked[feeds.index("leading")]


@pytest.mark.parametrize("first", range(4))
def test_every_layout_goes_to_every_other(first: int) -> None:
    for case in [c for c in every_pair() if not cut_twice(c)][first * 20 :: 80]:
        found = score(case)
        assert (found.wrong, found.open, found.fails) == ([], [], ""), case.label


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_as_many_experts_as_layers_and_one_of_them_tuned(layers: int) -> None:
    names = ("w1", "w3")
    source = {
        f"h.{i}.e.{e}.{n}": tensor(100 * i + 10 * e + p, 6, 4)
        for i in range(layers) for e in range(layers) for p, n in enumerate(names)
    }  # fmt: skip
    target = {
        f"b.{i}.up": torch.stack([torch.cat([source[f"h.{i}.e.{e}.{n}"] for n in names]) for e in range(layers)])
        for i in range(layers)
    }
    target["b.1.up"] = target["b.1.up"] + 0.01
    found = cs.suggest(source, target, by="values")
    assert len(found.recipe.rules) == 1
    assert [a.keys for a in found.assumptions if a.kind == "values"] == [("b.1.up",)]
    made = cs.plan(source, found.recipe).state_dict()
    assert all(torch.allclose(made[k], t, atol=0.02) for k, t in target.items())


def test_a_coarse_dtype_hides_neither_blocks_nor_groups_nor_rotary_rows() -> None:
    parts = {n: tensor(k, 16 if n == "q" else 8, 40) for k, n in enumerate("qkv")}
    turned = {n: rotary(t, 4 if n == "q" else 2) if n != "v" else t for n, t in parts.items()}
    rows = [t.view(2, -1, 40) for t in turned.values()]
    target = {"qkv": torch.cat(rows, 1).flatten(0, 1).to(torch.bfloat16)}
    found = cs.suggest(parts, target, by="values")
    assert torch.equal(cs.plan(parts, found.recipe).state_dict()["qkv"].to(torch.bfloat16), target["qkv"])


@pytest.mark.parametrize("order", [[3, 0, 4, 1, 2], [7, 2, 9, 0, 5, 4, 8, 1, 6, 3]])
def test_heads_in_another_order_are_blocks_or_stay_open_whatever_names_say(order: list[int]) -> None:
    rows = 4 * len(order)
    source = {f"l.{i}.{n}.weight": tensor(10 * i + k, rows, 5) for i in range(3) for k, n in enumerate("qkvo")}
    shuffled = {k: t.view(-1, 4, 5)[order].reshape(-1, 5) if ".q." in k else t for k, t in source.items()}
    target = {k: t + 0.001 * (k == "l.1.q.weight") for k, t in shuffled.items()}
    found = cs.suggest(source, target, by="values")
    made = cs.plan(source, found.recipe).state_dict()
    assert all(torch.equal(t, shuffled[k]) for k, t in made.items())
    lost = {f"l.{i}.q.weight" for i in range(3)} if len(order) > 8 else set()
    assert set(found.unmatched_target) == lost


def test_a_bias_moves_as_its_weight_does_though_it_is_zero() -> None:
    source = {f"l.{i}.{n}.weight": tensor(10 * i + k, 8, 5) for i in range(2) for k, n in enumerate("ab")}
    target = {k.replace(".a.", ".x.").replace(".b.", ".y."): rotary(t, 2) for k, t in source.items()}
    target = {k.replace("l.", "m."): target[k] for k in reversed(target)}
    for side in (source, target):
        side.update({k.replace("weight", "bias"): torch.zeros(8) for k in list(side)})
    found = cs.suggest(source, target, by="values")
    assert found.coverage == 1.0
    numbers = {k: torch.arange(t.numel()).reshape(t.shape) for k, t in source.items()}
    made = cs.plan(numbers, found.recipe).state_dict()
    assert all(torch.equal(made[k], rotary(torch.arange(8), 2)) for k in target if k.endswith("bias"))


def test_tensors_of_one_value_are_listed_where_names_decide_and_open_where_they_do_not() -> None:
    def side(layer: str, norms: tuple[str, str], weight: str) -> Tensors:
        return {
            **{f"{layer}.{i}.{n}.{weight}": torch.ones(6) for i in range(2) for n in norms},
            **{f"{layer}.{i}.mlp.{weight}": tensor(i, 6, 6) for i in range(2)},
        }

    told = cs.suggest(side("h", ("ln_1", "ln_2"), "weight"), side("b", ("norm1", "norm2"), "weight"), by="values")
    assert told.coverage == 1.0
    assert {k for a in told.assumptions if a.kind == "equal" for k in a.keys} == {
        f"b.{i}.norm{n}.weight" for i in range(2) for n in (1, 2)
    }
    untold = cs.suggest(side("h", ("xa", "xb"), "w"), side("b", ("yc", "yd"), "w"), by="values")
    assert set(untold.unmatched_target) == {f"b.{i}.{n}.w" for i in range(2) for n in ("yc", "yd")}


def test_one_tuned_layer_of_a_stack_is_found_by_the_room_that_the_others_leave() -> None:
    source = {"h.w": tensor(0, 5, 12, 8)}
    target = {f"b.{i}.w": t.T.contiguous() for i, t in enumerate(source["h.w"])}
    target["b.3.w"] = target["b.3.w"] + 0.01
    found = cs.suggest(source, target, by="values")
    assert len(found.recipe.rules) == 1
    assert [a.keys for a in found.assumptions if a.kind == "values"] == [("b.3.w",)]


@pytest.mark.parametrize("interleaved", [False, True])
def test_two_halves_in_the_other_order_and_in_other_groups(interleaved: bool) -> None:
    source = {f"l.{i}.w": tensor(i, 16, 5) for i in range(3)}
    halves = {k: t.view(2, 8, 5).flip(0) for k, t in source.items()}
    target = {
        k.replace("l.", "m."): (h.transpose(0, 1) if interleaved else h).reshape(16, 5) for k, h in halves.items()
    }
    found = cs.suggest(source, {k: t.contiguous() for k, t in target.items()}, by="values")
    made = cs.plan(source, found.recipe).state_dict()
    assert all(torch.equal(made[k], t) for k, t in target.items())
