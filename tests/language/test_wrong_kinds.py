"""Arguments of a recipe that are of another Python type are told by name, all at once, and not by a traceback."""

from __future__ import annotations

from typing import Any

import pytest

import ckptsurgery as cs

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rules": [("a", "b")]}, "rules[0] = ('a', 'b')"),
    ({"rules": [cs.Recipe()]}, "rules[0]"),
    ({"rules": {"a": "b"}}, "rules = {'a': 'b'}"),
    ({"drop": [1]}, "drop[0] = 1"),
    ({"drop": None}, "drop = None"),
    ({"drop": {"a": 1}}, "drop = {'a': 1}"),
    ({"tie": [("x", "a")]}, "tie = [('x', 'a')]"),
    ({"tie": {"x": 1}}, "tie['x'] = 1"),
    ({"tie": {1: "a"}}, "tie[1] = 'a'"),
    ({"same": {"a": 2}}, "same['a'] = 2"),
    ({"init": ["a"]}, "init = ['a']"),
    ({"init": {1: "zeros"}}, "init[1] = 'zeros'"),
    ({"dims": [1]}, "dims = [1]"),
    ({"names": {"m": ["a"]}}, "names['m'] = ['a']"),
    ({"scopes": ["x"]}, "scopes[0] = 'x'"),
    ({"stages": [{}]}, "stages[0] = {}"),
    ({"rest": 3}, "rest = 3"),
    ({"rest": ["keep"]}, "rest = ['keep']"),
    ({"carry": 3}, "carry = 3"),
]


@pytest.mark.parametrize(("given", "told"), WRONG, ids=[told for _, told in WRONG])
def test_an_argument_of_another_type_is_told_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(cs.RecipeError) as refused:
        cs.Recipe(**given)
    assert told in str(refused.value)


def test_all_are_told_at_once() -> None:
    with pytest.raises(cs.RecipeError) as refused:
        cs.Recipe(rules=[1, 2], drop=[3], tie={"a": 4})
    assert [d.code for d in refused.value.diagnostics] == ["bad-recipe"] * 4


def test_one_text_is_a_list_of_one_and_any_iterable_is_a_list() -> None:
    assert cs.Recipe("a -> b", drop="c") == cs.Recipe(iter(["a -> b"]), drop=(key for key in "c"))
