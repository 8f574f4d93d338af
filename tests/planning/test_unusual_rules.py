"""What seldom happens to a plan: results that no key takes, sizes below zero, casts that nothing can make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from both_ways import Shapes, problems, refused, specs_of
from torch import nn

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe, Scope
from ckptsurgery.planning.options import DTYPE_POLICIES
from ckptsurgery.transfer.orienting import live_modules

W, AB = {"w": (4, 4)}, {"a": (4,), "b": (4,)}


@pytest.mark.parametrize(
    ("rule", "shapes", "text"),
    [
        ("a, b -> c, d | same", AB, "same makes 1 tensor, and the rule has 2 targets"),
        ("a, b -> c, d, e | lerp(0.5)", AB, "lerp(t=0.5) makes 1 tensor, and the rule has 3 targets"),
        ("w -> B | low_rank(2)", W, "low_rank(rank=2) makes 2 tensors, and the rule has 1 target"),
        ("w -> B, A, C | low_rank(2)", W, "low_rank(rank=2) makes 2 tensors, and the rule has 3 targets"),
        ("w [(i x) y] -> B.{i:0..1} [x y] | low_rank(2)", W, "low_rank(rank=2) makes 2 tensors, and the rule has 1"),
        ("w | low_rank(2) -> B", W, "2 tensors arrive at 1 target: an op has to join them"),
        ("w -> q | fp8_quant(per=tensor)", W, "fp8_quant(per=tensor) makes 2 tensors, and the rule has 1 target"),
    ],
)
def test_a_rule_names_all_that_its_op_makes_and_nothing_else(rule: str, shapes: Shapes, text: str) -> None:
    error = refused(shapes, Recipe([rule]))
    assert problems(error) == ["bad-op"] and text in error.diagnostics[0].headline


@pytest.mark.parametrize(
    ("shapes", "recipe", "code", "text"),
    [
        (
            {"w": (4, 2)},
            Recipe(["w [(p r:p) d] -> {p:q,k} [r:p d]"], dims={"r": {"q": 8}}),
            "size-mismatch",
            "'(p:q,k r:p)' should be 8 or more, but the dimension is 4",
        ),
        (
            {"q.w": (4, 3), "k.w": (4, 5)},
            Recipe(["{p:q,k}.w [r ...] -> w [(p r) ...]"]),
            "size-mismatch",
            "dimension 0 of '...' is 3 in one tensor and 5 in another",
        ),
        (
            {"a": (4,)},
            Recipe(["a -> a"], init={"h.{l:w,b} [3]": "zeros", "h.w [3]": "ones"}),
            "init-twice",
            "'h.w' is initialised in two ways",
        ),
        ({"a": (4,)}, Recipe(["a -> a"], tie={"a": "a"}), "tied-and-made", "leave the line out"),
        ({"a": (4,)}, Recipe(["a -> a"], init={"a": "zeros"}), "init-and-made", "a rule makes it too"),
        ({"a.b.c": (4,)}, Recipe([], rest="{x...}.{y...} -> {y...}.{x...}"), "ambiguous-match", "in two ways"),
        (
            {"a.b.c": (4,)},
            Recipe(["a.b.c -> w"], same={"{x...}.{y...}": "q.{x...}"}),
            "ambiguous-match",
            "'{x...}.{y...}' can read 'a.b.c' in two ways",
        ),
        ({"l.0.w": (4,)}, Recipe(["l.0.w -> w"], drop=["l.{i:0..n}.x"]), "unknown-dim", "'n' is not in dims"),
        (
            {"m.a": (4,)},
            Recipe(scopes=[Scope(Recipe(["a -> x"]).then(Recipe(["x -> y"])), source="m.")]),
            "bad-scope",
            "a recipe with stages cannot stand in a scope",
        ),
        ({"m.a": (4,)}, Recipe(scopes=[Scope(Recipe([]), source="m.", use="no/such")]), "unknown-recipe", "no/such"),
    ],
)
def test_it_is_refused_by_what_is_wrong(shapes: Shapes, recipe: Recipe, code: str, text: str) -> None:
    error = refused(shapes, recipe)
    assert code in problems(error) and text in str(error)
    assert not any((d.help or "").startswith("or ") for d in error.diagnostics)


def test_a_cast_that_nothing_makes_is_not_offered() -> None:
    for policy in ("lossless", "model"):
        with pytest.raises(cs.PlanError) as caught:
            cs.plan(specs_of({"a": (4,)}), "a -> a", target={"a": cs.TensorSpec((4,), "F4")}, dtype=policy)
        error = caught.value
        assert problems(error) == ["dtype-mismatch"] and "which no cast makes" in str(error)
        assert [remedy.value for remedy in error.diagnostics[0].remedies] == ["source"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        self.y = self.x
        self.h = nn.Parameter(torch.zeros(2))


def test_every_key_of_either_side_is_explained() -> None:
    source = specs_of({"a": (4,), "b": (4,), "c": (2,)})
    recipe = Recipe(["a -> x"], same={"b": "a"}, drop=["c"], init={"h": "zeros"})
    plan = cs.plan(source, recipe, target=Tied(), dtype="model")

    def told(key: str) -> tuple[str, str]:
        explained = plan.explain(key)
        return explained.role, str(explained)

    assert told("y") == ("tied", "y\n  shares its tensor with x")
    assert told("h") == ("initialised", "h\n  initialised by zeros")
    assert told("b") == ("proved", "b\n  proved equal to a, then left out")
    assert told("c")[0] == "dropped"
    role, text = told("a")
    assert role == "source" and "makes     x  BF16 [4]" in text
    assert "cast      F32 -> BF16, as the target wants" in text and "tied      y shares it" in text
    assert told("x")[0] == "target" and told("x")[1].partition("\n")[2] == text.partition("\n")[2]
    with pytest.raises(cs.PlanError) as caught:
        plan.explain("z")
    assert problems(caught.value) == ["unknown-key"]


def test_copies_of_one_source_are_explained_as_such() -> None:
    plan = cs.plan(specs_of({"a": (4,)}), "a -> c, d")
    assert "handed on as F32 [4], F32 [4]" in str(plan.explain("c"))


def test_a_key_that_a_rule_nearly_names_is_told_where_they_part() -> None:
    plan = cs.plan(specs_of({"a.b.0.w": (4,)}), "a.b.{i}.w -> x.{i}.w")
    for key, where in {
        "a.b.0.v": "segment 4 is 'v', the rule wants 'w'",
        "a.b.0": "the key has 3 segments, the rule 4",
    }.items():
        with pytest.raises(cs.PlanError) as caught:
            plan.explain(key)
        assert where in str(caught.value)


def test_a_patch_embedding_of_another_patch_is_resized_by_the_recipe_that_is_offered() -> None:
    model, source = nn.Conv2d(3, 4, 8), nn.Conv2d(3, 4, 4).state_dict()
    with pytest.raises(cs.LoadError) as caught:
        cs.load_into(model, source)
    remedy = caught.value.diagnostics[0].remedies[0]
    assert remedy.value == {"rules": ["weight -> weight | resize_patch_embed([8, 8])"], "rest": "keep"}
    cs.load_into(model, source, Recipe(**remedy.value))
    assert model.weight.shape == (4, 3, 8, 8) and torch.equal(model.bias, source["bias"])  # type: ignore[arg-type]


class Table(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize(
    ("have", "want", "op"),
    [
        ((81, 4), (169, 4), "resize_rel_pos_bias(7)"),
        ((84, 4), (172, 4), "resize_rel_pos_bias(7, extra=3)"),
        ((1, 16, 32), (1, 49, 32), "resize_pos_embed(grid=[7, 7])"),
        ((1, 17, 32), (1, 50, 32), "resize_pos_embed(grid=[7, 7], prefix=1)"),
    ],
)
def test_a_table_of_positions_is_resized_by_the_op_that_is_offered(
    have: tuple[int, ...], want: tuple[int, ...], op: str
) -> None:
    model, source = Table(*want), Table(*have).state_dict()
    with pytest.raises(cs.LoadError) as caught:
        cs.load_into(model, source)
    offered = [remedy.value for remedy in caught.value.diagnostics[0].remedies if remedy.argument == "recipe"]
    assert offered == [{"rules": [f"table -> table | {op}"], "rest": "keep"}]
    assert cs.load_into(model, source, Recipe(**offered[0])).loaded == ("table",)


def test_numbers_are_drawn_from_seed_nought_where_none_is_given() -> None:
    recipe = Recipe(["a -> a"], init={"b [64]": "normal"})
    drawn, same, other = (
        cs.plan({"a": torch.ones(1)}, recipe, **seed).state_dict()["b"] for seed in ({}, {"seed": 0}, {"seed": 1})
    )
    assert torch.equal(drawn, same) and not torch.equal(drawn, other)


def test_the_modules_of_a_subtree_are_known_by_their_names_in_it() -> None:
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "ab": nn.Linear(1, 1)})
    assert live_modules(net, "a") == {"0": net["a"][0], "1": net["a"][1]}  # type: ignore[index]
    assert set(live_modules(net)) == {"", "a", "a.0", "a.1", "ab"}
    assert set(live_modules({"x.": net, "n": 3})) == {"x", "x.a", "x.a.0", "x.a.1", "x.ab"}


def test_the_keys_of_a_plan_stand_in_the_order_of_its_target() -> None:
    source, recipe = specs_of({"a": (1,), "b": (1,), "c": (1,)}), Recipe(["{k} -> n.{k}"], init={"n.d [1]": "ones"})
    assert cs.plan(source, recipe).keys == ("n.a", "n.b", "n.c", "n.d")
    target = specs_of({f"n.{k}": (1,) for k in "dcba"})
    assert cs.plan(source, recipe, target=target).keys == ("n.d", "n.c", "n.b", "n.a")


def test_of_many_patterns_that_nothing_names_twelve_are_listed() -> None:
    error = refused({f"{letter}.w": (n + 1,) for n, letter in enumerate("abcdefghijklmno")}, Recipe(["a.w -> x"]))
    (problem,) = error.diagnostics
    assert len(problem.notes) == 13 and problem.notes[-1] == "… and 2 more patterns"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("normal((", "it ends too early: '(' in 'normal(('"),
        ("nosuch", "no initialiser is called 'nosuch'"),
        ("normal(std=x)", "normal: std is a finite number, not 'x'"),
        ("uniform(1,2,3)", "3 arguments are too many: uniform takes a, b"),
        (3, "3 is neither an initialiser's name nor a callable"),
    ],
)
def test_an_initialiser_that_is_none_is_told_with_its_entry(value: object, text: str) -> None:
    error = refused({"a": (4,)}, Recipe(["a -> a"], init={"b [3]": value}))  # type: ignore[dict-item]
    assert problems(error) == ["bad-init"] and error.diagnostics[0].headline == f"[init] 'b [3]': {text}"


def test_what_has_no_text_or_no_ranks_is_not_saved(tmp_path: Path) -> None:
    plan = cs.plan({"a": torch.ones(4)}, "a -> b", config={"x": object()})
    for asked, code in (({"provenance": True}, "not-text"), ({"together": True}, "no-process-group")):
        with pytest.raises(cs.PlanError) as caught:
            plan.save(tmp_path / "x.safetensors", **asked)  # type: ignore[arg-type]
        assert problems(caught.value) == [code] and not list(tmp_path.iterdir())


def test_a_dtype_that_is_none_is_told_the_policies_and_the_nearest() -> None:
    for given, near in {"lossles": "did you mean 'lossless'? ", "int8": ""}.items():
        with pytest.raises(cs.PlanError) as caught:
            cs.plan({"a": torch.ones(4)}, "a -> b", dtype=given)
        policies = ", ".join(map(repr, DTYPE_POLICIES))
        assert caught.value.diagnostics[0].help == f'{near}one of {policies}, or a dtype such as "bf16"'
