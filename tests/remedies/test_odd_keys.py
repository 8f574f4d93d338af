"""What a help says of keys that no model has: pasted, it names these keys and no other."""

from __future__ import annotations

import tomllib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.language.captures import escape
from ckptsurgery.language.keys import KeyPattern

PARTS = [*"ab0{}'\"\\/|:?#,&=[]+-> \t\x7fé", "->", "...", "."]
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join)


def refused(keys: list[str]) -> cs.Diagnostic:
    """The diagnostic on keys that no rule takes."""
    try:
        cs.plan({key: np.ones(2, np.float32) for key in [*keys, "used"]}, ["used -> used"])
    except cs.PlanError as error:
        (problem,) = error.diagnostics
        return problem
    raise AssertionError("nothing was refused")


@given(keys=st.lists(NAMES.filter(lambda key: key != "used"), min_size=1, max_size=3, unique=True))
def test_the_drop_that_is_offered_drops_these_keys(keys: list[str]) -> None:
    problem = refused(keys)
    offered = next(remedy for remedy in problem.remedies if remedy.argument == "drop")
    source = {key: np.ones(2, np.float32) for key in [*keys, "used"]}
    assert set(cs.plan(source, cs.Recipe(["used -> used"], drop=offered.value)).specs) == {"used"}
    # as a person copies it from the screen into a recipe
    line = next(line for line in str(problem).splitlines() if "drop = [" in line)
    text = line[line.index("drop = [") : line.rindex("] in the recipe") + 1]
    assert tomllib.loads(text)["drop"] == list(offered.value)


@given(key=NAMES)
def test_a_key_that_is_spelled_as_a_pattern_is_that_key_alone(key: str) -> None:
    assert KeyPattern.parse(escape(key)).match(key) is not None
    assert KeyPattern.parse(escape(key)).match(key + "x") is None
