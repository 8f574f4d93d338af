"""The three scripts as a person starts them: without arguments, with a checkpoint and a model of one's own, wrongly."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODELS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, classes)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

def three():
    return Net(3)
"""


@dataclass(frozen=True)
class Ran:
    """What a script printed."""

    stdout: str
    stderr: str


def run(script: str, *arguments: object, folder: Path, code: int = 0) -> Ran:
    """Run a script in a process of its own, as a person starts it."""
    command = [sys.executable, SCRIPTS / f"{script}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return Ran(done.stdout, done.stderr)


def run_here(script: str, *arguments: object, folder: Path, code: int = 0) -> Ran:
    """Run a script in this process: torch need not start again for each line of a test."""
    held, argv = list(sys.path), sys.argv
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [str(SCRIPTS / f"{script}.py"), *map(str, arguments)]
    ended: int | str | None = 0
    try:
        with chdir(folder), redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        ended = end.code
    finally:
        sys.path[:], sys.argv = held, argv
        sys.modules.pop("mymodels", None)
    if isinstance(ended, str):
        err.write(ended)
    assert (1 if isinstance(ended, str) else ended or 0) == code, out.getvalue() + err.getvalue()
    return Ran(out.getvalue(), err.getvalue())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model for three classes, a checkpoint of one for five, and one with tied tensors."""
    (tmp_path / "mymodels.py").write_text(MODELS)
    body = {"body.0.weight": torch.ones(8, 4), "body.0.bias": torch.ones(8)}
    body |= {"body.1.weight": torch.ones(8, 8), "body.1.bias": torch.ones(8)}
    head = {"head.weight": torch.ones(5, 8), "head.bias": torch.ones(5)}
    torch.save({"epoch": 3, "model": {f"module.{k}": t for k, t in (body | head).items()}}, tmp_path / "last.pt")
    w = torch.randn(5, 4)
    cs.save({"m.embed.weight": w, "m.head.weight": w}, tmp_path / "tied.safetensors")
    return tmp_path


@pytest.mark.parametrize("script", ["partial_load", "reinit_head", "convert_tied"])
def test_help_shows_examples(script: str, tmp_path: Path) -> None:
    text = run(script, "--help", folder=tmp_path).stdout
    assert text.count(f"scripts/{script}.py ") >= 3


def test_partial_load_on_the_demo(tmp_path: Path) -> None:
    report = json.loads(run("partial_load", "--json", folder=tmp_path).stdout)
    assert report["counts"]["loaded"] == 53
    assert report["counts"]["initialised"] == 2


def test_partial_load_of_one_s_own(folder: Path) -> None:
    refused = run_here("partial_load", "last.pt", "mymodels:three", folder=folder, code=1).stderr
    assert "head.weight" in refused
    run_here("partial_load", "last.pt", "mymodels:three", "--partial", "--out", "out.safetensors", folder=folder)
    saved = cs.open(folder / "out.safetensors").state_dict()
    assert saved["body.1.weight"].eq(1).all()
    assert saved["head.weight"].shape == (3, 8)
    done = run_here("partial_load", "last.pt", "mymodels:three", "--init", "head", "--seed", "3", folder=folder)
    assert "head.weight  F32 [3, 8]  default (Linear.reset_parameters, seed 3)" in done.stdout


def test_a_new_head_on_the_demo(tmp_path: Path) -> None:
    text = run("reinit_head", "--freeze", folder=tmp_path).stdout
    assert "trainable: 260 of 102,148 parameters" in text


def test_a_new_head_on_one_s_own(folder: Path) -> None:
    arguments = ("last.pt", "mymodels:three", "--head", "head", "--init", "ones", "--freeze", "--out", "out.pt")
    assert "trainable: 27 of " in run_here("reinit_head", *arguments, folder=folder).stdout
    assert cs.open(folder / "out.pt").state_dict()["head.weight"].eq(1).all()


def test_ties_through_a_conversion_on_the_demo(tmp_path: Path) -> None:
    text = run("convert_tied", folder=tmp_path).stdout
    assert text.count("embed.weight = head.weight") == 2
    assert "module.embed.weight = module.head.weight" in text


def test_ties_through_a_conversion_of_one_s_own(folder: Path) -> None:
    arguments = ("tied.safetensors", "new", "--rule", "m.{k...} -> {k...}", "--model", "mymodels:Tied")
    text = run_here("convert_tied", *arguments, folder=folder).stdout
    assert text.index("tied in the model:\n  embed.weight = head.weight")
    assert cs.ties(folder / "new")[0].names == ("embed.weight", "head.weight")
    run_here("convert_tied", *arguments, folder=folder, code=1)
    run_here("convert_tied", *arguments, "--overwrite", folder=folder)


def test_a_name_that_the_source_lacks_is_tied_on_request(folder: Path) -> None:
    cs.save({"embed.weight": torch.randn(5, 4)}, folder / "one.safetensors")
    arguments = ("one.safetensors", "two.pt", "--tie", "head.weight=embed.weight", "--model", "mymodels:Tied")
    text = run_here("convert_tied", *arguments, folder=folder).stdout
    assert "tied in the model:\n  embed.weight = head.weight" in text


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("partial_load", ["last.pt"]),
        ("reinit_head", ["last.pt", "mymodels:three"]),
        ("convert_tied", ["last.pt"]),
        ("convert_tied", ["last.pt", "out", "--tie", "a"]),
    ],
)
def test_wrong_usage_exits_with_2(folder: Path, script: str, arguments: list[str]) -> None:
    assert "usage: " in run_here(script, *arguments, folder=folder, code=2).stderr
