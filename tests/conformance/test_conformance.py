"""The conformance suite, run by this implementation; the schema of recipes, and every recipe that ships against it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ckptsurgery as cs
from ckptsurgery.cli.program import app
from ckptsurgery.language import toml
from ckptsurgery.language.schema import LANGUAGE_VERSION

ROOT = Path(__file__).parents[2]
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}


def script(name: str) -> Any:
    """A module of `scripts/conformance`."""
    folder = str(ROOT / "scripts" / "conformance")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


run, ours = script("run"), script("ours")
CASES = dict(run.cases_of(run.CASES))
FILES = sorted(path.stem for path in run.CASES.glob("*.json"))


@pytest.mark.parametrize("file", FILES)
def test_every_case_is_answered_right(file: str) -> None:
    cases = {name: case for name, case in CASES.items() if name.startswith(f"{file}/")}
    wrong = {name: text for name, case in cases.items() if (text := run.judged(case, ours.answer(case)))}
    assert cases and wrong == {}


@pytest.mark.parametrize("file", FILES)
def test_inverses_lead_back(file: str) -> None:
    cases = {name: case for name, case in CASES.items() if name.startswith(f"{file}/") and "back" in case}
    assert [name for name, case in cases.items() if ours.answer_back(case) != {"tensors": case["source"]}] == []


def test_the_suite_is_small_and_covers_results_and_errors() -> None:
    assert sum(path.stat().st_size for path in run.CASES.iterdir()) < 300_000
    assert sum("errors" in case for case in CASES.values()) > 80
    assert sum("back" in case for case in CASES.values()) > 80


def test_another_program_can_be_judged_by_the_runner(tmp_path: Path) -> None:
    right = json.loads((run.CASES / "problems_of_targets.json").read_text())
    wrong = [{**right[0], "errors": ["something-else"]}]
    for name, cases, code in (("right", right, 0), ("wrong", wrong, 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cases.json").write_text(json.dumps(cases))
        programs = [str(ROOT / "scripts/conformance" / f"{one}.py") for one in ("run", "ours")]
        command = [sys.executable, programs[0], "--cases", str(tmp_path / name), "--", sys.executable, programs[1]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert f"{len(cases) - code} of {len(cases)} cases" in done.stdout


def invalid(schema: Mapping[str, Any], value: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """What of a value breaks a JSON schema; the keywords that the schema of recipes uses."""
    known = {"$schema", "$ref", "$defs", "title", "description", "type", "properties", "additionalProperties", "items",
             "anyOf", "enum", "const", "pattern"}  # fmt: skip
    assert schema.keys() <= known
    if "$ref" in schema:
        yield from invalid(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, root)
    if "anyOf" in schema and all(any(invalid(one, value, root)) for one in schema["anyOf"]):
        yield f"{value!r} is none of {schema['anyOf']}"
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{value!r} is another value"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, TYPES[k]) and (k == "boolean" or value is not True) for k in kinds):
        yield f"{value!r} is not {kinds}"
    elif isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{value!r} lacks {schema['pattern']!r}"
    elif isinstance(value, list):
        yield from (text for one in value for text in invalid(schema.get("items", {}), one, root))
    elif isinstance(value, dict):
        for key, inner in value.items():
            found = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
            yield from [f"the key {key!r}"] if found is False else invalid(found, inner, root)


def test_every_recipe_that_ships_is_valid_under_the_schema() -> None:
    schema = cs.recipes.schema()
    for path in sorted((ROOT / "recipes").glob("*/*.toml")):
        assert list(invalid(schema, tomllib.loads(path.read_text()), schema)) == [], path


@pytest.mark.parametrize(
    "tree",
    [
        {"schema": 2},
        {"rules": "a -> b"},
        {"rules": ["a"]},
        {"rest": "lose"},
        {"tie": {"a": 1}},
        {"dims": {"h": True}},
        {"scope": [{"sauce": "x."}]},
        {"then": [{"schema": 1}]},
        {"colour": "red"},
    ],
    ids=str,
)
def test_what_the_reader_refuses_the_schema_refuses(tree: dict[str, Any]) -> None:
    schema = cs.recipes.schema()
    assert list(invalid(schema, tree, schema))
    with pytest.raises(cs.RecipeError):
        cs.plan({}, toml.from_tree(tree))


def test_the_schema_has_the_keys_that_the_reader_knows() -> None:
    schema = cs.recipes.schema()
    assert schema["properties"].keys() == {*toml._RECIPE, "schema"}
    assert schema["$defs"]["scope"]["properties"].keys() == toml._SCOPE.keys()
    assert schema["$defs"]["stage"]["properties"].keys() == toml._RECIPE.keys()


def test_the_program_prints_the_schema() -> None:
    printed = CliRunner().invoke(app, ["recipes", "schema"])
    assert json.loads(printed.stdout) == cs.recipes.schema()
    assert LANGUAGE_VERSION in cs.recipes.schema()["title"]
