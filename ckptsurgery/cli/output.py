"""What reaches the terminal: results on stdout, complaints on stderr, colours only where a person looks."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, TextIO

import typer

from ..errors import CheckpointError, CkptSurgeryError, Diagnostic
from ..storage.sources.system_errors import os_error
from .remedies import shell_help, shell_text

__all__ = ["complain", "save_page", "show", "show_listing", "width"]

# Keys and metadata come from files: they must not steer the terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_DIAGNOSTIC = re.compile(r"^(?:(error|warning|note)(\[[a-z-]+\])(: .*)| = help: .*)$", re.MULTILINE)
_compact = json.JSONEncoder(default=str).encode
_COLOURS = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "note": typer.colors.BLUE}


def width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def show(result: Any, as_json: bool = False, wrap: bool = False) -> None:
    """Print a result: its text, or with `as_json` its `to_json()`.

    Args:
        wrap: whether a terminal gets long lines wrapped; for text that is read, and not for what is copied.
    """
    if as_json:
        data = result.to_json() if hasattr(result, "to_json") else result
        _write(_lines(data), sys.stdout)
    elif wrap and sys.stdout.isatty():
        from ..tables.columns import hanging

        _say(hanging(str(result), width()), sys.stdout)
    else:
        _say(str(result), sys.stdout)


def show_listing(entries: Mapping[str, str], text: str, what: str, as_json: bool = False) -> None:
    """Print names with a line of text each: those that have `text` in either, or that no `what` has it."""
    from ..tables.columns import listing

    found = {name: said for name, said in entries.items() if text.lower() in f"{name} {said}".lower()}
    lines = listing(found, width() if sys.stdout.isatty() else None)
    if not lines and not as_json:
        words = {word for name in entries for word in re.split(r"[/_]", name)} | entries.keys()
        near = get_close_matches(text, sorted(words), 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        lines = [f"no {what} has {text!r} in its name or summary{meant}"]
    show(found if as_json else "\n".join(lines), as_json)


def complain(error: CkptSurgeryError, as_json: bool = False, options: Collection[str] = ()) -> None:
    """Print all of an error's diagnostics on stderr, their remedies by the options of the command."""
    if as_json:
        found = [{**told.to_json(), "help": shell_help(told, options)} for told in error.diagnostics]
        _write(_lines({"diagnostics": found}), sys.stderr)
        return
    _say("\n\n".join(shell_text(found, options) for found in error.diagnostics), sys.stderr)


def save_page(result: HasPage, path: str, title: str) -> None:
    """Write the page of a result, whole or not at all, and say so on stderr.

    Raises:
        CheckpointError: the path is no `.html` file, or cannot be written.
    """
    place = Path(path)
    if place.suffix not in (".html", ".htm"):
        near = f"--html {shlex.quote(str(place.with_suffix('.html')))}"
        text = f"--html writes a page, and {path!r} is not the name of one"
        raise CheckpointError(Diagnostic("bad-argument", text, help=near))
    unfinished = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        unfinished.write_text(result.to_html(title), encoding="utf-8")
        unfinished.replace(place)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise os_error(error, path, "write") from None
    _say(f"wrote {path}", sys.stderr)


class HasPage(Protocol):
    """A result that makes a page of itself."""

    def to_html(self, title: str) -> str:
        """Make the page."""


def _lines(data: Any, spread: int = 2, margin: str = "\n") -> str:
    """JSON with an entry a line: the outer levels are spread, and what lies within them stands on one line.

    >>> print(_lines({"files": [], "tensors": {"w": {"dtype": "F32", "shape": [2, 3]}}}))
    {
      "files": [],
      "tensors": {
        "w": {"dtype": "F32", "shape": [2, 3]}
      }
    }
    """
    if not spread or not data or not isinstance(data, dict | list | tuple):
        return _compact(data)
    inner = margin + "  "
    if isinstance(data, dict):
        entries = [f"{inner}{_compact(str(key))}: {_lines(value, spread - 1, inner)}" for key, value in data.items()]
        return "{" + ",".join(entries) + margin + "}"
    return "[" + ",".join([inner + _lines(value, spread - 1, inner) for value in data]) + margin + "]"


def _say(text: str, stream: TextIO) -> None:
    text = _printable(text)
    _write(_DIAGNOSTIC.sub(_coloured, text) if stream.isatty() and "NO_COLOR" not in os.environ else text, stream)


def _coloured(line: re.Match[str]) -> str:
    severity, code, headline = line.groups()
    if severity is None:
        return typer.style(line.group(), fg=typer.colors.CYAN)
    return typer.style(severity + code, fg=_COLOURS[severity], bold=True) + typer.style(headline, bold=True)


def _printable(text: str) -> str:
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def _write(text: str, stream: TextIO) -> None:
    data = memoryview(f"{text}\n".encode(stream.encoding or "utf-8", "backslashreplace"))
    stream.flush()
    while data:  # an unbuffered stream may take a part, and says so instead of waiting
        data = data[stream.buffer.write(data) :]
    stream.flush()
