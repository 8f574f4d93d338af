"""Run the example notebooks in a kernel of their own and compare or store what their cells show.

python scripts/docs/notebooks.py notebooks/*.ipynb           # run, print what differs
python scripts/docs/notebooks.py --fill notebooks/*.ipynb    # run, store the real outputs
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

__all__ = ["executed", "outputs"]


def executed(path: Path) -> nbformat.NotebookNode:
    """Run all cells of a notebook, in an empty folder; the first error ends it and is raised."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}})
        client.execute()
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[str]:
    """Return what a person reads below each code cell."""
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
            shown.append("".join(texts))
    return shown


def main() -> int:
    """Run the notebooks named on the command line; 1 if one shows what it does not store."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    fill = "--fill" in sys.argv
    wrong = 0
    for path in map(Path, filter(lambda text: not text.startswith("-"), sys.argv[1:])):
        ran = executed(path)
        stored = outputs(nbformat.read(path, as_version=4))
        if fill:
            for cell in ran.cells:
                cell.metadata.pop("execution", None)
            nbformat.write(ran, path)
        for old, new in zip(stored, outputs(ran), strict=True):
            if old != new and not fill:
                wrong = 1
                print(f"{path}: the notebook shows\n{old}\nand this came\n{new}\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
