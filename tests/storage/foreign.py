"""What the tests of foreign formats share: one array, and the pasting of a remedy."""

from __future__ import annotations

import ast
import atexit
import importlib.util
import lzma
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy
import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.errors import CheckpointError, Diagnostic

W = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)


def other_programs() -> Path:
    """Return a folder with the files of other programs, of which the larger ones are kept compressed."""
    folder = Path(tempfile.mkdtemp(prefix="ckptsurgery-formats-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in (Path(__file__).parents[1] / "data" / "formats").iterdir():
        if path.suffix == ".xz":
            (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        else:
            shutil.copy(path, folder)
    return folder


def there(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def refused(source: object) -> Diagnostic:
    with pytest.raises(CheckpointError) as caught:
        cs.open(source)
    (problem,) = caught.value.diagnostics
    return problem


def holds_w(source: object) -> bool:
    """Whether a checkpoint holds the array above under some name."""
    with cs.open(source) as ckpt:
        return any(ckpt[key].spec.shape == (2, 3) and torch.equal(ckpt[key].load(), torch.tensor(W)) for key in ckpt)


def pasted(help: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> object | None:
    """Run a help text as a user pastes it; None where its library is not installed and it could only be parsed."""
    monkeypatch.chdir(folder)
    code = re.search(r"(?:^|: )((?:import|from|open\(|torch\.).*)", help)
    if code is None:
        return None
    line = code[1].split(", and join")[0]
    tree = ast.parse(line)
    if line.startswith("open("):
        return eval(line, {"open": cs.open})
    roots = {
        name.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    roots |= {str(n.module).partition(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    if not all(map(there, roots)):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(line, {"torch": torch})
    return cs.open(next(path for name in ("new.pkl", "new.pt", "new.npz") if (path := folder / name).exists()))
