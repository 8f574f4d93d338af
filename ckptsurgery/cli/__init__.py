"""The command line: `ckptsurgery COMMAND`. Each command opens, calls the library once, and prints.

Results go to stdout, progress and diagnostics to stderr. Exit codes: 0 done, 1 a problem with the checkpoint or the
recipe, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command that `sys.argv` asks for, and exit."""
    from .program import app

    app(prog_name="ckptsurgery")
