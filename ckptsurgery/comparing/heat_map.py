"""A comparison as a page: a heat map of the values that differ, layer by role, and what else differs as lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..language.folding import fold
from ..pages.page import html_page
from ..specs import TensorSpec
from .numbers import Difference

__all__ = ["diff_page"]

_ROWS = 1500  # roles of a heat map
_LINES = 200  # lines of a list


Sections = Mapping[str, Mapping[str, str]]
"""Title -> keys and a text of each."""


def diff_page(
    title: str,
    facts: Sequence[str],
    sections: Sections,
    ties: Mapping[str, Sequence[Sequence[str]]],
    alike: Mapping[str, TensorSpec],
    values: Mapping[str, Difference],
) -> str:
    """Return the page of a comparison.

    Args:
        facts: lines that stand at its head. sections: keys that differ otherwise than in values.
        ties: title -> groups of keys. alike, values: as for `heat_rows`.
    """
    lists = [[name, len(keys), _lines(keys)] for name, keys in sections.items() if keys]
    tied = [(name, groups) for name, groups in ties.items() if groups]
    lists += [[name, len(groups), [" = ".join(names) for names in groups[:_LINES]]] for name, groups in tied]
    rows, columns = heat_rows(alike, values)
    data = {
        "title": title,
        "facts": list(facts),
        "identical": not (lists or values),
        "lists": lists,
        "columns": columns,
        "rows": rows[:_ROWS],
        "left": max(0, len(rows) - _ROWS),
    }
    return html_page("diff", title, data)


def heat_rows(alike: Mapping[str, TensorSpec], values: Mapping[str, Difference]) -> tuple[list[list[Any]], list[int]]:
    """Make the rows of the heat map: a role is a key without the number of its layer, which is the first in it.

    >>> spec = TensorSpec([2], "F32")
    >>> found = {"h.1.w": Difference(2, 1, max_abs=0.5, max_rel=0.25, cosine=0.9)}
    >>> heat_rows({"h.0.w": spec, "h.1.w": spec, "norm": spec}, found)
    ([['h.{i}.w', {0: 0, 1: [0.5, 0.25, 1, 2, 0.9]}], ['norm', {-1: 0}]], [0, 1])

    Args:
        alike: specs of the keys that both have in one shape. values: those whose values differ.

    Returns:
        For each role its cells by layer (-1 where there is none): 0 for equal values, else [max |a - b|, the largest
        relative difference, elements that differ, elements, cosine]. And the layers.
    """
    roles: dict[str, dict[int, Any]] = {}
    for key in alike:
        role, layer = _role(key)
        apart = values.get(key)
        roles.setdefault(role, {})[layer] = 0 if apart is None else _cell(apart)
    columns = sorted({layer for cells in roles.values() for layer in cells if layer >= 0})
    return [[role, cells] for role, cells in roles.items()], columns


def _role(key: str) -> tuple[str, int]:
    segments = key.split(".")
    for at, segment in enumerate(segments):
        if segment.isdecimal() and segment.isascii() and len(segment) < 6:
            return ".".join([*segments[:at], "{i}", *segments[at + 1 :]]), int(segment)
    return key, -1


def _cell(found: Difference) -> list[float | int | None]:
    cosine = None if found.cosine is None else _short(found.cosine, 7)
    return [_short(found.max_abs), _short(found.max_rel), found.differing, found.numel, cosine]


def _short(number: float, digits: int = 3) -> float:
    """A number of a few digits; JSON has none that are not finite."""
    return float(f"{number:.{digits}g}") if math.isfinite(number) else 1e308


def _lines(keys: Mapping[str, str]) -> list[str]:
    """The keys of each text, folded."""
    by_text: dict[str, list[str]] = {}
    for key, text in keys.items():
        by_text.setdefault(text, []).append(key)
    lines = [f"{folded}  {text}" for text, some in by_text.items() for folded in _folded(some)]
    return [*lines[:_LINES], f"… and {len(lines) - _LINES:,} more lines"] if len(lines) > _LINES else lines


def _folded(keys: Iterable[str]) -> list[str]:
    return [text for text, _ in fold(list(keys))]
