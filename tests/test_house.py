"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptsurgery

PACKAGE = Path(ckptsurgery.__file__).parent
ROOT = Path(__file__).parent.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public functions, classes and methods without a docstring; a method that overrides inherits its base's."""
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.ClassDef) and not node.bases:
            methods = (child for child in node.body if isinstance(child, ast.FunctionDef))
            yield from (f"{node.name}.{m.name}" for m in methods if m.name[0] != "_" and not ast.get_docstring(m))


def test_files_are_short() -> None:
    lengths = {str(path): len(path.read_text().splitlines()) for path in SOURCES if path.is_file()}
    assert not {path: length for path, length in lengths.items() if length > 450}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_names_have_docstrings(path: Path) -> None:
    assert not list(undocumented(ast.parse(path.read_text())))


def test_no_handler_catches_everything() -> None:
    bare = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or "BaseException" in ast.unparse(node.type))
    ]
    assert not bare


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name not in ("__init__.py", "conftest.py")]
    assert sorted(set(names)) == sorted(names)


def test_nothing_is_asserted() -> None:
    """Under `python -O` an assert is not there: input is refused by a diagnostic, and a bug by an exception."""
    asserts = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not asserts


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """The string constants of a module, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_only_the_command_line_speaks_of_its_options() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {text[:80]}"
        for path in MODULES
        if "cli" not in path.relative_to(PACKAGE).parts
        for line, text in texts_of(path)
        if re.search(r"(?:^|[\s(`'\"])--[a-z]", text)
    ]
    assert not found


def test_the_command_line_speaks_of_no_argument_of_python() -> None:
    public = [getattr(ckptsurgery, name) for name in ckptsurgery.__all__]
    functions = [each for each in public if inspect.isfunction(each)]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    argument = re.compile(rf"(?<![\w.-])(?:{'|'.join(sorted(names))})=")
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {text[:80]}"
        for path in MODULES
        if "cli" in path.relative_to(PACKAGE).parts
        for line, text in texts_of(path)
        if argument.search(text) and ">>>" not in text
    ]
    assert not found


def test_a_name_of_a_class_means_one_thing() -> None:
    """Public or private: whoever reads a name in a traceback or a signature looks in one place."""
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_functions_fit_one_screen() -> None:
    """Signature and docstring apart, which may be long where there is much to ask for."""
    long = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (node.end_lineno or 0) - node.body[bool(ast.get_docstring(node)) and len(node.body) > 1].lineno >= 45
    ]
    assert not long


def test_a_name_of_a_file_means_one_thing() -> None:
    """Whoever reads `loading.py` in a traceback or a search opens one file."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        if path.name not in ("__init__.py", "__main__.py"):
            places.setdefault(path.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
