"""A help that can be pasted is pasted: the same problem does not come again, and the result is right."""

from __future__ import annotations

import ast
import re
import tempfile
from itertools import chain
from pathlib import Path

import load_cases
import plan_cases
import pytest
from pasting import Case, problem_of, settled

import ckptsurgery as cs
from ckptsurgery.cli.remedies import shell_text

PACKAGE = Path(cs.__file__).parent
STACK = Path(tempfile.mkdtemp())
CASES = list(
    chain(
        plan_cases.recipes(),
        plan_cases.targets(),
        plan_cases.files(STACK),
        plan_cases.texts(STACK),
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
    problem = problem_of(case, case.arguments())
    remedies = problem.remedies
    told = shell_text(problem, ()).partition(" = help: ")[2]
    assert not re.search(r"(?<![\w-])--[a-z]", str(problem)), "an option of the command line, in Python"
    assert not re.search(r"\b(assign|partial|keep|init|by_file)=", told), "an argument of Python, on the command line"
    rights = case.right if isinstance(case.right, tuple) else (case.right,) * len(remedies)
    for number, (remedy, right) in enumerate(zip(remedies, rights)):
        result = settled(case, problem, number)
        assert right is None or right(result), (remedy, result)


class TestThatNoneIsLeftOut:
    def test_every_code_with_a_remedy_has_a_case(self) -> None:
        known = {case.code for case in CASES} | OUT_OF_REACH.keys()
        patterns = [
            re.compile(code) for path in PACKAGE.rglob("*.py") for code in offering(ast.parse(path.read_text()))
        ]
        assert patterns and not [p.pattern for p in patterns if not any(map(p.fullmatch, known))]


OUT_OF_REACH = {
    "part-of-a-folder": "tests/storage/test_gguf_in_parts.py opens what it names",
    "header-too-large": "takes a header of 100 MB",
    "other-device": "takes a second device",
    "transposed-square": "tests/transfer/test_doubts.py pastes it",
    "output-changed": "takes a second writer",
    "extra-state-unbuilt": "tests/transfer/test_extra_state.py drops what it names",
    **dict.fromkeys(
        (
            "left-behind",
            "unknown-tree",
            "dtype-mix",
            "lost-tie",
            "ties-differ",
            "pickle",
            "total-size",
            "interrupted-save",
        ),
        "tests/remedies/test_pasted_commands.py runs the command that is printed",
    ),
    **dict.fromkeys(("carry-lost", "carry-unknown", "groups-differ"), "tests/running/test_carried_states.py does it"),
    "extract-others": "tests/low_rank/test_extracting.py passes both of its words",
    "extract-whole": "tests/low_rank/test_extracting.py passes its word",
    "bad-carry": "tests/running/test_carried_states.py holds it",
    "unknown-code": "tests/docs/test_explanations.py asks for what it names",
    **dict.fromkeys(("no-specs", "unknown-model-type"), "tests/exchange holds what an import lacks"),
    "dtype-not-in-format": "tests/storage/test_gguf.py holds it",
    "not-a-model": "tests/witness assigns the model to the watch, as it says",
    **dict.fromkeys(("first-values", "tied-apart"), "tests/sharding/test_resharding_remedies.py pastes it"),
    "no-architecture": "tests/storage/test_gguf.py gives a template",
    "still-packed": "tests/reporting/test_packed_weights.py plans with the recipe",
    "recipe-fits": "tests/real holds it, on a model that a recipe that ships is for",
}


def offering(tree: ast.Module) -> set[str]:
    """The codes, as patterns, of diagnostics that are made with remedies."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        callee = getattr(node.func, "id", getattr(node.func, "attr", ""))
        names = {getattr(part, "id", getattr(part, "attr", "")) for arg in node.args[1:] for part in ast.walk(arg)}
        offers = any(word.arg == "remedies" for word in node.keywords)
        if offers or (callee == "problem" and names & {"Remedy", "drops", "meant_instead", "meant_base", "near"}):
            found |= {pattern for pattern in [_pattern(node.args[0])] if pattern}
    return found


def _pattern(code: ast.expr) -> str | None:
    if isinstance(code, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "[a-z]+" for p in code.values)
    return code.value if isinstance(code, ast.Constant) and isinstance(code.value, str) else None
