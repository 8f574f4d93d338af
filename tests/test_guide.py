"""The guide is followed word for word: every block runs, in order, and prints what the page says."""

from __future__ import annotations

import doctest
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptsurgery.ops import registry

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> Iterator[tuple[str, str, int]]:
    """Language, text and first line of each fenced block."""
    for found in BLOCK.finditer(page):
        yield found[1], found[2], page.count("\n", 0, found.start(2)) + 1


@pytest.fixture
def page(repository: Path) -> str:
    return (repository / "recipes" / "GUIDE.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("own_ops")
def test_every_block_of_the_guide_runs_and_prints_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    names: dict[str, object] = {"__name__": "guide"}
    said: list[str] = []
    for language, text, line in blocks(page):
        if language == "toml":
            # a reader saves it under the name in its first line
            title = re.match(r"# (\S+\.toml)\n", text)
            assert title, f"line {line}: a file without a name"
            found = tomllib.loads(text)
            assert "rules" in found or registry.GROUP in found["project"]["entry-points"]
            Path(title[1]).write_text(text, encoding="utf-8")
            continue
        assert language == "python", f"line {line}: a {language or 'plain'} block is nothing that runs"
        test = doctest.DocTestParser().get_doctest(text, names, f"GUIDE.md:{line}", "GUIDE.md", line)
        assert test.examples, f"line {line}: a block without a prompt"
        runner.run(test, out=said.append, clear_globs=False)
        names = test.globs
    assert not runner.failures, "".join(said)


def test_no_block_is_missed(page: str) -> None:
    assert page.count("\n```") == 2 * len(list(blocks(page)))


def test_translations_have_the_code_of_the_guide(page: str) -> None:
    from translated import translations, with_code

    texts = {path.name: path.read_text(encoding="utf-8") for path in translations()}
    assert "GUIDE.zh.md" in texts
    for name, text in texts.items():
        assert with_code(text, page) == text, f"{name}: python scripts/docs/translated.py --fill"
        assert text.count("\n## ") == page.count("\n## "), name
