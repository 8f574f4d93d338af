"""A checkpoint as a page: a tree with a bar for the bytes of each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from ..pages.foldable_rows import tree_rows
from ..pages.page import html_page
from ..specs import TensorSpec, Tie
from ..wording import clipped

__all__ = ["inspection_page"]

_LINES = 200  # lines of a list
_WIDE = 300  # characters of a line


def inspection_page(
    title: str,
    facts: Sequence[str],
    specs: Mapping[str, TensorSpec],
    ties: Sequence[Tie],
    about: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the page of an inspection.

    Args:
        facts: lines that stand at its head. specs, ties: of the tensors. about: title -> what else is there, by name.
    """
    tied = {name: tie.names[0] for tie in ties for name in tie.names}
    data = {
        "title": title,
        "facts": list(facts),
        "source": tree_rows(specs, lambda key: (tied.get(key, ""),)),
        "lists": [[name, _lines(some)] for name, some in about.items() if some],
    }
    return html_page("inspect", title, data)


def _lines(facts: Mapping[str, Any]) -> list[str]:
    return [clipped(f"{name}: {value}", _WIDE) for name, value in islice(facts.items(), _LINES)]
