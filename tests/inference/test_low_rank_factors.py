"""Pairs of matrices of which each has the other's shape turned: paired by name, else said."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

import ckptsurgery as cs

LAYERS = {
    "blocks.{i}.attn.q": (8, 8),
    "blocks.{i}.attn.out": (8, 8),
    "blocks.{i}.fc1": (16, 8),
    "blocks.{i}.fc2": (8, 16),
}
SPELLINGS = {
    "down and up": ("{m}.lora_down.weight", "{m}.lora_up.weight"),
    "A and B": ("{m}.lora_A.weight", "{m}.lora_B.weight"),
    "with the adapter's name": ("{m}.lora_A.default.weight", "{m}.lora_B.default.weight"),
    "bare": ("{m}.lora_A", "{m}.lora_B"),
    "in two segments": ("{m}_lora.down.weight", "{m}_lora.up.weight"),
    "of a linear layer": ("{m}.lora_linear_layer.down.weight", "{m}.lora_linear_layer.up.weight"),
    "underscores": ("net_{u}.lora_down.weight", "net_{u}.lora_up.weight"),
}
ORDERS = ("narrow first", "wide first", "shuffled")


def side(spelling: str, rank: int, order: str) -> dict[tuple[int, str, str], str]:
    """(layer, module, factor) -> key, in an order."""
    found = {}
    for i, module in product(range(3), LAYERS):
        name = module.format(i=i)
        pair = [(f, t.format(m=name, u=name.replace(".", "_"))) for f, t in zip("AB", SPELLINGS[spelling])]
        for factor, key in pair if order != "wide first" else pair[::-1]:
            found[i, module, factor] = key
    rows = list(found.items())
    if order == "shuffled":
        random.Random(rank).shuffle(rows)
    return dict(rows)


def shape(module: str, factor: str, rank: int) -> tuple[int, ...]:
    out, inner = LAYERS[module]
    return (rank, inner) if factor == "A" else (out, rank)


@pytest.mark.parametrize(("one", "two"), [(a, b) for a, b in product(SPELLINGS, SPELLINGS) if a != b])
@pytest.mark.parametrize(
    "orders", [("narrow first", "narrow first"), ("wide first", "shuffled"), ("shuffled", "wide first")]
)
def test_down_is_a_and_up_is_b(one: str, two: str, orders: tuple[str, str]) -> None:
    for rank in (2,) if orders[0] == "shuffled" else (4,):
        first, second = side(one, rank, orders[0]), side(two, rank, orders[1])
        source = {key: torch.full(shape(m, f, rank), float(n)) for n, ((i, m, f), key) in enumerate(first.items())}
        specs = {key: cs.TensorSpec(shape(m, f, rank), "F32") for (i, m, f), key in second.items()}
        found = cs.suggest(source, specs)
        wanted = {second[place]: source[key] for place, key in first.items()}
        made = cs.plan(source, found.recipe, target=specs).state_dict()
        assert made.keys() == wanted.keys(), found
        assert all(torch.equal(made[key], wanted[key]) for key in wanted), found


PAIRS = [("lora_down", "lora_up"), ("lora_A", "lora_B"), ("p", "z"), ("first", "x9"), ("wa", "wb"), ("u", "v")]


@pytest.mark.parametrize(("one", "two"), [(a, b) for a, b in product(PAIRS, PAIRS) if a != b])
@pytest.mark.parametrize("crossed", [False, True])
def test_a_tensor_turned_to_a_shape_that_stands_beside_it_is_never_silent(
    one: tuple[str, str], two: tuple[str, str], crossed: bool
) -> None:
    shapes = [(2, 8), (8, 2)]
    source, target = (
        {f"l{i}.m.{n}.weight": cs.TensorSpec(s, "F32") for i in range(3) for n, s in zip(pair, wide)}
        for pair, wide in ((one, shapes), (two, shapes[::-1] if crossed else shapes))
    )
    found = cs.suggest(source, target)
    said = {k for a in found.assumptions for k in a.keys}
    for step in cs.plan(source, found.recipe).steps:
        (key,), (made,) = step.sources, step.targets
        narrow = ["_down" in name or "_A" in name for name in (key, made)]
        told = "lora" in key and "lora" in made and narrow[0] == narrow[1]
        assert source[key].shape == target[made].shape or made in said or told, (key, made, str(found))


def test_a_turned_pair_that_its_names_tell_needs_no_assumption() -> None:
    shapes = {"fc": (8, 32), "proj": (32, 8)}
    source = {f"h.{i}.c_{n}.weight": cs.TensorSpec(s, "F32") for i in range(2) for n, s in shapes.items()}
    target = {f"h.{i}.c_{n}.weight": cs.TensorSpec(s[::-1], "F32") for i in range(2) for n, s in shapes.items()}
    found = cs.suggest(source, target)
    assert found.coverage == 1.0
    assert "turned" not in {a.kind for a in found.assumptions}
