"""A help that can be pasted is pasted: the same problem does not come again, and the result is right."""

from __future__ import annotations

import tempfile
from itertools import chain
from pathlib import Path

import load_cases
import plan_cases
import pytest
from pasting import Case, problem_of, settled

import ckptsurgery as cs

PACKAGE = Path(cs.__file__).parent
STACK = Path(tempfile.mkdtemp())
CASES = list(
    chain(
        plan_cases.recipes(),
        plan_cases.targets(),
        plan_cases.files(STACK),
        plan_cases.outputs(STACK),
        load_cases.keys(),
        load_cases.shapes(),
        load_cases.ties(),
        load_cases.values(),
        load_cases.selecting(),
        load_cases.layouts(STACK),
    )
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_remedy_settles_its_problem(case: Case) -> None:
    remedies = problem_of(case, case.arguments()).remedies
    rights = case.right if isinstance(case.right, tuple) else (case.right,) * len(remedies)
    for number, (remedy, right) in enumerate(zip(remedies, rights)):
        result = settled(case, case.arguments(), number)
        assert right is None or right(result), (remedy, result)
