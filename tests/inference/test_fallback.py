"""Every inferred recipe plans: whatever was removed or renamed, and whatever was found, contradictions among it."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.inference.by_names import finish
from ckptsurgery.inference.fallback import planned
from ckptsurgery.inference.matches import Matched
from ckptsurgery.inference.moves import TensorMove
from ckptsurgery.inference.sides import UnitSide
from ckptsurgery.inference.suggestion import Suggestion
from ckptsurgery.language.toml import loads

Specs = dict[str, cs.TensorSpec]
DATA = Path(__file__).parent.parent / "data" / "corpus"


@cache
def corpus() -> list[tuple[Specs, Specs]]:
    found = []
    for path in sorted(DATA.glob("*.json.gz")):
        pair = json.loads(gzip.decompress(path.read_bytes()))
        if len(pair["source"]) < 60:
            found.append(
                tuple(
                    {k: cs.TensorSpec(tuple(v["shape"]), v["dtype"]) for k, v in pair[side].items()}
                    for side in ("source", "target")
                )
            )
    return found


def holds(source: Specs, target: Specs, found: Suggestion) -> None:
    """The recipe reads back and plans, makes what it says and names all that it drops."""
    _, plan, problems = planned(source, {})  # a recipe that names nothing does not plan, unless nothing is there
    assert (plan is None) == bool(source) and bool(problems) == bool(source)
    again = loads(found.recipe.dumps())
    made = cs.plan(dict(source), again)
    open_ = {*found.unmatched_target, *(q.target for q in found.ambiguous)}
    assert {*made.specs, *made.ties} == set(target) - open_
    assert set(made.dropped) == set(found.unmatched_source)
    assert all(made.specs[k].shape == target[k].shape for k in made.specs)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_recipe_plans_whatever_was_removed_and_renamed(data: st.DataObject) -> None:
    pairs = corpus()
    source, target = pairs[data.draw(st.integers(0, len(pairs) - 1))]
    random = data.draw(st.randoms(use_true_random=False))
    sides = []
    for side in (source, target):
        share = random.choice([0.0, 0.05, 0.5])
        kept = {k: s for k, s in side.items() if random.random() >= share}
        word = random.choice(["", *(w for k in list(side)[:5] for w in k.split(".") if w.isalpha())])
        new = random.choice(["x", "7", "a.b", "weight", "{q}", "out"])
        renamed = {(k.replace(word, new) if word and random.random() < 0.7 else k): s for k, s in kept.items()}
        sides.append(renamed or side)
    holds(*sides, cs.suggest(*sides))


def test_contradictions_in_what_was_found_leave_a_recipe_that_plans() -> None:
    spec = cs.TensorSpec((4, 2), "F32")
    source = dict.fromkeys(["a", "b", "c.{x}", "d"], spec)
    target = dict.fromkeys(["one", "two", "three"], spec)
    moves = [
        TensorMove(("a",), ("one",)),
        TensorMove(("b",), ("one",)),  # a second source for the same
        TensorMove(("b",), ("two",), "[a b]", "[b a]"),  # another shape than the target's
        TensorMove(("c.{x}",), ("three",)),
    ]
    nothing = UnitSide((), True)
    found = finish(source, target, (), Matched(nothing, nothing, moves, {"two": "three"}), ())
    holds(source, target, found)
    assert {*cs.plan(dict(source), found.recipe).specs} == {"one", "three"}
    assert found.recipe.tie == {"two": "three"}
    assert "b" in found.unmatched_source


@pytest.mark.parametrize("source", [{}, {"a": cs.TensorSpec((2,), "F32")}])
def test_where_nothing_was_found_everything_is_dropped(source: Specs) -> None:
    nothing = UnitSide((), True)
    target = {"b": cs.TensorSpec((3,), "F32")}
    found = finish(source, target, (), Matched(nothing, nothing, []), ())
    holds(source, target, found)
    assert found.coverage == 0.0
