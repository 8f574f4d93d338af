"""One self-contained HTML file: styles, script and data stand in it, and nothing is fetched."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["html_page"]

_SKELETON = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<body data-kind="{kind}">
<noscript>This page needs JavaScript to draw what it holds; it fetches nothing.</noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def html_page(kind: str, title: str, data: Mapping[str, Any]) -> str:
    """Make the page of one result.

    >>> text = html_page("plan", "a & b", {"source": ["</script>"]})
    >>> "<title>a &amp; b</title>" in text, text.count("</script>")
    (True, 2)

    Args:
        kind: "plan", "diff", "inspect" or "stats", which have a script each.
        title: in the window's title bar.
        data: what the script draws, as plain data.
    """
    # "<" would let a key end the script element that holds the data
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, default=str).replace("<", "\\u003c")
    script = "\n".join(_asset(name) for name in ("trees.js", f"{kind}.js"))
    return _SKELETON.format(title=html.escape(title), style=_asset("page.css"), kind=kind, data=text, script=script)


@cache
def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")
