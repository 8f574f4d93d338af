"""The floors of the house hold: imports run downward, cheap things stay cheap, families stay out of the code.

Every import statement counts, wherever it stands. One inside a function is there to be cheap, and one under
TYPE_CHECKING never runs, but both are knowledge of what is imported, and knowledge runs downward only. What an import
costs is another law: that one looks at the statements that run when the module is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import ckptsurgery

PACKAGE = Path(ckptsurgery.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    "errors": 0,
    "specs": 0,
    "many_objects": 0,
    "wording": 0,
    "notebook_view": 0,
    "narrowing": 0,
    "toml_writing": 0,
    "named_objects": 0,
    "boxes": 0,
    "language": 1,
    "pages": 1,
    "tables": 1,
    "storage": 1,
    "sharding": 1,
    "ops": 1,
    "planning": 2,
    "modeling": 2,
    "catalog": 2,
    "explanations": 2,
    "running": 3,
    "transfer": 4,
    "comparing": 4,
    "dcp": 4,
    "diagnosing": 4,
    "inference": 4,
    "reporting": 4,
    "resharding": 4,
    "exchange": 5,
    "low_rank": 5,
    "witness": 6,
    "": 7,  # the facade, ckptsurgery/__init__.py
    "api": 7,
    "cli": 7,
    "demo": 7,
    "__main__": 7,
}
# Neighbours on one floor do not know each other, but for these.
NEIGHBOURS = {
    ("specs", "errors"),
    ("errors", "toml_writing"),
    ("specs", "wording"),
    ("", "api"),
    # a twin keeps what is not plain memory, so that it is refused by name
    ("sharding", "storage"),
    # to invert a recipe is to invert its ops; ops know nothing of the language
    ("language", "ops"),
    # the rows of a tree are folded keys
    ("pages", "language"),
    ("tables", "language"),
    # a checkpoint draws its keys as a tree
    ("storage", "tables"),
    ("cli", ""),
    ("demo", ""),
    # two layouts are compared by the recipe that is inferred between them
    ("comparing", "inference"),
    # a checkpoint whose outputs are compared is loaded first
    ("inference", "transfer"),
    ("cli", "demo"),
    ("__main__", "cli"),
}
HEAVY = {"torch", "numpy", "tqdm", "huggingface_hub", "rich", "typer", "transformers"}
# A command line is made of typer; the demo is imported when it is run, and then it trains; readers and writers of
# torch's checkpoints derive from its classes.
MAY_BE_HEAVY = {"cli": {"typer"}, "demo": {"torch"}, "dcp": {"torch"}}

FAMILIES = (
    "albert|bart|beit|bert|bloom|convnext|deberta|deepseek|deit|detr|dino|distilbert|efficientnet|electra|falcon|gemini|gemma|glm"
    "|gpt|gptj|gptneox|hubert|internlm|llama|llava|mamba|mistral|mixtral|mobilenet|neox|olmo|pythia|qwen|regnet|resnet"
    "|resnext|roberta|siglip|starcoder|swin|unet|vgg|vit|wav2vec|wavlm|whisper|xlm|yolo"
)
# A whole word, digits behind it or not, or the head of a CamelCase one; not a program that reads all families.
FAMILY = re.compile(rf"(?<![A-Za-z])(?i:{FAMILIES})(?!\.cpp|-quantize)(?:(?![A-Za-z])|(?<=[a-z])(?=[A-Z]))")


class Import(NamedTuple):
    module: str
    line: int
    runs_at_import: bool


def part_of(name: str) -> str:
    """The floor plan's name of a module: its first component below the package."""
    return (name + ".").split(".")[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[Import]:
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    return list(_imports(ast.parse(path.read_text()), package, runs=True))


def _imports(node: ast.AST, package: str, runs: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, runs) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        for alias in node.names:
            yield Import(f"{base}.{alias.name}" if _is_module(base, alias.name) else base, node.lineno, runs)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from _imports(child, package, runs=False)
        for child in node.orelse:
            yield from _imports(child, package, runs)
    else:
        inside = runs and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, package, inside)


def _is_module(base: str, name: str) -> bool:
    """Whether `from base import name` names a module of the package."""
    place = PACKAGE.parent.joinpath(*base.split("."), name)
    return base.split(".")[0] == PACKAGE.name and (place.is_dir() or place.with_suffix(".py").exists())


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {part_of(name_of(path)) for path in MODULES} <= set(FLOORS)


def test_imports_run_downward() -> None:
    upward = []
    for path in MODULES:
        part = part_of(name_of(path))
        for found in imports_of(path):
            if found.module.split(".")[0] != PACKAGE.name:
                continue
            other = part_of(found.module)
            if part != other and FLOORS[other] >= FLOORS[part] and (part, other) not in NEIGHBOURS:
                upward.append(f"{path.relative_to(PACKAGE)}:{found.line} imports {found.module}")
    assert not upward


def test_importing_a_module_imports_nothing_heavy() -> None:
    heavy = []
    for path in MODULES:
        allowed = MAY_BE_HEAVY.get(part_of(name_of(path)), set())
        for found in imports_of(path):
            if found.runs_at_import and found.module.split(".")[0] in HEAVY - allowed:
                heavy.append(f"{path.relative_to(PACKAGE)}:{found.line} imports {found.module}")
    assert not heavy


def test_no_part_of_the_package_bears_the_name_of_a_public_function() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not parts & set(ckptsurgery.__all__)


def test_no_module_names_a_model_family() -> None:
    named = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FAMILY.search(line)
    ]
    assert not named


def test_families_are_found_as_words_only() -> None:
    found = ["gpt2_to_x", "LlamaConfig", "a ViT", "use swin/x", "BERT,"]
    passed = ["SAME", "activity", "bertrand", "gravitas", "bloomed", "vital", "llama.cpp"]
    assert [bool(FAMILY.search(text)) for text in found + passed] == [True] * len(found) + [False] * len(passed)


def test_the_reader_of_imports_sees_every_kind(tmp_path: Path) -> None:
    source = """
import torch.nn as nn, json
if TYPE_CHECKING:
    from ..specs import TensorSpec
def f():
    from . import folding
    from .. import planning, __all__
class C:
    import numpy
"""
    found = list(_imports(ast.parse(source), "ckptsurgery.language", runs=True))
    assert found == [
        Import("torch.nn", 2, True),
        Import("json", 2, True),
        Import("ckptsurgery.specs", 4, False),
        Import("ckptsurgery.language.folding", 6, False),
        Import("ckptsurgery.planning", 7, False),
        Import("ckptsurgery", 7, False),
        Import("numpy", 9, True),
    ]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also under TYPE_CHECKING and inside functions: whoever reads one of a circle must have read them all."""
    graph = {
        name_of(path): {found.module for found in imports_of(path) if found.module.startswith("ckptsurgery")}
        for path in MODULES
    }
    order = TopologicalSorter({name: imported - {name} for name, imported in graph.items()})
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_is_imported_of_the_package_is_there() -> None:
    """Inside functions too, where an import of something that was moved fails only when it runs."""
    lost = [
        f"{path.relative_to(PACKAGE)}:{found.line} imports {found.module}"
        for path in MODULES
        for found in imports_of(path)
        if found.module.split(".")[0] == PACKAGE.name and importlib.util.find_spec(found.module) is None
    ]
    assert not lost
