"""Every page of the documentation is run: its blocks, in order, print what the page shows."""

from __future__ import annotations

from pathlib import Path

import pages
import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "```" in path.read_text(encoding="utf-8"))


@pytest.mark.usefixtures("own_ops")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_the_blocks_of_a_page_print_what_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    torch.manual_seed(0)
    found = pages.differences(path.read_text(encoding="utf-8"))
    assert not found, "\n\n".join(f"{path.name}, {each}" for each in found)


def test_blocks_are_of_languages_that_are_run_or_known_not_to_be() -> None:
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        found = pages.blocks_of(page)
        assert {block.language for block in found} <= pages.LANGUAGES, path.name
        assert page.count("```") == 2 * len(found), f"{path.name}: a fence without a language, or not closed"
