"""A headless Chromium, which shows pages as people see them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
)


def visit(chromium: str, page: Path, profile: Path, state: str = "", *flags: str) -> str:
    """What the page is once its script has run."""
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", *flags, f"file://{page}#{state}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(dom: str, tree: int = 0) -> list[str]:
    """The names of a tree's visible rows."""
    part = dom.split('<div class="tree">')[tree + 1].split('<svg class="ribbons"')[0].split("<aside")[0]
    return re.findall(r'<span class="name">([^<]*)</span>', part)
