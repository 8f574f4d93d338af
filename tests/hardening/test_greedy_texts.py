"""Rules, recipes and dims that ask for too much are refused at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.language.axes import AxisList
from ckptsurgery.language.calls import parse_call
from ckptsurgery.language.dims import Dims, evaluate
from ckptsurgery.language.keys import KeyPattern
from ckptsurgery.language.toml import loads

MANY = "9" * 5000


@pytest.mark.parametrize(
    "read",
    [
        lambda: parse_call(f"f({MANY})"),
        lambda: parse_call("f(1e999)"),
        lambda: parse_call("f(" + "[" * 5000),
        lambda: evaluate(MANY, {}),
        lambda: evaluate("(" * 200 + "1" + ")" * 200, {}),
        lambda: evaluate("\u00b2", {}),
        lambda: evaluate("1+" * 1000 + "1", {}),
        lambda: evaluate("config.a * config.a", {"a": 1 << 62}),
        lambda: AxisList.parse(MANY),
        lambda: KeyPattern.parse(f"a.{{i:0..{MANY}}}"),
        lambda: KeyPattern.parse(f"a.{{i+{MANY}}}"),
        lambda: KeyPattern.parse(".".join(f"{{a{i}}}" for i in range(3000))),
        lambda: loads(f"schema = {MANY}"),
        lambda: loads("[[" + ".".join(["scope"] * 3000) + "]]\nrest = 'keep'"),
        lambda: loads("x = " + "[" * 100_000),
        lambda: loads('drop = [["a"]]'),
        lambda: loads("[names]\np = 3"),
        lambda: Dims({**{f"a{i}": f"a{i + 1}" for i in range(2000)}, "a2000": 1}).get("a0"),
        lambda: Dims({**{f"a{i}": f"a{i + 1}*a{i + 1}" for i in range(14)}, "a14": 10}).get("a0"),
        lambda: Dims({"a": "b", "b": "a"}).get("a"),
        lambda: Dims({"a": "1 - 3"}).get("a"),
    ],
)
def test_what_asks_for_too_much_is_refused(read: Callable[[], object]) -> None:
    with pytest.raises(cs.RecipeError) as caught:
        read()
    assert len(caught.value.diagnostics) < 100


def test_what_only_looks_greedy_is_answered_at_once() -> None:
    assert Dims({**{f"a{i}": f"a{i + 1}+a{i + 1}" for i in range(30)}, "a30": 1}).get("a0") == 1 << 30
    assert KeyPattern.parse("a.{i:0..3}").match("a." + MANY) is None
    assert KeyPattern.parse("{a}x{b}x{c}y").match("x" * 5000) is None
    with pytest.raises(cs.RecipeError, match="two ways") as caught:
        KeyPattern.parse("{a}x{b}x{c}").match("x" * 5000)
    assert len(str(caught.value)) < 3000


def test_a_pattern_that_could_backtrack_forever_does_not() -> None:
    keys = {"a" * 3000 + f"{i}b": torch.ones(1) for i in range(20)}
    rule = "{a}a{b}a{c}a{d}a{e}a{f}c -> x.{a}.{b}.{c}.{d}.{e}.{f}"
    with pytest.raises(cs.PlanError):
        cs.plan(keys, rule)


@pytest.mark.parametrize("text", [r"{i:0.\.n-1}.x", r"{i:a.\.\.,b}.x"])
def test_choices_with_two_dots_spell_themselves(text: str) -> None:
    assert str(KeyPattern.parse(text)) == text
