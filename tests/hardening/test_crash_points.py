"""A save that is killed, or whose system calls fail, leaves the old checkpoint, the new one or none: no mixture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_hundreds_of_crash_points_are_survived(repository: Path) -> None:
    """In memory where there is such a folder: what is synced is a matter of the calls, which are made all the same."""
    memory = Path("/dev/shm")
    where = ["--folder", str(memory)] if memory.is_dir() else []
    command = [sys.executable, str(repository / "scripts" / "fuzz" / "crashes.py"), "--every", "4", *where]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["crash points survived"] > 500
    print(done.stdout)
