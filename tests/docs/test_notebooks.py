"""The example notebooks run in a kernel, and show what they store."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from notebooks import executed, outputs

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_shows_what_it_stores(path: Path) -> None:
    assert outputs(executed(path)) == outputs(nbformat.read(path, as_version=4))


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) >= 3
