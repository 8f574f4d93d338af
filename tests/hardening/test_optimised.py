"""Under `python -O`, where no assert runs, results are as right and mistakes as refused as ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("flag", ["-O", "-OO"])
def test_right_values_without_asserts(flag: str) -> None:
    program = Path(__file__).parent / "right_values.py"
    done = subprocess.run([sys.executable, flag, str(program)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all right\n", "")
