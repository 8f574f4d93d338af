"""A rank that is killed while several save together: the output is whole or absent, and no other rank hangs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("ranks", "points", "names"), [(2, 3, []), (3, 2, ["convert to a folder"])])
def test_the_output_is_whole_or_absent(ranks: int, points: int, names: list[str], tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_ranks.py")
    command = [sys.executable, str(script), str(ranks), str(points), str(tmp_path / "trials"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
