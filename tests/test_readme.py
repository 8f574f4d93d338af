"""The README is true: its commands and programs are run word for word, one after the other, in a fresh folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from doctest import ELLIPSIS, OutputChecker
from pathlib import Path

import pytest
from typer.main import get_command

import ckptsurgery as cs
from ckptsurgery.cli.program import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Fence:
    """One block of code: its language, its text, and the text block right behind it."""

    language: str
    text: str
    output: str | None


def fences() -> list[Fence]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", README, re.MULTILINE | re.DOTALL)
    return [Fence(language, text, output or None) for language, text, output in found if language != "text"]


def check(output: str, wanted: str) -> None:
    assert OutputChecker().check_output(wanted, output, ELLIPSIS), f"README:\n{wanted}\nreally:\n{output}"


def sessions(text: str) -> list[tuple[str, str]]:
    """Commands and what the README says they print; nothing stands for nothing or anything that goes unsaid."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [(command, said) for command, _, said in (part.partition("\n") for part in parts)]


def test_every_block_runs_and_prints_what_the_readme_says(tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "100", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    ran = 0
    for fence in fences():
        if fence.language == "toml":
            (tmp_path / "fused.toml").write_text(fence.text)
        elif fence.language == "python":
            check(run(sys.executable, "-W", "error", "-c", fence.text), fence.output or "")
        elif fence.language == "console":
            for command, said in sessions(fence.text):
                check(run("bash", "-euo", "pipefail", "-c", command), said)
                ran += 1
    assert ran >= 6


def test_blocks_are_of_languages_that_the_tests_know() -> None:
    assert {fence.language for fence in fences()} == {"sh", "console", "toml", "python"}


@pytest.mark.parametrize("script", re.findall(r"scripts/\w+\.(?:sh|py)", README))
def test_scripts_that_the_readme_names_are_there(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)


def test_every_rule_of_the_language_s_table_is_a_rule() -> None:
    page = (ROOT / "docs" / "language" / "index.md").read_text(encoding="utf-8")
    rules = [rule.replace("\\|", "|") for rule in re.findall(r"^\| `(.*? -> .*?)` \|", page, re.MULTILINE)]
    assert len(rules) >= 14
    for rule in rules:
        assert cs.Rule.parse(rule), rule


def test_what_the_readme_links_to_exists() -> None:
    for place in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / place).exists(), place


def test_every_name_of_the_library_that_the_readme_uses_is_public() -> None:
    assert set(re.findall(r"\bcs\.(\w+)", README)) <= set(cs.__all__)


def test_every_option_that_the_readme_uses_exists() -> None:
    program = get_command(app)
    known = {name for command in program.commands.values() for p in command.params for name in p.opts}  # type: ignore[attr-defined]
    others = {"--quiet", "--no-deps", "--index-url"}  # of pip
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - others <= known


def test_dependencies_each_have_a_reason() -> None:
    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=]", text)[0] for text in wanted}
    table = README.partition("## Dependencies")[2]
    assert names == {
        name for row in re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE) for name in row.split(", ")
    } - {"package"}
