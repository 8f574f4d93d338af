"""Statistics as a page: a histogram of each tensor, now and before, beside what an initialiser promises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..ops.moments import Moments
from ..pages.page import html_page
from ..wording import counted

__all__ = ["histogram_page"]

_ROWS = 1000  # tensors on a page

Row = Mapping[str, Any]
"""A row of `Stats` as plain data."""


def histogram_page(title: str, now: Sequence[Row], before: Sequence[Row], promises: Mapping[str, Moments]) -> str:
    """Return the page of statistics.

    Args:
        now: rows to draw. before: rows of the same names, drawn as outlines. promises: name -> mean and deviation.
    """
    earlier = {row["name"]: row for row in before}
    kept = {row["name"]: promises[row["name"]].kept_by(row) for row in now if row["name"] in promises}
    facts = [counted(len(now), "tensor")]
    if kept:
        facts.append(f"{sum(kept.values())} of {len(kept)} are as promised")
    data = {
        "title": title,
        "facts": facts,
        "left": max(0, len(now) - _ROWS),
        "rows": [
            {
                "now": _drawn(row),
                "before": _drawn(earlier[row["name"]]) if row["name"] in earlier else None,
                "promised": _promise(promises[row["name"]], kept[row["name"]]) if row["name"] in kept else None,
            }
            for row in now[:_ROWS]
        ],
    }
    return html_page("stats", title, data)


def _drawn(row: Row) -> dict[str, Any]:
    names = ("name", "spec", "mean", "std", "min", "max", "nonfinite", "histogram")
    return {name: _plain(row[name]) for name in names}


def _promise(said: Moments, kept: bool) -> dict[str, Any]:
    return {"text": str(said), "mean": said.mean, "std": said.std, "low": _plain(said.low), "kept": kept}


def _plain(value: Any) -> Any:
    """JSON has no word for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
