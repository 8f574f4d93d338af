"""Trained checkpoints that Python packages carry: found where pip put them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def packaged(package: str, name: str) -> Path:
    """The one file of an installed package whose path ends in `name`."""
    found = [Path(str(f.locate())) for f in importlib.metadata.files(package) or () if str(f).endswith("/" + name)]
    assert len(found) == 1, f"{package} holds {len(found)} files {name}"
    return found[0]
