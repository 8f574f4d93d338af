"""The public face: what it offers, and what it costs to look at it."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import ckptsurgery as cs

NAMES = """
Checkpoint CheckpointError CkptSurgeryError Diagnosis Diagnostic Diff LoadError Op Parity Plan PlanError Recipe
RecipeError Remedy Report Rule Scope Selection StorageReader StorageWriter Suggestion TensorSpec __version__ adapters
check_init check_loaded diff doctor inverse list_recipes load_into load_recipe match_recipes op open param_groups plan
recipes reshard route save select skeleton suggest summary tie ties untie verify watch_load
"""


def test_the_public_names_are_these() -> None:
    assert cs.__all__ == NAMES.split()
    assert sorted(cs.__all__) == cs.__all__


def test_every_public_name_is_there_and_documented() -> None:
    for name in cs.__all__:
        assert getattr(cs, name).__doc__, name
    assert dir(cs) == cs.__all__


def test_errors_are_one_tree() -> None:
    for kind in (cs.CheckpointError, cs.RecipeError, cs.PlanError, cs.LoadError):
        assert issubclass(kind, cs.CkptSurgeryError)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(cs, "no_such_name")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, ckptsurgery; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "numpy", "tqdm", "huggingface_hub", "typer", "rich"]
    assert subprocess.check_output([sys.executable, "-c", code, *heavy], text=True) == "[]\n"


def test_the_version_is_the_package_s() -> None:
    from importlib.metadata import version

    assert cs.__version__ == version("ckptsurgery")


@pytest.mark.parametrize("name", [name for name in cs.__all__ if callable(getattr(cs, name))])
def test_a_public_name_is_what_tracebacks_and_help_call_it(name: str) -> None:
    found = getattr(cs, name)
    assert (found.__name__, found.__qualname__) == (name, name)
    if inspect.isfunction(found):
        assert inspect.unwrap(found).__code__.co_name == name
