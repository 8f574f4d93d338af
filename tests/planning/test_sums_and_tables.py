"""Indices counted in steps, tables of names beside a rule's own lists, and axes that travel together."""

from __future__ import annotations

from typing import Any

import pytest

from ckptsurgery.errors import PlanError, RecipeError
from ckptsurgery.language.keys import KeyPattern
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.language.toml import loads
from ckptsurgery.planning.expanding import expand
from ckptsurgery.planning.options import PlanOptions
from ckptsurgery.planning.planner import make_plan
from ckptsurgery.specs import TensorSpec


def made(recipe: Recipe, shapes: dict[str, tuple[int, ...]], **more: Any) -> dict[str, tuple[int, ...]]:
    source = {k: TensorSpec(s, "F32") for k, s in shapes.items()}
    plan = make_plan(source, recipe, lambda name: Recipe(), options=PlanOptions(**more))
    return {k: s.shape for k, s in plan.specs.items()}


class TestSteps:
    @pytest.mark.parametrize(
        ("text", "numbers", "read"),
        [
            ("x{2*i+1}", (0, 1, 2, 3), (None, "0", None, "1")),
            ("x{2*i+2}", (0, 1, 2, 4), (None, None, "0", "1")),
            ("x{7-2*i}", (7, 6, 5, 8), ("0", None, "1", None)),
            ("x{i+2*n}", (5, 6, 7), (None, "0", "1")),
        ],
    )
    def test_a_number_that_is_no_whole_step_matches_nothing(
        self, text: str, numbers: tuple[int, ...], read: tuple[str | None, ...]
    ) -> None:
        pattern = KeyPattern.parse(text).bind({"n": 3})
        found = [pattern.match(f"x{n}") for n in numbers]
        assert [f and f["i"] for f in found] == list(read)
        assert all(pattern.spell(f) == f"x{n}" for n, f in zip(numbers, found) if f)

    @pytest.mark.parametrize("text", ["x{2*i+1}", "x{7-2*i}", "x{i+4*n-1}"])
    def test_text_and_object_are_one(self, text: str) -> None:
        assert str(KeyPattern.parse(text)) == text

    def test_no_step_at_all_is_refused(self) -> None:
        with pytest.raises(RecipeError, match="is no capture"):
            KeyPattern.parse("x{0*i+1}")

    def test_one_list_of_two_kinds_parts_by_its_numbers(self) -> None:
        recipe = Recipe(["f.0.w -> stem.w", "f.{2*s+2}.w -> stages.{s+1}.down", "f.{2*s+1}.{b}.w -> stages.{s}.b{b}"])
        flat = {"f.0.w": (1,), "f.1.0.w": (2,), "f.2.w": (3,), "f.3.0.w": (4,), "f.3.1.w": (5,), "f.4.w": (6,)}
        nested = made(recipe, flat)
        stages = {"stages.0.b0": (2,), "stages.1.down": (3,), "stages.1.b0": (4,), "stages.1.b1": (5,)}
        assert nested == {"stem.w": (1,), **stages, "stages.2.down": (6,)}
        assert made(recipe.inverse(), nested) == flat

    @pytest.mark.parametrize("key", ["{top-i}", "{i:0..top}"])
    def test_a_number_that_the_config_lacks_is_named(self, key: str) -> None:
        recipe = Recipe([f"up.{{i}} -> blocks.{key}"], dims={"top": "config.levels - 1"})
        with pytest.raises(RecipeError, match="nothing says what 'top' is") as caught:
            made(recipe, {"up.0": (1,), "up.1": (2,)})
        assert caught.value.diagnostics[0].help == 'dims={"top": …}'
        assert "config.levels - 1" in str(caught.value)
        assert set(made(recipe, {"up.0": (1,), "up.1": (2,)}, config={"levels": 2})) == {"blocks.0", "blocks.1"}


class TestTables:
    def test_a_rules_own_list_goes_before_a_table_of_that_name(self) -> None:
        recipe = Recipe(["a.{m} -> b.{m}", "{m:p,q}.w -> {m}.w"], names={"m": {"x": "y"}})
        assert made(recipe, {"a.x": (1,), "p.w": (2,), "q.w": (3,)}) == {"b.y": (1,), "p.w": (2,), "q.w": (3,)}

    def test_a_misspelt_choice_of_its_own_is_told_though_a_table_has_the_name(self) -> None:
        recipe = Recipe(["a.{m} -> b.{m}", "{m:p,typo}.w -> {m}.w"], names={"m": {"x": "y"}})
        with pytest.raises(PlanError, match="'typo'"):
            made(recipe, {"a.x": (1,), "p.w": (2,)})


class TestAxesThatTravelTogether:
    rule = "{p:q,k}.w [(h:p hd) d] -> qk.w [(p h:p hd) d]"

    def test_need_no_sizes_of_their_own(self) -> None:
        assert made(Recipe([self.rule]), {"q.w": (8, 3), "k.w": (4, 3)}) == {"qk.w": (12, 3)}

    def test_are_parted_by_the_sizes_of_one(self) -> None:
        back = Recipe([self.rule], dims={"h": {"q": 4, "k": 2}}).inverse()
        assert made(back, {"qk.w": (12, 3)}) == {"q.w": (8, 3), "k.w": (4, 3)}

    def test_stay_open_where_they_must_part(self) -> None:
        with pytest.raises(PlanError, match="the size of axis 'h'"):
            made(Recipe([self.rule]).inverse(), {"qk.w": (12, 3)})

    def test_are_not_merged_across_an_axis_that_comes_between(self) -> None:
        with pytest.raises(PlanError, match="the size of axis"):
            made(Recipe(["w [(a b c)] -> w [(a c b)]"]), {"w": (12,)})
        assert made(Recipe(["w [(a b c) d] -> w [d (a b c)]"]), {"w": (12, 2)}) == {"w": (2, 12)}


class TestSizesThatNothingAsksFor:
    @pytest.mark.parametrize(
        ("recipe", "name"),
        [
            (Recipe(["a [(heads d)] -> b [heads d]"]), "heads"),
            (Recipe(["c.{i:0..n} -> d.{i}"]), "n"),
            (Recipe(["a.{i} -> b.{i+n}"]), "n"),
            (Recipe(["a -> b | fp8_dequant(block=n)"]), "n"),
            (Recipe(["a -> b"], dims={"width": 3}), "width"),
            (Recipe(["a -> b"], dims={"width": "config.w * depth"}), "depth"),
            (Recipe(["a -> b"], drop=["c.{i:0..n}"]), "n"),
        ],
    )
    def test_what_a_recipe_asks_for_may_be_given(self, recipe: Recipe, name: str) -> None:
        assert list(expand(recipe, lambda name: Recipe(), {"w": 1}, {name: 1}))

    def test_a_misspelt_name_is_refused_with_the_one_that_was_meant(self) -> None:
        with pytest.raises(RecipeError, match="a size is given for 'head', and nothing asks for it") as caught:
            made(Recipe(["a [(heads d)] -> b [heads d]"]), {"a": (6,)}, dims={"head": 2})
        assert caught.value.diagnostics[0].help == "did you mean 'heads'?"

    def test_a_scope_may_ask(self) -> None:
        scope = '[[scope]]\nsource = "m."\ntarget = "n."\nrules = ["a [(heads d)] -> b [heads d]"]\n'
        recipe = loads(f"schema = 1\n{scope}")
        assert made(recipe, {"m.a": (6,)}, dims={"heads": 2}) == {"n.b": (2, 3)}
