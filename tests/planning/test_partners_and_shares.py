"""`&` takes the keys that have partners, `+` shares keys with another rule: against oracles, and both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from both_ways import assert_equal, both_ways, forward, problems, refused
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.language.rules import Rule
from ckptsurgery.language.toml import loads

GROW = Recipe(["+ layers.{i:2..3}.{r...} -> layers.{i+2}.{r...}"], rest="keep")


def stack(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.{n}": torch.randn(2, 3, generator=generator) for i in range(count) for n in ("w", "mlp.w")}


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from("qkv"), st.booleans(), st.booleans()), max_size=12))
def test_a_join_takes_the_keys_for_which_every_partner_exists(drawn: list[tuple[int, str, bool, bool]]) -> None:
    source = {"other": torch.zeros(1)}
    for i, p, weight, scale in drawn:
        source |= {f"{i}.{p}.weight": torch.full((2,), float(i))} if weight else {}
        source |= {f"{i}.{p}.scale": torch.full((2,), float(i))} if scale else {}
    wanted = dict(source)
    for key in [k for k in source if k.endswith(".weight") and k.replace("weight", "scale") in source]:
        wanted[key + "_done"] = wanted.pop(key)
        del wanted[key.replace("weight", "scale")]
    forward(Recipe(["? {i}.{p}.weight & {i}.{p}.scale -> {i}.{p}.weight_done | same"], rest="keep"), source, wanted)


def test_choices_are_partners_however_each_file_spells_them() -> None:
    source = {"a.q": torch.ones(2), "b.query": torch.ones(2), "a.k": torch.ones(2), "b.value": torch.ones(2)}
    recipe = Recipe(["a.{p:q,k,v} & b.{p:query,key,value} -> c.{p:q,k,v} | same"], rest="keep")
    wanted = {"c.q": torch.ones(2), "a.k": torch.ones(2), "b.value": torch.ones(2)}
    error = refused(dict.fromkeys(source, (2,)), recipe)
    assert set(problems(error)) == {"unused-choice"}  # a choice that matches nothing is a misspelling, here as anywhere
    forward(recipe.replace(rules=[f"? {recipe.rules[0]}"]), source, wanted)


def test_what_joins_and_what_is_left_are_both_accounted_for() -> None:
    recipe = Recipe(["{k...}.w & {k...}.s -> {k...}.w | same"])
    assert problems(refused({"a.w": (2,), "a.s": (2,), "b.w": (2,)}, recipe)) == ["unexpected-keys"]
    assert "partners" in str(refused({"b.w": (2,)}, recipe.replace(rest="keep")))
    twice = Recipe(["{k...}.w & {k...}.s -> {k...}.w | same", "{k...}.w -> {k...}.v"])
    assert problems(refused({"a.w": (2,), "a.s": (2,), "b.w": (2,)}, twice)) == ["claimed-twice"]


def test_the_way_back_of_a_join_is_known_to_the_plan_and_not_to_the_text() -> None:
    source = {"a.w": torch.ones(2), "a.s": torch.ones(2), "b.w": torch.zeros(2)}
    recipe = Recipe(["{k...}.w & {k...}.s -> {k...}.w | same"], rest="keep")
    plan = cs.plan(source, recipe)
    assert_equal(plan.inverse(plan.state_dict()).state_dict(), source)
    with pytest.raises(cs.RecipeError, match="which keys had partners"):
        recipe.inverse()


def test_depth_grows_by_layers_that_are_read_twice_and_the_way_back_proves_the_copies_equal() -> None:
    source = stack(4)
    wanted = {**source, **{k.replace("s.2", "s.4").replace("s.3", "s.5"): t for k, t in source.items() if k[7] in "23"}}
    plan = both_ways(GROW, source, wanted)
    broken = {**wanted, "layers.5.w": wanted["layers.5.w"] + 1}
    for back in (plan.inverse(broken), cs.plan(broken, GROW.inverse())):
        with pytest.raises(cs.CkptSurgeryError) as caught:
            back.state_dict()
        assert problems(caught.value) == ["tied-values-differ"]


def test_one_matrix_is_read_in_many_places(tmp_path: Any) -> None:
    source = {"q": torch.ones(3, 3), **stack(3)}
    rules = ["layers.{i}.w, + q -> layers.{i}.w | first_of", "layers.{i}.mlp.w, + q -> layers.{i}.mlp.w | first_of"]

    @cs.op
    class FirstOf(cs.Op):
        """Pass the first tensor on."""

        name = "first_of"
        joins = True

        def infer(self, specs: Any) -> Any:
            return specs[:1]

        def run(self, tensors: Any) -> Any:
            return tensors[:1]

    wanted = {k: t for k, t in source.items() if k != "q"}
    forward(Recipe(rules), source, wanted)
    forward(Recipe(rules, rest="keep"), source, source)
    cs.plan(source, Recipe(rules, rest="keep")).save(tmp_path / "x.safetensors")
    assert_equal(cs.open(tmp_path / "x.safetensors").state_dict(), source)
    without = [rule.replace("+ ", "") for rule in rules]
    error = refused({k: tuple(t.shape) for k, t in source.items()}, Recipe(without))
    assert problems(error) == ["claimed-twice"]
    assert "+ SOURCE" in str(error)


def test_a_shared_read_may_rearrange_and_its_way_back_compares_what_comes_back() -> None:
    source = {"a": torch.arange(6.0).reshape(2, 3)}
    recipe = Recipe(["a -> a", "+ a [x y] -> b [y x]"])
    plan = both_ways(recipe, source, {"a": source["a"], "b": source["a"].T.contiguous()})
    broken = {"a": source["a"], "b": torch.zeros(3, 2)}
    for back in (plan.inverse(broken), cs.plan(broken, recipe.inverse())):
        with pytest.raises(cs.CkptSurgeryError, match="same"):
            back.state_dict()


def test_a_key_that_is_dropped_and_read_in_passing_comes_back() -> None:
    source = {"a": torch.ones(2), "b": torch.zeros(2)}
    recipe = Recipe(["+ a -> c", "b -> b"], drop=["a"])
    plan = forward(recipe, source, {"c": torch.ones(2), "b": torch.zeros(2)})
    assert_equal(plan.inverse(plan.state_dict()).state_dict(), source)


def test_a_key_is_shared_by_rules_that_say_so_and_by_no_others() -> None:
    shapes = {"a": (2,), "b": (2,), "c": (2,)}
    assert problems(refused(shapes, Recipe(["a -> x", "b -> x", "c -> y"]))) == ["made-twice"]
    assert problems(refused(shapes, Recipe(["a -> x", "b -> x", "c -> + x"])))[0] == "made-twice"
    plan = cs.plan({k: torch.ones(2) for k in shapes}, Recipe(["a -> x", "b -> + x", "c -> + x"]))
    assert sorted(plan.proofs) == [("b", "a"), ("c", "a")]
    assert problems(refused({"a": (2,), "b": (3,)}, Recipe(["a -> x", "b -> + x"]))) == ["not-the-same"]


@pytest.mark.parametrize(
    "text",
    [
        "{k...}.weight & {k...}.scale -> {k...}.weight | same",
        "? + a.{i} [x y], b.{i} -> + c.{i} [y x] | same",
        r"a\&b.{i} & \+c.{i} -> \+a.{i} | same",
        r"x, + \+c -> y | same",
    ],
)
def test_the_new_marks_read_back_and_a_backslash_takes_their_meaning(text: str) -> None:
    assert str(Rule.parse(text)) == text
    recipe = Recipe([text])
    assert loads(recipe.dumps()) == recipe


def test_marks_in_keys() -> None:
    source = {"+a&b": torch.ones(2), "c+d": torch.zeros(2)}
    both_ways([r"\+a\&b -> x", "c+d -> y"], source, {"x": torch.ones(2), "y": torch.zeros(2)})
    assert problems(refused({"+a&b": (2,)}, Recipe(rest="error"))) == ["unexpected-keys"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a & b, c -> d | same", "',' and '&'"),
        ("a -> b & c", "between targets"),
        ("+ + a -> b", "stands twice"),
        ("a & -> b", "missing"),
    ],
)
def test_what_is_no_rule_is_refused(text: str, message: str) -> None:
    with pytest.raises(cs.RecipeError, match=message):
        Rule.parse(text)


def test_a_fallback_neither_shares_nor_joins() -> None:
    for rest in ("+ {k...} -> x.{k...}", "{k...}.a & {k...}.b -> {k...} | same"):
        with pytest.raises(cs.RecipeError, match="rest"):
            Recipe(rest=rest)


@pytest.mark.parametrize("count", [1, 2, 12])
@pytest.mark.parametrize(
    ("rules", "rest"),
    [
        (["layers.{i}.{r...} -> layers.{i}.{r...}", "+ layers.{i}.{r...} -> layers.{i+n}.{r...}"], "error"),
        (["h.{i}.{r...} -> layers.{i}.{r...}", "+ h.{i}.{r...} -> layers.{i+n}.{r...}"], "error"),
        (["+ layers.{i}.{r...} -> layers.{i+n}.{r...}"], "keep"),
        (["{k...} -> {k...}", "+ layers.{i}.{r...} -> layers.{i+n}.{r...}"], "error"),
        (["+ layers.{i}.{r...} -> layers.{i+n}.{r...}", "+ layers.{i}.{r...} -> layers.{i+m}.{r...}"], "keep"),
        ([f"+ h.{{i}}.{{r...}} -> layers.{{i+{n}}}.{{r...}}" for n in "mn"], "h.{k...} -> layers.{k...}"),
    ],
)  # fmt: skip
def test_copies_are_told_from_originals_on_the_way_back(rules: list[str], rest: str, count: int) -> None:
    front = "h." if any("h.{i}" in rule for rule in rules) else "layers."
    source = {key.replace("layers.", front): tensor for key, tensor in stack(count).items()}
    recipe = Recipe(rules, rest=rest, dims={"n": count, "m": 2 * count})
    made = cs.plan(source, recipe).state_dict()
    assert len(made) == len(source) * (sum(rule.startswith("+") for rule in rules) + 1)
    back = cs.plan(made, recipe.inverse())
    assert_equal(back.state_dict(), source)
    assert len(back.proofs) == len(made) - len(source)
    last = max(made)
    with pytest.raises(cs.CkptSurgeryError, match="must be equal"):
        cs.plan({**made, last: made[last] + 1}, recipe.inverse()).state_dict()


def test_copies_of_copies_under_other_spellings() -> None:
    pair = ("{m:a,b}.{i}.w", "{m:q,k}.{i")
    recipe = Recipe([f"{pair[0]} -> {pair[1]}}}.w", *(f"+ {pair[0]} -> {pair[1]}+{n}}}.w" for n in (3, 6, 9))])
    source = {f"{m}.{i}.w": torch.randn(2) for m in "ab" for i in range(3)}
    made = cs.plan(source, recipe).state_dict()
    assert_equal(cs.plan(made, recipe.inverse()).state_dict(), source)


def test_a_mirrored_stack_is_its_own_copy_until_a_range_is_named() -> None:
    recipe = Recipe(["layers.{i}.w -> layers.{i}.w", "+ layers.{i}.w -> layers.{7-i}.w"])
    source = {key: tensor for key, tensor in stack(4).items() if "mlp" not in key}
    made = cs.plan(source, recipe).state_dict()
    error = refused({key: tuple(tensor.shape) for key, tensor in made.items()}, recipe.inverse())
    assert problems(error)[0] == "claimed-twice"
    named = Recipe([str(rule).replace("{i}", "{i:0..3}") for rule in recipe.rules])
    assert_equal(cs.plan(made, named.inverse()).state_dict(), source)
