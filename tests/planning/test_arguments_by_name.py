"""Arguments of ops by name: numbers, lists and tables of [dims], and formulas over them and the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from both_ways import both_ways, problems, refused
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.language.calls import Expression, parse_call
from ckptsurgery.language.dims import Dims, evaluate
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.language.toml import loads

ROWS = torch.arange(16.0).reshape(8, 2)


def made(op: str, **given: Any) -> torch.Tensor:
    dims = given.pop("dims", {})
    recipe = loads(Recipe([f"w -> v | {op}"], dims=dims).dumps())  # as a file says it
    return cs.plan({"w": ROWS}, recipe, **given).state_dict()["v"]


@pytest.mark.parametrize(
    ("op", "given", "wanted"),
    [
        ("slice_rows(0, n)", {"dims": {"n": 5}}, ROWS[:5]),
        ("slice_rows(0, n)", {"dims": {"n": 0}}, ROWS[:0]),
        ("slice_rows(zero, n)", {"dims": {"n": 2, "zero": 0}}, ROWS[:2]),
        ("slice_rows(stop=n)", {"dims": {"n": "config.n"}, "config": {"n": 3}}, ROWS[:3]),
        ("slice_rows(0, n)", {"dims": {"n": "m + 1", "m": "config.m ?? 3"}}, ROWS[:4]),
        ("slice_rows(n // 2, config.a.b)", {"dims": {"n": 4}, "config": {"a": {"b": 7}}}, ROWS[2:7]),
        ("slice_rows(0, config.n ?? 6)", {}, ROWS[:6]),
        ("slice_rows(stop=(n+1)*(m - 1))", {"dims": {"n": 1, "m": 3}}, ROWS[:4]),
        ('slice_rows(0, "n - 1")', {"dims": {"n": 5}}, ROWS[:4]),
        ("add(0.5)", {}, ROWS + 0.5),
        ("add(x)", {"dims": {"x": 0.5}}, ROWS + 0.5),
        ("add(x)", {"dims": {"x": -1}}, ROWS - 1),
        ("add(-x)", {"dims": {"x": 0.5}}, ROWS - 0.5),
        ("mul(1 - x)", {"dims": {"x": 0.25}}, ROWS * 0.75),
        ("mul(config.alpha / config.r)", {"config": {"alpha": 8, "r": 16}}, ROWS * 0.5),
        ("mul(config.scale)", {"config": {"scale": 0.125}}, ROWS * 0.125),
        ("resize_rows(n, rows=m)", {"dims": {"n": 3, "m": [2, 1, 0]}}, ROWS[[2, 1, 0]]),
        ("resize_rows(2, rows=[m, 0])", {"dims": {"m": 3}}, ROWS[[3, 0]]),
        ("resize_rows(n, rows=m)", {"dims": {"n": 2, "m": {"0": 5, "1": "k"}, "k": 4}}, ROWS[[5, 4]]),
        ("resize_rows(n, fill=zeros)", {"dims": {"n": 9, "zeros": 5}}, torch.cat([ROWS, torch.zeros(1, 2)])),
    ],
)
def test_an_op_is_given_what_a_name_or_formula_stands_for(op: str, given: Any, wanted: torch.Tensor) -> None:
    assert torch.equal(made(op, **given), wanted)


def test_sizes_of_this_run_reach_ops_too() -> None:
    assert torch.equal(made("slice_rows(0, n)", dims={"n": 5}), ROWS[:5])
    plan = cs.plan({"w": ROWS}, Recipe(["w -> v | slice_rows(0, (n) * (m))"]), dims={"n": 2, "m": 3})
    assert torch.equal(plan.state_dict()["v"], ROWS[:6])


def test_a_name_may_be_an_axis_too() -> None:
    recipe = Recipe(["w [v d] -> w [d v] | slice_rows(0, d)"], dims={"d": 2})
    assert torch.equal(cs.plan({"w": ROWS}, recipe).state_dict()["w"], ROWS.T)


@pytest.mark.parametrize(
    ("op", "given", "codes", "text"),
    [
        ("slice_rows(0, n)", {}, ["bad-op"], "dims do not name 'n'"),
        ("slice_rows(0, n)", {"dims": {"n": "config.n"}}, ["bad-op"], "'config.n'"),
        ("slice_rows(0, config.n)", {}, ["bad-op"], "'config.n' has no number"),
        ("slice_rows(0, n)", {"dims": {"n": 2.5}}, ["bad-op"], "dims say n = 2.5"),
        ("slice_rows(0, n // 2)", {"dims": {"n": 5}}, ["bad-op"], "5 // 2 is not exact"),
        ("mul(1 / n)", {"dims": {"n": 0}}, ["bad-op"], "division by 0"),
    ],
)
def test_what_has_no_number_is_refused(op: str, given: Any, codes: list[str], text: str) -> None:
    error = refused({"w": (8, 2)}, Recipe([f"w -> v | {op}"], **given))
    assert problems(error) == codes
    assert text in str(error)


@pytest.mark.parametrize("text", ["slice_rows(0, n +)", "slice_rows(0, 5 // 2)", "add((1)", "add(1 2)", "add(config.)"])
def test_what_is_no_formula_is_refused_where_it_is_read(text: str) -> None:
    with pytest.raises(cs.RecipeError):
        parse_call(text)


@pytest.mark.parametrize("text", ["add(1 - w)", "f(a + b, [c * 2, config.x.y], k=-n)", 'f((a + b) * c, {"x"=a / 2})'])
def test_formulas_are_text_and_object(text: str) -> None:
    call = parse_call(text)
    assert str(call) == text and parse_call(str(call)) == call
    assert any(isinstance(v, Expression) for v in (*call.args, *(v for _, v in call.keywords)))


def test_what_undoes_an_op_by_name_has_the_name_too() -> None:
    recipe = Recipe(["w -> v | mul(x)", "b -> c | add(x)", "d -> e | add(1 - x)"], dims={"x": 0.5})
    source = {key: torch.tensor([1.0, 2.0]) for key in "wbd"}
    wanted = {"v": source["w"] * 0.5, "c": source["b"] + 0.5, "e": source["d"] + 0.5}
    back = recipe.inverse()
    assert [str(rule) for rule in back.rules] == ["v | mul(1 / x) -> w", "c | add(-x) -> b", "e | add(-(1 - x)) -> d"]
    assert back.inverse() == recipe
    assert all(torch.equal(t, wanted[k]) for k, t in cs.plan(source, recipe).state_dict().items())
    returned = cs.plan(wanted, back).state_dict()
    assert all(torch.equal(t, source[k]) for k, t in returned.items())
    again = cs.plan(wanted, back, dims={"x": 0.25}).state_dict()  # a number of this run goes before
    assert torch.equal(again["w"], wanted["v"] * 4)
    with pytest.raises(cs.RecipeError, match="cannot be undone"):
        Recipe(["w -> v | slice_rows(0, n)"]).inverse()
    with pytest.raises(cs.RecipeError, match="no op is called"):
        Recipe(["w -> v | no_such_op(n)"]).inverse()


def test_initialisers_are_given_numbers_too() -> None:
    recipe = Recipe(["w -> w"], init={"z": "normal(std=s * 2)"}, dims={"s": 0.01})
    model = torch.nn.ParameterDict({"w": torch.zeros(2), "z": torch.zeros(4096)})
    cs.plan({"w": torch.ones(2)}, recipe, target=model).load_into(model)
    assert 0.018 < float(model["z"].detach().std()) < 0.022
    error = refused({"w": (2,)}, Recipe(["w -> w"], init={"z": "normal(std=config.s)"}), {"w": (2,), "z": (3,)})
    assert "bad-init" in problems(error) and "'config.s' has no number" in str(error)


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), [0.5, True], {"a": [[1]]}])
def test_what_is_no_number_is_no_dim(value: Any) -> None:
    with pytest.raises(cs.RecipeError, match="is no size"):
        Recipe(["a -> b"], dims={"x": value})


@pytest.mark.parametrize("value", [0.5, -1])
def test_a_number_that_is_no_size_cannot_size_an_axis(value: Any) -> None:
    assert problems(refused({"w": (6,)}, Recipe(["w [(a b)] -> w [a b]"], dims={"a": value}))) == ["bad-dim"]


def test_a_shift_may_be_negative() -> None:
    source = {f"l.{i}.w": torch.full((2,), float(i)) for i in (2, 3)}
    wanted = {"x.0.w": source["l.2.w"], "x.1.w": source["l.3.w"]}
    both_ways(Recipe(["l.{i}.w -> x.{i+n}.w"], dims={"n": -2}), source, wanted)


NUMBERS = st.one_of(st.integers(-99, 99), st.floats(-99, 99, allow_nan=False).map(lambda x: round(x, 3)))


@given(st.dictionaries(st.sampled_from("abc"), NUMBERS, min_size=3), st.data())
def test_formulas_compute_as_python_does(names: dict[str, Any], data: st.DataObject) -> None:
    """The same text, read by Python."""
    parts = [data.draw(st.one_of(st.sampled_from("abc"), st.integers(0, 9).map(str), st.just("0.25")))]
    for _ in range(data.draw(st.integers(0, 4))):
        parts += [
            data.draw(st.sampled_from([" + ", "-", " * "])),
            data.draw(st.sampled_from(["a", "b", "c", "2", "(a - b)"])),
        ]
    text = "".join(parts)
    wanted = eval(text, {}, names)
    assert evaluate(text, {}, names.get) == wanted
    assert Dims({**names, "x": text}).value("x") == wanted
    op = made(f"add({text})", dims=names)
    assert torch.equal(op, (ROWS.double() + wanted).float()) or torch.allclose(op, ROWS + wanted)
