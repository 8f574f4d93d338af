"""Every diagnostic code has an explanation, with an example of its message and a remedy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
from typer.testing import CliRunner

import ckptsurgery as cs
from ckptsurgery.cli.program import app
from ckptsurgery.explanations import error_codes, explanation

PACKAGE = Path(cs.__file__).parent
DOCS = Path(__file__).parents[2] / "docs" / "errors"
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

# Codes that a call composes: the first part, and the values that the other one takes.
COMPOSED = {
    "unused-": ("rule", "drop", "same"),
    "check-": (
        "keys-missing", "keys-unexpected", "specs-differ", "ties-lost", "values-differ", "elements-differ",
    ),
    "-of-tied": ("init", "keep"),
}  # fmt: skip


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def constants(value: ast.expr | None) -> Iterator[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.IfExp):
        yield from constants(value.body)
        yield from constants(value.orelse)


def argument(node: ast.Call, position: int, name: str) -> ast.expr | None:
    named = next((k.value for k in node.keywords if k.arg == name), None)
    return named or (node.args[position] if len(node.args) > position else None)


def codes_of(tree: ast.Module) -> set[str]:
    """The codes in a module: arguments of `Diagnostic`, and of functions that pass a `code` or `kind` on to it."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    takers = {"Diagnostic": (0, "code"), "problem": (0, "code"), "refused": (1, "code"), "finding": (0, "code")}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in node.args.args if a.arg not in ("self", "cls")]
            for name in {"code", "kind"} & set(names):
                takers[node.name] = (names.index(name), name)
    found = {c for node in calls if called(node) in takers for c in constants(argument(node, *takers[called(node)]))}
    return {code for code in found if (CODE.fullmatch(code) and "-" in code) or code in ONE_WORD}


ONE_WORD = {
    "nan",
    "inf",
    "mask",
    "overlap",
    "hole",
    "denormals",
    "offline",
    "address",
    "pickle",
    "cast",
    "untied",
    "rearranged",
    "rounded",
    "parametrised",
    "unforeseen",
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_code_has_an_explanation(path: Path) -> None:
    """A new code gets a section in `docs/errors/`: what it means, an example of the message, the remedy."""
    assert codes_of(ast.parse(path.read_text(encoding="utf-8"))) <= set(error_codes())


def test_composed_codes_and_words_are_explained() -> None:
    from ckptsurgery.witness.faults import KINDS

    composed = {
        value + part if part[0] == "-" else part + value for part, values in COMPOSED.items() for value in values
    }
    assert composed | ONE_WORD | set(KINDS) <= set(error_codes())


def test_the_reader_of_codes_sees_every_kind() -> None:
    source = """
def _error(text, code): return Diagnostic(code, text)
x = Diagnostic("a-b", "…"), Diagnostic(code="c-d"), Diagnostic("e-f" if y else "g-h", ""), _error("text-of", "i-j")
"""
    assert codes_of(ast.parse(source)) == {"a-b", "c-d", "e-f", "g-h", "i-j"}


def sections() -> dict[str, str]:
    return {code: explanation(code) for code in error_codes()}


def test_every_explanation_shows_the_message_and_a_remedy() -> None:
    for code, text in sections().items():
        shown = "".join(block.text for block in pages.blocks_of(text) if block.language in ("text", "console"))
        assert re.search(rf"^(error|warning|note)\[{code}\]: ", shown, re.MULTILINE), code
        assert "**Remedy.** " in text, code


def test_no_code_is_explained_twice() -> None:
    found = [code for path in DOCS.glob("*.md") for code in re.findall(r"^## (.+)$", path.read_text(), re.MULTILINE)]
    assert sorted(found) == error_codes()


def test_most_messages_come_from_an_example_that_runs() -> None:
    languages = {code: {block.language for block in pages.blocks_of(text)} for code, text in sections().items()}
    runs = [code for code, found in languages.items() if found & {"python", "console"}]
    assert len(runs) / len(sections()) > 0.7


@pytest.mark.parametrize("code", ["missing-keys", "error[missing-keys]", "error[missing-keys]:"])
def test_a_code_is_explained_as_it_was_copied(code: str) -> None:
    done = CliRunner().invoke(app, ["explain", code])
    assert done.exit_code == 0 and "load_state_dict" not in done.stdout.splitlines()[0]
    assert "**Remedy.**" in done.stdout


def test_a_misspelled_code_gets_a_suggestion() -> None:
    done = CliRunner().invoke(app, ["explain", "mising-key"])
    assert done.exit_code == 1 and "did you mean 'missing-key'" in done.stderr
    assert "did you mean 'unexpected-keys'" in CliRunner().invoke(app, ["explain", "unexpected"]).stderr
