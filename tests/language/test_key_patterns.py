"""Key patterns: what they match, how they are refused, text and object."""

from __future__ import annotations

from typing import Any

import pytest

from ckptsurgery.errors import RecipeError
from ckptsurgery.language.axes import AxisList
from ckptsurgery.language.keys import KeyPattern
from ckptsurgery.language.rules import Rule

MATCHES: list[tuple[str, str, dict[str, str] | None]] = [
    ("a.{i}.w", "a.0.w", {"i": "0"}),
    ("a.{i}.w", "a.00.w", {"i": "00"}),
    ("a.{i}.w", "a.x_y.w", {"i": "x_y"}),
    ("a.{i}.w", "a.0.1.w", None),
    ("a.{i}.w", "a..w", None),
    ("a.{i}.w", "m.a.0.w", None),
    ("a.{i}.w", "a.0.w.m", None),
    ("a{i}", "a/b", None),
    ("{p:q,k}.w", "k.w", {"p": "k"}),
    ("{p:q,k}.w", "v.w", None),
    ("x{s:,_ema}.w", "x.w", {"s": ""}),
    ("x{s:a.b,c}.w", "xa.b.w", {"s": "a.b"}),
    ("l.{i:2..10}", "l.10", {"i": "10"}),
    ("l.{i:2..10}", "l.1", None),
    ("l.{i:2..10}", "l.02", None),
    ("l.{i+16}", "l.16", {"i": "0"}),
    ("l.{i+16}", "l.15", None),
    ("l.{3-i}", "l.3", {"i": "0"}),
    ("l.{3-i}", "l.4", None),
    ("b.{(s k)}", "b.12", {"(s k)": "12"}),
    ("b.{(s k)}", "b.x", None),
    ("{r...}.w", "a.b.w", {"r": "a.b"}),
    ("{r...}.w", ".w", None),
    ("a.{r...}", "a.", None),
    ("a.{i}.b.{i}", "a.1.b.1", {"i": "1"}),
    ("a.{i}.b.{i}", "a.1.b.2", None),
    (r"a\[0\]\{x\}", "a[0]{x}", {}),
    (r"a\->b\,c\|d\?\\", "a->b,c|d?\\", {}),
    ("block 0.{i}.bias", "block 0.0.bias", {"i": "0"}),
    ("größe.{i}", "größe.0", {"i": "0"}),
]


@pytest.mark.parametrize(("text", "key", "values"), MATCHES)
def test_the_whole_key_is_matched(text: str, key: str, values: dict[str, str] | None) -> None:
    pattern = KeyPattern.parse(text)
    assert pattern.match(key) == values
    assert str(pattern) == text and KeyPattern.parse(str(pattern)) == pattern
    if values is not None:
        assert pattern.spell(values) == key


REFUSED = [
    ("{i}{j}", "with nothing between them"),
    ("{i", "never closed"),
    ("a}", "a bare '}'"),
    ("a]", "a bare ']'"),
    ("{a{b}}", "a capture inside a capture"),
    ("{}", "is no capture"),
    ("{1x}", "is no capture"),
    ("{(s)}", "is no flat index"),
    ("{(s s)}", "is no flat index"),
    ("{i:3..1}", "is empty"),
    ("{i:0..x.y}", "is no range"),
    ("{p:a,a}", "stands twice"),
    ("x{r...}", "glued to text"),
    ("{r...}x", "glued to text"),
    ("", "empty"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED)
def test_what_is_no_pattern_is_refused_with_the_place(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        KeyPattern.parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a a", "stands twice"),
        ("(a", "never closed"),
        ("a)", "')' without '('"),
        ("((a b) c)", "a group inside a group"),
        ("()", "an empty group"),
        ("... ...", "stands twice"),
        ("(a ...)", "inside a group"),
        ("r:", "is no"),
        ("a-b", "is no axis"),
    ],
)
def test_what_is_no_axis_list_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        AxisList.parse(text)
    assert said in str(caught.value)


def test_two_readings_are_shown() -> None:
    with pytest.raises(RecipeError) as caught:
        KeyPattern.parse("{p...}.x.{q...}").match("a.x.b.x.c")
    assert caught.value.diagnostics[0].notes == ("p = 'a', q = 'b.x.c'", "p = 'a.x.b', q = 'c'")


def test_a_search_that_would_backtrack_for_ever_ends() -> None:
    captures = ".x.".join(f"{{r{n}...}}" for n in range(12))
    key = ".".join(["x"] * 200) + ".y"
    pattern: Any = KeyPattern.parse(captures + ".z")
    assert pattern.readings(key) == []


@pytest.mark.parametrize("text", ["a.{+i}", "a.{1*i}", "a.{ + i }"])
def test_a_sum_of_one_name_is_that_name(text):
    assert KeyPattern.parse(text) == KeyPattern.parse("a.{i}")
    rule = Rule.parse(f"{text} -> b.{{i}}")
    assert Rule.parse(str(rule)) == rule
