"""A table of names whose two spellings stand on one side: each joined term has the spelling of its keys."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.errors import PlanError
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.language.toml import loads

TABLE = {"net_0_conv": "net.0.conv", "net_10_to_q": "net.10.to_q", "head": "head", "mid": "middle.block"}
SPELLED = (list(TABLE), list(TABLE.values()))


def tensors(prefix: str, spelling: int) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}.w": torch.full((2,), float(n)) for n, name in enumerate(SPELLED[spelling])}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("spelled", list(product((0, 1), repeat=3)))
@pytest.mark.parametrize("text", [False, True])
def test_each_term_has_the_spelling_of_its_keys(spelled: tuple[int, ...], text: bool) -> None:
    recipe = Recipe(["a.{m}.w [x], b.{m}.w [x], c.{m}.w [x] -> x.{m} [x] | same"], names={"m": TABLE})
    if text:
        assert loads(recipe.dumps()) == recipe
        recipe = loads(recipe.dumps())
    source = tensors("a.", spelled[0]) | tensors("b.", spelled[1]) | tensors("c.", spelled[2])
    wanted = tensors("x.", 1)
    assert equal({f"{k}.w": v for k, v in cs.plan(source, recipe).state_dict().items()}, wanted)


@pytest.mark.parametrize("spelled", list(product((0, 1), repeat=2)))
def test_the_way_back_has_the_spellings_of_the_keys_that_it_makes(spelled: tuple[int, int]) -> None:
    recipe = Recipe(["a.{m}.w, b.{m}.w -> x.{m} | same"], names={"m": TABLE})
    source = tensors("a.", spelled[0]) | tensors("b.", spelled[1])
    plan = cs.plan(source, recipe)
    converted = plan.state_dict()
    assert list(converted) == [f"x.{name}" for name in TABLE.values()]
    assert equal(plan.inverse(converted).state_dict(), source)
    back = loads(recipe.inverse().dumps())
    assert equal(cs.plan(converted, back, target=cs.open(source)).state_dict(), source)
    # Without a target, no key shows a spelling, and a side has its own.
    assert set(cs.plan(converted, back).specs) == {*tensors("a.", 0), *tensors("b.", 0)}


def test_a_term_that_captures_two_tables_spells_both_alike() -> None:
    recipe = Recipe(
        ["base.{m}.{l}, lo.{m}.{l} -> {m}.{l} | same"],
        names={"m": {"conv_in": "conv.in"}, "l": {"kernel": "weight", "offset": "bias"}},
    )
    one = torch.ones(2)
    source = {f"base.conv.in.{l}": one for l in ("weight", "bias")}
    source |= {f"lo.conv_in.{l}": one for l in ("kernel", "offset")}
    assert {k: v.tolist() for k, v in cs.plan(source, recipe).state_dict().items()} == {
        "conv.in.weight": [1, 1],
        "conv.in.bias": [1, 1],
    }
    mixed = {f"base.conv_in.{l}": one for l in ("weight", "bias")} | {k: v for k, v in source.items() if k[:2] == "lo"}
    with pytest.raises(PlanError, match="unused-rule"):
        cs.plan(mixed, recipe)


def test_keys_in_both_spellings_are_refused() -> None:
    recipe = Recipe(["a.{m}.w, b.{m}.w -> x.{m} | same"], names={"m": TABLE})
    source = tensors("a.", 0) | tensors("b.", 0)
    source["b.net.0.conv.w"] = source.pop("b.net_0_conv.w")
    with pytest.raises(PlanError, match=r"'b.mid.w' and 'b.net.0.conv.w' spell \[names.m\] in two ways") as caught:
        cs.plan(source, recipe)
    assert "mixed-names" in {d.code for d in caught.value.diagnostics}


def test_the_spelling_of_its_own_side_goes_first() -> None:
    turned = {"a": "b", "b": "a"}
    recipe = Recipe(["p.{m}, q.{m} -> x.{m} | same"], names={"m": turned})
    source = {f"{side}.{m}": torch.full((1,), float(ord(m))) for side in "pq" for m in "ab"}
    assert {k: v.item() for k, v in cs.plan(source, recipe).state_dict().items()} == {"x.b": 97.0, "x.a": 98.0}
    both = tensors("a.", 0) | tensors("b.", 0) | {"b.net.0.conv.w": torch.full((2,), 7.0)}
    named = Recipe(["a.{m}.w, b.{m}.w -> x.{m} | same"], names={"m": TABLE}, rest="drop")
    assert [v[0].item() for v in cs.plan(both, named).state_dict().values()] == [0, 1, 2, 3]


def test_numbers_beside_the_names_leave_a_spelling_complete() -> None:
    recipe = Recipe(["a.{i}.{m}.w, b.{i}.{m}.w -> x.{i}.{m} | same"], names={"m": TABLE}, rest="drop")
    source = {k: v for i in range(2) for side in "ab" for k, v in tensors(f"{side}.{i}.", 0).items()}
    odd = {"b.0.net.0.conv.w": torch.full((2,), 7.0)}
    assert [v[0].item() for v in cs.plan(source | odd, recipe).state_dict().values()] == [0, 1, 2, 3] * 2


def test_a_side_of_one_term_keeps_its_spelling() -> None:
    recipe = Recipe(["a.{m}.w -> x.{m}"], names={"m": {"old": "new"}})
    with pytest.raises(PlanError, match="unused-rule"):
        cs.plan({"a.new.w": torch.ones(1)}, recipe)


def test_a_choice_that_no_key_has_is_told_though_the_terms_differ_in_spelling() -> None:
    source = tensors("a.", 1) | tensors("b.", 0)
    rules = ["a.{m}.w, b.{m}.w -> x.{m} | same"]
    with pytest.raises(PlanError, match=r"choice 'typo' of \{m\} matches no source key"):
        cs.plan(source, Recipe(rules, names={"m": {**TABLE, "typo": "none"}}))
    more = {"c.lone.v": torch.ones(1)}
    spread = Recipe([*rules, "c.{m}.v -> y.{m}"], names={"m": {**TABLE, "lone": "alone"}})
    assert "y.alone" in cs.plan(source | more, spread).specs


@pytest.mark.parametrize("alphas", [(1.0, 2.0, 4.0, 8.0), (3.0,) * 4])
def test_an_adapter_of_other_names_is_merged_with_its_own_alphas(alphas: tuple[float, ...]) -> None:
    made = torch.Generator().manual_seed(3)
    shapes = [(8, 4, 3, 3), (6, 8), (5, 6), (4, 8, 1)]
    source, wanted = {}, {}
    for (name, target), shape, alpha in zip(TABLE.items(), shapes, alphas):
        weight = source[f"base.{target}.weight"] = torch.randn(shape, generator=made)
        down = source[f"lo.{name}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=made)
        up = source[f"lo.{name}.lora_up.weight"] = torch.randn(shape[0], 2, *[1] * len(shape[2:]), generator=made)
        source[f"lo.{name}.alpha"] = torch.tensor(alpha)
        update = torch.einsum("or,r...->o...", up.flatten(1), down)
        wanted[f"{target}.weight"] = weight + alpha / 2 * update
    sources = ("base.{m}.weight", "lo.{m}.lora_down.weight", "lo.{m}.lora_up.weight", "lo.{m}.alpha")
    recipe = Recipe([f"{', '.join(sources)} -> {{m}}.weight | lora_merge"], names={"m": TABLE})
    result = cs.plan(source, recipe).state_dict()
    assert result.keys() == wanted.keys()
    assert all(torch.allclose(result[k], wanted[k], atol=1e-5) for k in wanted)
