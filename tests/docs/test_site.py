"""The documentation site builds strictly, and its pages cover what is public."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ckptsurgery as cs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strict: a broken link, a missing anchor, or a page without a place in the navigation fails."""
    command = [ROOT / "scripts" / "docs" / "build.sh", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in tmp_path.glob("site/**/*.html")}
    assert {"index.html", "errors/index.html", "reference/cli/index.html", "cookbook/index.html"} <= pages
    reference = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    assert "max-shard-size" in reference and "recipes match" in reference


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^::: ckptsurgery\.([\w.]+)$", page, re.MULTILINE))
    assert {name for name in cs.__all__ if name not in ("__version__", "adapters", "recipes")} <= listed


def test_the_cookbook_has_a_page_a_task() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "cookbook").glob("*.md")}
    assert len(pages) >= 40
    for name, text in pages.items():
        assert re.match(r"# .+\n\n<!-- group: \w.* -->\n", text), name
    titles = [text.split("\n", 1)[0] for text in pages.values()]
    assert len(set(titles)) == len(titles)


def test_relative_links_of_the_sources_lead_to_pages() -> None:
    """Readers of the repository follow them too. Pages that the build makes have no source, so none links to them."""
    for path in DOCS.rglob("*.md"):
        for place in re.findall(r"\]\(([^):#]+\.md)", path.read_text(encoding="utf-8")):
            assert (path.parent / place).exists(), f"{path.name}: {place}"
