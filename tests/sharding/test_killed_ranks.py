"""A rank that is killed, or fails, in the middle of what several do together.

Outputs are whole or absent, and the other ranks raise one error without waiting for the timeout.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("how", "ranks", "points", "names"),
    [
        ("kill", 2, 3, ["convert to a file", "convert to a folder", "save to a file", "save to a folder"]),
        ("kill", 2, 3, ["save as DCP", "load", "exchange"]),
        ("kill", 3, 2, ["convert to a folder"]),
        ("kill", 4, 1, ["exchange"]),
        ("fail", 2, 2, []),
        ("fail", 4, 1, ["load", "exchange"]),
    ],
)
def test_the_output_is_whole_or_absent(how: str, ranks: int, points: int, names: list[str], tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_ranks.py")
    command = [sys.executable, str(script), how, str(ranks), str(points), str(tmp_path / "trials"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
