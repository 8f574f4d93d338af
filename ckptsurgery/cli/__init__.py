"""The command line: `ckptsurgery COMMAND`. Each command opens, calls the library once, and prints.

Results go to stdout, progress and diagnostics to stderr. Exit codes: 0 done, 1 a problem with the checkpoint or the
recipe, 2 wrong usage; 130 interrupted, 143 terminated, 141 where nobody reads the output any more.
"""

from __future__ import annotations

import signal
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command that `sys.argv` asks for, and exit."""
    # Being terminated unwinds as being interrupted does, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        from .program import app

        app(prog_name="ckptsurgery")
    except KeyboardInterrupt:  # before or after the command itself
        print("interrupted", file=sys.stderr)
        sys.exit(130)
