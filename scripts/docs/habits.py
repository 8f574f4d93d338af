"""Count the habits that make this project's English hard to read, in docstrings, comments, messages and pages.

    python scripts/docs/habits.py             # counts, in all
    python scripts/docs/habits.py --list says  # where a habit is

CONTRIBUTING explains how to write. A test holds the counts: they may fall, and not rise.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

__all__ = ["HABITS", "LIMITS", "counts", "texts"]

ROOT = Path(__file__).parents[2]
HABITS = {
    # Code reports, contains, calls, is stored: it does not say, tell, hear, stand or lie.
    "says": re.compile(r"\b(?:says|said|tells|told|hears|heard|stands|stood|lies|lay)\b", re.IGNORECASE),
    # "is not a checkpoint", never "is no checkpoint".
    "is no": re.compile(r"\b(?:is|are|was|were|be) no (?!longer|more|less)\w+", re.IGNORECASE),
    # Name the thing: never "what" or "whoever" as the subject of a sentence.
    "what": re.compile(r"(?:^|[.:;]\s)(?:What|Who|Whoever) (?!follows\b)\w+[^?.]*\.", re.MULTILINE),
    "alone": re.compile(r"\b\w+s alone\b"),
    "whatever": re.compile(r"\bwhatever\b", re.IGNORECASE),
}
LIMITS = {"says": 415, "is no": 158, "what": 236, "alone": 54, "whatever": 59}
"""The most of each that a test accepts. Lower them when a count falls."""


def texts(folder: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Yield `(place, text)` of every docstring, comment and message of the package, and of every page."""
    for path in sorted((folder / "ckptsurgery").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(folder).as_posix()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield f"{name}:{node.lineno}", node.value
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield f"{name}:{token.start[0]}", token.string
    for path in [folder / "README.md", folder / "CONTRIBUTING.md", *sorted((folder / "docs").rglob("*.md"))]:
        prose = re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        yield path.relative_to(folder).as_posix(), prose


def counts(folder: Path = ROOT) -> dict[str, int]:
    """Return how often each habit occurs."""
    found = list(texts(folder))
    return {name: sum(len(habit.findall(text)) for _, text in found) for name, habit in HABITS.items()}


def main(arguments: list[str]) -> None:
    """Print the counts, or with `--list NAME` the places of a habit."""
    if arguments[:1] == ["--list"]:
        for place, text in texts():
            for found in HABITS[arguments[1]].finditer(text):
                print(f"{place}: {' '.join(text[max(0, found.start() - 40) : found.end() + 40].split())}")
        return
    for name, count in counts().items():
        print(f"{count:5}  {name}  (limit {LIMITS.get(name, '-')})")


if __name__ == "__main__":
    main(sys.argv[1:])
