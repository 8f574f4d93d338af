"""Recipes as text: what is read equals what was written; what is wrong is told, all of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgery.errors import RecipeError
from ckptsurgery.language.recipe import Recipe, Scope
from ckptsurgery.language.toml import loads

FULL = Recipe(
    rules=["a.{i}.w [x y] -> b.{i}.w [y x] | cast(bf16)", "? {p:q,k} -> {p:x,y}", r"a\[0\] -> c\\d"],
    drop=["z.{i}", "? y"],
    init={"head.{l}": "trunc_normal(std=0.02)"},
    tie={"lm_head": "embed"},
    same={"old": "new"},
    dims={"g": "config.kv ?? config.heads", "n": 4, "b": [1, 2, "config.x"], "r": {"q": 8, "k": "g * 2"}},
    names={"m": {"norm1": "ln_1", "attn.proj": 'say "out"'}, "l": {"ü": "u\n"}},
    rest="{k...} -> vit.{k...}",
    scopes=[
        Scope(Recipe(["{m}.{l} -> {m}.{l}"], dims={"n": 2}, rest="keep"), "s.{i}.", "t.{i}."),
        Scope(Recipe(rest=None), target="language_model.", use="llama/meta_to_hf", config="text_config", inverse=True),
    ],
    stages=[
        Recipe(["q.{i} -> r.{i}"], summary="second", rest="drop"),
        Recipe(scopes=[Scope(Recipe(["u -> v"]), "x.")]),
    ],
    summary='one "line" \\ of it',
)


def test_text_and_objects_are_one() -> None:
    assert loads(FULL.dumps()) == FULL
    assert loads(str(FULL)) == FULL
    assert hash(loads(str(FULL))) == hash(FULL)
    assert loads(FULL.dumps()).dumps() == FULL.dumps()


def test_recipes_that_differ_are_not_equal() -> None:
    assert FULL.replace(rest="drop") != FULL and FULL.replace(summary="") != FULL and FULL.replace(stages=()) != FULL


def test_nested_lists_are_frozen_to_the_same_value() -> None:
    assert Recipe("w [(a b)] -> w [(b a)]", dims={"a": [1, 2]}) == Recipe("w [(a b)] -> w [(b a)]", dims={"a": (1, 2)})


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=8), max_size=4), st.text(max_size=20))
def test_any_text_survives(pairs: dict[str, str], summary: str) -> None:
    recipe = Recipe(["{m}.w -> {m}"], names={"m": pairs}, summary=summary)
    assert loads(recipe.dumps()) == recipe


WRONG = [
    ("rules = [", ["bad-toml"], "no TOML"),
    ("schema = 2", ["newer-schema"], "pip install -U ckptsurgery"),
    ('schema = "1"', ["newer-schema"], "schema '1'"),
    ('rule = ["a -> b"]', ["unknown-key"], "did you mean 'rules'?"),
    ("[[scop]]", ["unknown-key"], "did you mean 'scope'?"),
    ('[[scope]]\nsauce = "m."', ["unknown-key"], "did you mean 'source'?"),
    ('rules = "a -> b"', ["bad-recipe"], "a list was expected"),
    ("rules = [1]", ["bad-recipe"], '"SOURCE -> TARGET"'),
    ("drop = [1]", ["bad-recipe"], "no text"),
    ("rest = 3", ["bad-recipe"], "a str was expected"),
    ('rest = "kep"', ["bad-rest"], '"keep"'),
    ("[init]\nh = 3", ["bad-recipe"], "[init] 'h' = 3"),
    ("[names]\nm = 3", ["bad-recipe"], "[names.m]"),
    ("[names.m]\na = 3", ["bad-recipe"], "no text"),
    ("scope = [1]", ["bad-recipe"], "[[scope]]"),
    ('[[scope]]\nsource = "m"', ["bad-scope"], "did you mean 'm.'?"),
    ('[tie]\n"head.{i}" = "emb"', ["unbound-capture"], "nothing binds {i}"),
    ('rules = ["a -> b -> c"]', ["bad-rule"], "one '->', this has 2"),
    ('rules = ["a"]', ["bad-rule"], "this has 0"),
    ('rules = ["a [x -> b"]', ["bad-rule"], ""),
    ('rules = ["a.{i} [x] | cast(f16) ->"]', ["bad-rule"], 'drop = ["a.{i}"]'),
    ('rules = ["a, b ->"]', ["bad-rule"], 'drop = ["a", "b"]'),
    ('rules = ["-> b [x] | cast(f16)"]', ["bad-rule"], 'init = { "b [x]" = "zeros" }'),
    ('rules = ["->"]', ["bad-rule"], "SOURCE -> TARGET"),
    ('rules = ["a -> b | cast("]', ["bad-call"], "ends too early"),
    (
        'rules = ["{i}{j} -> b"]\ndrop = ["{x"]\nrulez = 1',
        ["unknown-key", "bad-pattern", "bad-pattern"],
        "did you mean 'rules'?",
    ),
]


@pytest.mark.parametrize(("text", "codes", "said"), WRONG)
def test_what_is_wrong_is_told(text: str, codes: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        loads(text, "r.toml")
    assert [d.code for d in caught.value.diagnostics] == codes, str(caught.value)
    assert said in str(caught.value)
    assert all(d.place and d.place.startswith("r.toml") for d in caught.value.diagnostics), str(caught.value)


def test_the_place_of_a_rule_is_its_line() -> None:
    with pytest.raises(RecipeError) as caught:
        loads('rules = [\n  "a -> b",\n  "{i}{j} -> c",\n]', "r.toml")
    assert caught.value.diagnostics[0].place == "r.toml:3"
    assert loads('rules = [\n  "a -> b",\n  "c -> d",\n]', "r.toml").rules[1].place == "r.toml:3"
