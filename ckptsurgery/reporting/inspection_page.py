"""What a checkpoint holds, as a page: a tree with a bar for the bytes of each part."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..pages.page import html_page
from ..pages.trees import tree_rows
from ..wording import clipped, counted

if TYPE_CHECKING:
    from .inspecting import Inspection

__all__ = ["inspection_page"]

_LINES = 200  # lines of a list
_WIDE = 300  # characters of a line


def inspection_page(found: Inspection, title: str) -> str:
    """Return the page of an inspection."""
    tied = {name: tie.names[0] for tie in found.ties for name in tie.names}
    about = [("extras", found.extras), ("metadata", found.metadata), ("config", found.config or {})]
    lists = [[name, _lines(some)] for name, some in about if some]
    if found.unreadable:
        lists.insert(0, ["unread", _lines(found.unreadable)])
    data = {
        "title": title,
        "facts": [
            found.source,
            counted(len(found.specs), "tensor"),
            *([counted(len(found.ties), "tie")] * bool(found.ties)),
        ],
        "source": tree_rows(found.specs, lambda key: (tied.get(key, ""),)),
        "lists": lists,
    }
    return html_page("inspect", title, data)


def _lines(facts: Mapping[str, Any]) -> list[str]:
    return [clipped(f"{name}: {value}", _WIDE) for name, value in islice(facts.items(), _LINES)]
