"""The habits that make prose hard to read are counted, and their number may only fall."""

from __future__ import annotations

from pathlib import Path

import habits


def test_no_habit_grows() -> None:
    found = habits.counts()
    more = {name: (count, habits.LIMITS[name]) for name, count in found.items() if count > habits.LIMITS[name]}
    assert not more, f"{more}: `python scripts/docs/habits.py --list NAME` shows the places"


def test_habits_are_found_in_docstrings_comments_and_pages(tmp_path: Path) -> None:
    (tmp_path / "ckptsurgery").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "ckptsurgery" / "x.py").write_text('"""The header says so."""\n# it lies here\nx = "is no file"\n')
    (tmp_path / "docs" / "x.md").write_text("What is split has sizes.\n\n```python\n# it says so\n```\n")
    for name in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("Plain.\n")
    assert habits.counts(tmp_path) == {"says": 2, "is no": 1, "what": 1, "alone": 0, "whatever": 0}
