"""Pages of the documentation as programs: find their blocks, run them in order, compare or write down their output.

    python scripts/docs/pages.py docs/cookbook/*.md            # run pages and print what differs
    python scripts/docs/pages.py --fill docs/cookbook/new.md   # write the real output into the page

A page's blocks share one folder and one namespace. `python` runs; the `text` block right behind it is its standard
output and the message of the error that ends it, if one does. `toml` and `json` with a title are files. `console` is a
shell session: `ckptsurgery` runs in this process, other commands in bash. `sh` (installing, several processes) is not
run. `...` in an output stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Block", "blocks_of", "differences", "filled"]

_FENCE = re.compile(r"^(?P<margin> *)```(?P<language>\w+)(?P<rest>[^\n]*)\n(?P<text>.*?)^(?P=margin)```$", re.M | re.S)
_TITLE = re.compile(r'title="([^"]+)"')
LANGUAGES = {"python", "text", "toml", "json", "console", "sh", "yaml"}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text without margin, and where it stands in the page."""

    language: str
    title: str | None
    text: str
    margin: str
    start: int
    end: int
    line: int


@dataclass(frozen=True)
class Difference:
    """An output that the page does not show: the place in the page, the text there, and the text that came."""

    start: int
    end: int
    line: int
    wanted: str
    found: str
    margin: str

    def __str__(self) -> str:
        return f"line {self.line}: the page shows\n{self.wanted}\nand this came\n{self.found}"


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page, indented ones too."""
    found = []
    for match in _FENCE.finditer(page):
        margin = match["margin"]
        text = "".join(line.removeprefix(margin) for line in match["text"].splitlines(keepends=True))
        title = _TITLE.search(match["rest"])
        line = page.count("\n", 0, match.start("text")) + 1
        name = title[1] if title else None
        found.append(Block(match["language"], name, text, margin, match.start("text"), match.end("text"), line))
    return found


def differences(page: str, names: dict[str, Any] | None = None) -> list[Difference]:
    """Run a page's blocks in the working directory, and return the outputs that the page does not show."""
    names = {"__name__": "page"} if names is None else names
    blocks = blocks_of(page)
    found: list[Difference] = []
    for block, after in zip(blocks, [*blocks[1:], None]):
        if block.title and block.language in ("toml", "json", "python", "yaml", "text"):
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python" and ">>> " in block.text:
            found += _doctest(block, names)
        elif block.language == "python":
            behind = after is not None and not page[block.end + 3 : after.start].strip("`tex \n")
            shown = after if behind else None
            came = _python(block, names)
            if shown is None and came:
                raise ValueError(f"line {block.line}: a block prints, and no text block follows it:\n{came}")
            if shown is not None and not _same(shown.text, came):
                found.append(Difference(shown.start, shown.end, shown.line, shown.text, came, shown.margin))
        elif block.language == "console":
            found += _session(block)
    return found


def filled(page: str, found: list[Difference]) -> str:
    """Return the page with the outputs that came."""
    for each in sorted(found, key=lambda d: d.start, reverse=True):
        text = "".join(each.margin + line if line.strip() else line for line in each.found.splitlines(keepends=True))
        page = page[: each.start] + text + page[each.end :]
    return page


def _same(wanted: str, came: str) -> bool:
    return doctest.OutputChecker().check_output(wanted, came, doctest.ELLIPSIS)


def _python(block: Block, names: dict[str, Any]) -> str:
    from ckptsurgery import CkptSurgeryError

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile("\n" * (block.line - 1) + block.text, "page", "exec", dont_inherit=True), names)
        except CkptSurgeryError as error:
            print(error)
        except Exception as error:  # a page may show torch's own message
            print(f"{type(error).__name__}: {error}")
    return out.getvalue()


def _doctest(block: Block, names: dict[str, Any]) -> Iterator[Difference]:
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(block.text, names, "page", "page", block.line)
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(test, out=said.append, clear_globs=False)
    names.update(test.globs)
    if said:
        yield Difference(block.start, block.end, block.line, block.text, "".join(said), block.margin)


def _session(block: Block) -> Iterator[Difference]:
    at = block.start
    page_lines = block.text.splitlines(keepends=True)
    commands: list[tuple[str, str]] = []
    for line in page_lines:
        if line.startswith("$ "):
            commands.append((line[2:], ""))
        elif commands and commands[-1][0].rstrip().endswith("\\"):
            commands[-1] = (commands[-1][0].rstrip()[:-1] + line.strip() + "\n", "")
        else:
            commands[-1] = (commands[-1][0], commands[-1][1] + line)
    texts, wrong = [], False
    whole = re.split(r"(?m)^(?=\$ )", block.text)[1:]
    for (command, shown), part in zip(commands, whole):
        came = _command(command.strip())
        good = _same(shown, came)
        wrong = wrong or not good
        texts.append(part if good else part.removesuffix(shown) + came)
    if wrong:
        yield Difference(at, block.end, block.line, block.text, "".join(texts), block.margin)


def _command(line: str) -> str:
    words = shlex.split(line)
    if words[0] != "ckptsurgery" or "|" in words or ">" in words:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], capture_output=True, text=True)
        return done.stdout + done.stderr
    from typer.testing import CliRunner

    from ckptsurgery.cli.program import app

    result = CliRunner().invoke(app, words[1:], prog_name="ckptsurgery", catch_exceptions=False)
    return result.output


def main(arguments: list[str], environment: Mapping[str, str] = os.environ) -> int:
    """Run the pages named, each in a folder of its own; with `--fill`, write the outputs that came into them."""
    fill = "--fill" in arguments
    wrong = 0
    os.environ["COLUMNS"] = "80"
    for path in (Path(a).resolve() for a in arguments if a != "--fill"):
        import torch

        torch.manual_seed(0)
        page = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            found = differences(page)
        wrong += len(found)
        if found and fill:
            path.write_text(filled(page, found), encoding="utf-8")
        for each in found:
            print(f"{path.name}, {each}")
    return 0 if fill or not wrong else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
