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
    # No multiple of the number of faults at a point, so that each of them comes to strike each kind of call.
    command = [sys.executable, str(repository / "scripts" / "fuzz" / "crashes.py"), "--every", "7", *where]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("crash points survived") > 500
    assert told.pop("stories") == told.pop("signals")
    assert min(told.values()) > 10 and len(told) == 10
    print(done.stdout)
