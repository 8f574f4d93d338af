"""What does not fit is told: which code, what the message says, which line settles it; all of it at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from both_ways import problems

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe, Scope
from ckptsurgery.planning.planner import make_plan

Shapes = dict[str, tuple[int, ...]]


def specs(shapes: Shapes, dtype: str = "F32") -> dict[str, cs.TensorSpec]:
    return {key: cs.TensorSpec(shape, dtype) for key, shape in shapes.items()}


def refused(shapes: Shapes, recipe: Any, target: Shapes | None = None, **given: Any) -> cs.CkptSurgeryError:
    with pytest.raises((cs.PlanError, cs.RecipeError)) as caught:
        cs.plan(specs(shapes), recipe, target=specs(target) if target else None, **given)
    return caught.value


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
        ("'a'", "--dim a="),
    ),
    (
        "a ragged split that nothing sizes",
        {"w": (6,)},
        ["w [(p r:p)] -> {p:q,k} [r:p]"],
        "unsolved-axis",
        ("'r'", "--dim r="),
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
        ("{(s k)}", "--dim k="),
    ),
    (
        "a sum of two unknowns",
        {"b.0": (1,)},
        ["b.{i} -> c.{i+n}"],
        "unknown-dim",
        ("n", "--dim n=", "b.{i} -> c.{i+n}"),
    ),
    ("a range of an unknown end", {"b.0": (1,)}, ["b.{i:0..n} -> c.{i}"], "unknown-dim", ("'n'", "--dim n=")),
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
    ("an op that nobody knows", {"a": (1,)}, ["a -> b | cats(bf16)"], "bad-op", ("cats", "did you mean cast?")),
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


TARGETS: list[tuple[str, Shapes, Any, Shapes, str, tuple[str, ...]]] = [
    (
        "another shape",
        {f"l.{i}": (2, 3) for i in range(3)},
        ["l.{i} -> m.{i}"],
        {f"m.{i}": (3, 2) for i in range(3)},
        "shape-mismatch",
        ("rule makes 'm.0' [2, 3]; target wants [3, 2]", "m.{1,2}", "l.0 [2, 3]", "[x y] -> [y x]"),
    ),
    (
        "more experts than the target",
        {f"e.{i}": (2,) for i in range(3)},
        ["e.{e} [d] -> b [e d]"],
        {"b": (4, 2)},
        "shape-mismatch",
        ("3 rows against 4",),
    ),
    (
        "keys that the target lacks",
        {f"l.{i}": (2,) for i in range(3)},
        ["l.{i} -> m.{i}"],
        {"m.0": (2,), "m.1": (2,)},
        "unexpected-targets",
        ("1 key that the plan makes is not in the target", "m.2", 'drop = ["l.2"]'),
    ),
    (
        "keys that nothing makes",
        {"a": (2,)},
        ["a -> b"],
        {"b": (2,), "h.0": (1,), "h.1": (1,)},
        "missing-keys",
        ("2 target keys are made by no rule", "h.{0,1}", '"h.{i}"'),
    ),
    (
        "an initialiser that matches nothing",
        {"a": (2,)},
        Recipe(["a -> b"], init={"c": "zeros"}),
        {"b": (2,)},
        "unused-init",
        ("'c' matches no target key",),
    ),
    (
        "an initialiser of what is made",
        {"a": (2,)},
        Recipe(["a -> b"], init={"b": "zeros"}),
        {"b": (2,)},
        "init-and-made",
        ("'b'",),
    ),
]


@pytest.mark.parametrize(
    ("shapes", "recipe", "target", "code", "said"), [t[1:] for t in TARGETS], ids=[t[0] for t in TARGETS]
)
def test_a_target_that_does_not_fit_is_told(
    shapes: Shapes, recipe: Any, target: Shapes, code: str, said: tuple[str, ...]
) -> None:
    error = refused(shapes, recipe, target)
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


def test_dtypes_that_differ_cannot_be_gathered() -> None:
    source = {"e.0": cs.TensorSpec([2], "F32"), "e.1": cs.TensorSpec([2], "F16")}
    with pytest.raises(cs.PlanError) as caught:
        cs.plan(source, "e.{e} [d] -> w [e d]")
    assert problems(caught.value) == ["dtype-mismatch"]
    assert "cast" in str(caught.value) and "e.{e} [d] -> w [e d]" in str(caught.value)


@pytest.mark.parametrize(
    "rule", ["a [x y] -> q [y x]", "a [(p x) y] -> {p:q,k} [x y]", "a [x y] -> q [(x y)]", "a.{i} [x y] -> q [i x y]"]
)
def test_packed_elements_are_not_moved(rule: str) -> None:
    keys = ["a.0", "a.1"] if "{i}" in rule else ["a"]
    with pytest.raises(cs.PlanError) as caught:
        make_plan({k: cs.TensorSpec([4, 8], "F4") for k in keys}, Recipe(rule), lambda name: Recipe())
    assert problems(caught.value) == ["packed-dtype"]


def test_packed_tensors_are_copied_whole() -> None:
    plan = make_plan({"a": cs.TensorSpec([4, 8], "F4")}, Recipe("a -> b"), lambda name: Recipe())
    assert plan.specs == {"b": cs.TensorSpec([4, 8], "F4")} and plan.steps[0].kind == "copy"


def test_a_lossy_cast_is_asked_for() -> None:
    source, target = {"a": torch.ones(2)}, {"b": cs.TensorSpec([2], "BF16")}
    with pytest.raises(cs.PlanError) as caught:
        cs.plan(source, "a -> b", target)
    assert problems(caught.value) == ["dtype-mismatch"] and "can lose bits" in str(caught.value)
    assert cs.plan(source, "a -> b", target, dtype="model").casts == {"b": ("F32", "BF16")}
    assert cs.plan(source, "a -> b", target, dtype="source").state_dict()["b"].dtype == torch.float32
    with pytest.raises(cs.PlanError):
        cs.plan({"a": torch.ones(2, dtype=torch.bfloat16)}, "a -> b", {"b": cs.TensorSpec([2], "F32")}, dtype="error")


def test_recipes_that_use_each_other_are_refused() -> None:
    library = {name: Recipe(scopes=[Scope(Recipe(rest=None), use=other)]) for name, other in (("x", "y"), ("y", "x"))}
    with pytest.raises(cs.RecipeError) as caught:
        make_plan(specs({"a": (1,)}), library["x"], library.__getitem__)
    assert problems(caught.value) == ["circular-use"] and "y -> x -> y" in str(caught.value)


def test_an_unknown_key_names_the_rules_that_nearly_match() -> None:
    plan = cs.plan(specs({"h.0.mlp.w": (2,)}), "h.{i}.mlp.w -> layers.{i}.fc.w")
    with pytest.raises(cs.PlanError) as caught:
        plan.explain("h.0.attn.w")
    assert problems(caught.value) == ["unknown-key"]
    assert "nearly: h.{i}.mlp.w -> layers.{i}.fc.w  (segment 3 is 'attn', the rule wants 'mlp')" in str(caught.value)
