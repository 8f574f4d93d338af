"""The parts of inference: shapes, numbers, vocabulary, reducing, assignment."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsurgery import TensorSpec
from ckptsurgery.inference.assignment import assign
from ckptsurgery.inference.digits import axes_of, digits_of
from ckptsurgery.inference.index_relations import relate
from ckptsurgery.inference.reduction import reduced
from ckptsurgery.inference.shapes import relations
from ckptsurgery.inference.units import read_units
from ckptsurgery.inference.vocabulary import concepts


@given(st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_assignment_is_the_best_of_all(rows: list[list[int]]) -> None:
    score = np.array(rows, dtype=float)
    best = max(sum(score[i, p[i]] for i in range(4)) for p in permutations(range(4)))
    assert sum(score[i, j] for i, j in assign(score, np.ones_like(score))) == pytest.approx(best)


@given(st.permutations([0, 1, 2, 3]), st.lists(st.sampled_from([2, 3, 5]), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_any_permutation_of_axes_is_read_off_its_effect(order: list[int], sizes: list[int]) -> None:
    places = np.arange(np.prod(sizes)).reshape(sizes).transpose(order).reshape(-1)
    digits = digits_of(places)
    assert digits is not None
    moved = np.zeros(1, dtype=int)
    for size, stride in digits:
        moved = (moved[:, None] + np.arange(size) * stride).reshape(-1)
    assert (moved == places).all()
    assert axes_of(digits, tuple(sizes), tuple(sizes[i] for i in order)) is not None


@pytest.mark.parametrize(
    ("source", "target", "kinds"),
    [
        ((4, 3), (4, 3), {"same"}),
        ((4, 4), (4, 4), {"same", "transpose"}),
        ((3, 3, 8, 16), (16, 8, 3, 3), {"transpose"}),
        ((8, 1, 1), (8,), {"squeeze"}),
        ((4, 2, 8), (8, 8), {"merge"}),
        ((8, 6), (2, 3, 8), {"split"}),
        ((4, 3), (3, 5), set()),
    ],
)
def test_shapes_are_related_by_what_could_turn_one_into_the_other(
    source: tuple[int, ...], target: tuple[int, ...], kinds: set[str]
) -> None:
    assert {r.kind for r in relations(source, target)} == kinds


@pytest.mark.parametrize(
    ("xs", "ys", "source", "target"),
    [
        ([(0,), (1,), (2,)], [(2,), (1,), (0,)], ("{i}",), ("{2-i}",)),
        ([(1,), (3,), (5,)], [(0,), (1,), (2,)], ("{2*i+1}",), ("{i}",)),
        ([(0, 0), (0, 1), (1, 0)], [(0, 0), (0, 1), (1, 0)], ("{i}", "{j}"), ("{i}", "{j}")),
        ([(0,), (1,), (2,)], [(0, 0), (1, 0), (1, 1)], ("{(stage block)}",), ("{stage}", "{block}")),
        ([(7,), (7,)], [(0,), (0,)], ("7",), ("0",)),
    ],
)
def test_numbers_go_over_by_one_relation(
    xs: list[tuple[int, ...]], ys: list[tuple[int, ...]], source: tuple[str, ...], target: tuple[str, ...]
) -> None:
    (found,) = relate(xs, ys, ([True] * len(xs[0]), [True] * len(ys[0])))
    assert (found.source, found.target) == (source, target)


def test_reducing_keeps_runs_that_only_one_side_has() -> None:
    spec = TensorSpec((2,), "F32")
    flat = {f"b.{i}.{m}": spec for i in range(6) for m in "xy"}
    nested = {f"s.{i // 2}.{i % 2}.{m}": spec for i in range(6) for m in "xy"}
    assert reduced(flat, nested)[0].keys == list(flat)


def test_what_was_left_out_is_known_by_what_stands_for_it() -> None:
    spec = TensorSpec((2,), "F32")
    many = {f"b.{i}.{m}": spec for i in range(9) for m in "xy"}
    one, _ = reduced(many, many)
    assert one.expanded(many, [k for k in one.keys if k.endswith("x")]) == [k for k in many if k.endswith("x")]


@pytest.mark.parametrize("words", ["q_proj", "query", "wq", "to_q", "Wq", "q"])
def test_the_field_has_many_words_for_a_query(words: str) -> None:
    assert "query" in dict(concepts(words))


def test_units_are_modules_and_lone_parameters() -> None:
    spec = TensorSpec((2,), "F32")
    keys = [
        "n.gamma",
        "n.beta",
        "b.gamma",
        "cls_token",
        "a.in_proj_weight",
        "a.in_proj_bias",
        "a.out.weight",
        "bn.running_mean",
    ]
    assert {u.path: set(u.leaves) for u in read_units((k, spec) for k in keys)} == {
        "n": {"weight", "bias"},
        "b.gamma": {"weight"},
        "cls_token": {"weight"},
        "a.in_proj": {"weight", "bias"},
        "a.out": {"weight"},
        "bn": {"mean"},
    }


def test_whether_a_key_stands_in_a_run_of_which_some_were_left_out_is_known() -> None:
    spec = TensorSpec((2,), "F32")
    many = {"a.0.x": spec, **{f"b.{i}.{m}": spec for i in range(9) for m in "xy"}}
    one, _ = reduced(many, many)
    assert [one.stands_in(k) for k in ("a.0.x", "b.5.y", "b.z")] == [False, True, False]
