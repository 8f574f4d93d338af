"""What does not fit is told: which code, what the message says, which line settles it; all of it at once."""

from __future__ import annotations

from typing import Any

import pytest
from both_ways import Shapes, problems, refused

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe

EXPERTS = {f"l.{i}.e.{e}.w": (2, 3) for i in range(2) for e in range(4)}

CASES: list[tuple[str, Shapes, Any, str, tuple[str, ...]]] = [
    (
        "names that keep no partner",
        {"e.0.w": (2,)},
        ["e.{e}.w [f] -> gate [f]"],
        "unbound-capture",
        ("{e} is bound on the left only", "^^^", "gate [e f]"),
    ),
    (
        "an axis without a partner",
        {"w": (2, 3)},
        ["w [a b] -> w [a]"],
        "unbound-axis",
        ("'b' stands on the left only", "mean_over(b)"),
    ),
    ("a literal size without a partner", {"w": (2, 3)}, ["w [a 3] -> w [a]"], "unbound-axis", ("the size 3",)),
    ("dots on one side", {"w": (2, 3)}, ["w [a ...] -> w [a]"], "unbound-axis", ("'...' stands on one side only",)),
    (
        "an axis that may be absent on one side",
        {"w": (2, 3)},
        ["w [a b?] -> w [b a]"],
        "unbound-axis",
        ("on both sides",),
    ),
    (
        "two claims",
        {"a.0": (1,), "a.1": (1,)},
        ["a.{i} -> b.{i}", "a.1 -> c"],
        "claimed-twice",
        ("a.1", "a.{i} -> b.{i}", "a.1 -> c"),
    ),
    ("a claim and a drop", {"a.0": (1,)}, Recipe(["a.{i} -> b.{i}"], drop=["a.0"]), "claimed-twice", ("drop a.0",)),
    ("two makers", {"a": (1,), "b": (1,)}, ["a -> c", "b -> c"], "made-twice", ("c", "a -> c", "b -> c")),
    (
        "a kept key that meets a made one",
        {"a": (1,), "b": (1,)},
        Recipe(["a -> b"], rest="keep"),
        "made-twice",
        ("that the rest keeps is made by a rule too: b", 'drop = ["b"]'),
    ),
    (
        "a missing expert",
        {k: s for k, s in EXPERTS.items() if k != "l.1.e.2.w"},
        ["l.{i}.e.{e}.w [f d] -> l.{i}.w [e f d]"],
        "missing-index",
        ("l.1.e.2.w is missing",),
    ),
    (
        "many missing experts, folded",
        {k: s for k, s in EXPERTS.items() if k[6] not in "12"},
        ["l.{i}.e.{e}.w [f d] -> l.{i}.w [e f d]"],
        "missing-index",
        ("l.{0,1}.e.{1,2}.w",),
    ),
    (
        "a missing part",
        {"0.q": (2,), "0.k": (2,), "1.q": (2,)},
        ["{i}.{p:q,k} [d] -> {i}.qk [(p d)]"],
        "missing-index",
        ("1.k is missing",),
    ),
    (
        "one layer with fewer experts",
        {k: s for k, s in EXPERTS.items() if k != "l.1.e.3.w"},
        ["l.{i}.e.{e}.w [f d] -> l.{i}.w [e f d]"],
        "uneven-gather",
        ("runs over 4 in most groups, but over 3", "l.1.e.3.w"),
    ),
    (
        "a range that the keys do not fill",
        {f"e.{i}": (2,) for i in range(8, 15)},
        ["e.{e:8..15} [d] -> b [e d]"],
        "missing-index",
        ("e.15 is missing",),
    ),
    (
        "a gathered name",
        {"e.a": (2,), "e.b": (2,)},
        ["e.{e} [d] -> w [e d]"],
        "not-a-number",
        ("{e} is gathered", "e.a", "its choices"),
    ),
    ("gathered leading zeros", {"e.00": (2,), "e.01": (2,)}, ["e.{e} [d] -> w [e d]"], "not-a-number", ("e.00",)),
    (
        "arithmetic on leading zeros",
        {"l.07.w": (2,)},
        ["l.{i}.w -> m.{i+1}.w"],
        "not-a-number",
        ("{i+1}", "'07'", "l.{i}.w -> m.{i+1}.w"),
    ),
    (
        "an index below zero",
        {"l.5.w": (2,)},
        ["l.{i}.w -> m.{3-i}.w"],
        "negative-index",
        ("-2", "l.{i}.w -> m.{3-i}.w"),
    ),
    (
        "a size that follows from nothing",
        {"w": (6, 2)},
        ["w [(a b) d] -> w [(b a) d]"],
        "unsolved-axis",
        ("'a'", 'dims={"a": …}'),
    ),
    (
        "a ragged split that nothing sizes",
        {"w": (6,)},
        ["w [(p r:p)] -> {p:q,k} [r:p]"],
        "unsolved-axis",
        ("'r'", 'dims={"r": {"q": …, "k": …}}'),
    ),
    (
        "a table that leaves two sizes open",
        {"w": (8,)},
        Recipe("w [(p r:p)] -> {p:q,k,v} [r:p]", dims={"r": {"q": 4}}),
        "unsolved-axis",
        ("'r'",),
    ),
    (
        "a config that lacks an entry",
        {"w": (6,)},
        Recipe("w [(a b)] -> w [(b a)]", dims={"a": "config.heads"}),
        "unsolved-axis",
        ("config.heads",),
    ),
    ("rows that do not divide", {"w": (7,)}, ["w [(p d)] -> {p:q,k} [d]"], "indivisible", ("7 is no multiple of 2",)),
    ("a literal size that is wrong", {"w": (2, 4)}, ["w [3 d] -> w [d 3]"], "size-mismatch", ("3", "2")),
    (
        "a size that dims contradict",
        {"w": (4, 2)},
        Recipe("w [a b] -> w [b a]", dims={"a": 3}),
        "size-mismatch",
        ("should be 3",),
    ),
    (
        "gathered sizes that differ",
        {"e.0": (2,), "e.1": (3,)},
        ["e.{e} [d] -> w [e d]"],
        "size-mismatch",
        ("e.0 [2]", "e.1 [3]"),
    ),
    ("gathered ranks that differ", {"e.0": (2,), "e.1": (2, 1)}, ["e.{e} -> w [e ...]"], "rank-mismatch", ()),
    ("another rank", {"w": (2, 3, 4)}, ["w [a b] -> w [b a]"], "rank-mismatch", ("3 dimensions",)),
    (
        "as many experts as dims do not say",
        {f"e.{i}": (2,) for i in range(3)},
        Recipe("e.{e} [d] -> w [e d]", dims={"e": 4}),
        "wrong-extent",
        ("e = 4", "3"),
    ),
    (
        "a flat index beyond its end",
        {f"b.{i}": (1,) for i in range(7)},
        Recipe("b.{(s k)} -> s.{s}.{k}", dims={"k": [1, 2, 3]}),
        "wrong-extent",
        ("b.6", "6 indices"),
    ),
    (
        "a flat index beyond its stages",
        {f"b.{i}": (1,) for i in range(7)},
        Recipe("b.{(s k)} -> s.{s}.{k}", dims={"s": 3, "k": 2}),
        "wrong-extent",
        ("b.6",),
    ),
    (
        "a nested index beyond its stage",
        {"s.0.2": (1,)},
        Recipe("s.{s}.{k} -> b.{(s k)}", dims={"k": [2, 3]}),
        "wrong-extent",
        ("k = 2",),
    ),
    (
        "a nested index that is no number",
        {"s.0.x": (1,)},
        Recipe("s.{s}.{k} -> b.{(s k)}", dims={"k": 2}),
        "not-a-number",
        ("k = x",),
    ),
    (
        "a flat index of unknown extents",
        {"b.0": (1,)},
        ["b.{(s k)} -> s.{s}.{k}"],
        "unsolved-axis",
        ("{(s k)}", 'dims={"k": …}'),
    ),
    (
        "a sum of two unknowns",
        {"b.0": (1,)},
        ["b.{i} -> c.{i+n}"],
        "unknown-dim",
        ("n", 'dims={"n": …}', "b.{i} -> c.{i+n}"),
    ),
    ("a range of an unknown end", {"b.0": (1,)}, ["b.{i:0..n} -> c.{i}"], "unknown-dim", ("'n'", 'dims={"n": …}')),
    (
        "an unused rule",
        {"a": (1,)},
        ["a -> b", "x.{i} -> y.{i}"],
        "unused-rule",
        ("'x.{i}' matches no source key", '"? x.{i} -> y.{i}"'),
    ),
    ("an unused drop", {"a": (1,)}, Recipe(["a -> b"], drop=["x"]), "unused-drop", ("'x'", '"? x"')),
    ("an unused proof", {"a": (1,)}, Recipe(["a -> b"], same={"x": "a"}), "unused-same", ("'x'",)),
    ("an unused tie", {"a": (1,)}, Recipe(["a -> b"], tie={"x": "y"}), "unused-tie", ("nothing makes 'y'",)),
    ("an unused choice", {"q.w": (1,)}, ["{p:q,kk}.w -> {p}"], "unused-choice", ("'kk' of {p}",)),
    (
        "an unused pair of names",
        {"q.w": (1,)},
        Recipe(["{p}.w -> {p}"], names={"p": {"q": "Q", "kk": "K"}}),
        "unused-choice",
        ("'kk'",),
    ),
    (
        "a table of names that nothing captures",
        {"q.w": (1,)},
        Recipe(["q.w -> w"], names={"p": {"q": "Q"}}),
        "unused-names",
        ("[names.p]",),
    ),
    (
        "a size for a choice that is none",
        {"w": (6,)},
        Recipe("w [(p r:p)] -> {p:q,k} [r:p]", dims={"r": {"q": 4, "kk": 2}}),
        "unknown-choice",
        ("'kk'", "k, q"),
    ),
    (
        "two readings",
        {"a_b_c": (1,)},
        ["{p}_{q} -> {q}.{p}"],
        "ambiguous-match",
        ("p = 'a', q = 'b_c'", "p = 'a_b', q = 'c'"),
    ),
    (
        "a companion without a partner",
        {"a.w": (1,), "a.s": (1,), "b.w": (1,)},
        ["{m}.w, {m}.s -> {m} | same"],
        "missing-partner",
        ("b.w",),
    ),
    ("companions of nobody", {"a.w": (1,)}, ["? {m}.w, {m}.s -> {m} | same"], "missing-partner", ("a.w",)),
    ("sources that no op joins", {"a": (1,), "b": (1,)}, ["a, b -> c"], "bad-op", ("joins them", "| same")),
    ("an op that nobody knows", {"a": (1,)}, ["a -> b | cats(bf16)"], "bad-op", ("cats", "did you mean 'cast'?")),
    (
        "choices that differ in number",
        {"q": (1,)},
        ["{p:q,k} -> {p:a,b,c}"],
        "choices-differ",
        ("2 choices", "3 in another"),
    ),
    (
        "a ragged axis outside of its group",
        {"w": (2, 6)},
        ["w [p:a,b r:p] -> v [r:p p]"],
        "ragged-axis",
        ("r:p", "(p r:p)"),
    ),
    (
        "a tie to what is made",
        {"a": (1,), "b": (1,)},
        Recipe(["a -> x", "b -> y"], tie={"y": "x"}),
        "tied-and-made",
        ("'y'", "'x'"),
    ),
    (
        "equal keys of different shapes",
        {"a": (1,), "b": (2,)},
        Recipe(["a -> x"], same={"b": "a"}),
        "not-the-same",
        ("[2]", "[1]"),
    ),
    (
        "an equal key that is not there",
        {"a": (1,), "b": (2,)},
        Recipe(["a -> x"], same={"b": "c"}),
        "missing-partner",
        ("'c'",),
    ),
    (
        "an initialiser without a target",
        {"a": (1,)},
        Recipe(["a -> x"], init={"h": "zeros"}),
        "init-needs-target",
        ("'h'",),
    ),
    (
        "an initialiser before the last stage",
        {"a": (1,)},
        Recipe(["a -> x"], init={"h": "zeros"}).then(Recipe(["x -> y"])),
        "init-in-stage",
        ("last stage",),
    ),
    (
        "keys that nothing names",
        {f"l.{i}.inv_freq": (64,) for i in range(32)} | {"a": (1,)},
        ["a -> b"],
        "unexpected-keys",
        ("32 source keys match no rule", "l.{0..31}.inv_freq  F32 [64]", 'drop = ["l.{i}.inv_freq"]'),
    ),
]


@pytest.mark.parametrize(("shapes", "recipe", "code", "said"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_it_is_told_with_the_line_that_settles_it(
    shapes: Shapes, recipe: Any, code: str, said: tuple[str, ...]
) -> None:
    error = refused(shapes, recipe)
    assert problems(error) == [code], str(error)
    for text in said:
        assert text in str(error), str(error)


def test_all_problems_come_at_once() -> None:
    shapes = {"a.0": (2,), "a.1": (2,), "b.0": (2,), "b.2": (2,), "w": (7,), "x": (1,)}
    rules = ["a.{i} -> c.{i}", "a.1 -> d", "b.{e} [d] -> b [e d]", "w [(p d)] -> {p:q,k} [d]", "y -> z"]
    assert sorted(problems(refused(shapes, rules))) == sorted(
        ["claimed-twice", "missing-index", "indivisible", "unused-rule", "unexpected-keys"]
    )


def test_what_breaks_the_law_comes_at_once() -> None:
    with pytest.raises(cs.RecipeError) as caught:
        cs.Recipe(["a.{i} -> b", "c [x] -> d [y]", "e -> "])
    assert problems(caught.value) == ["bad-rule", "unbound-capture", "unbound-axis", "unbound-axis"]


def test_a_problem_of_every_layer_is_told_once() -> None:
    shapes = {f"l.{i}.w": (7 + i, 2) for i in range(8) if i % 2 == 0}
    error = refused(shapes, ["l.{i}.w [(p d) x] -> l.{i}.{p:q,k} [d x]"])
    assert len(error.diagnostics) == len({str(d.headline) for d in error.diagnostics})


def test_a_size_for_each_choice_wants_an_axis_that_names_the_choice() -> None:
    source = {"h.1": cs.TensorSpec([6, 2], "F32"), "h.2": cs.TensorSpec([8, 2], "F32")}
    with pytest.raises(cs.PlanError) as told:
        cs.plan(source, cs.Recipe(["h.{i} [(a b) c] -> x.{i} [a b c]"], dims={"a": {"1": 2, "2": 4}}))
    assert "write the axis as a:i" in str(told.value.diagnostics[0].help)
    plan = cs.plan(source, cs.Recipe(["h.{i:1,2} [(a:i b) c] -> x.{i} [a:i b c]"], dims={"a": {"1": 2, "2": 4}}))
    assert [spec.shape for spec in plan.specs.values()] == [(2, 3, 2), (4, 2, 2)]
