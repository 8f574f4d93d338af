"""A part of a flat index that is restricted on the other side: a place for each value, or a diagnostic."""

from __future__ import annotations

import pytest

import ckptsurgery as cs

SOURCE = {f"b.{i}.w": cs.TensorSpec([2], "F32") for i in range(3)}


@pytest.mark.parametrize("outer", ["{s:1}", "{s:1..1}", "{s:a}"])
def test_an_index_without_a_place_is_told(outer: str) -> None:
    with pytest.raises(cs.PlanError) as error:
        cs.plan(SOURCE, cs.Recipe([f"b.{{(s t)}}.w -> s.{outer}.{{t}}.w"], dims={"t": [1, 2]}))
    assert [d.code for d in error.value.diagnostics] == ["wrong-extent"]


def test_choices_spell_the_parts_by_position() -> None:
    plan = cs.plan(SOURCE, cs.Recipe(["b.{(s t)}.w -> {s:stem,body}.{t}.w"], dims={"t": [1, 2]}))
    assert list(plan.specs) == ["stem.0.w", "body.0.w", "body.1.w"]
