"""Differences of values as lines, the largest first.

Only keys that differ by about as much are folded into one line, so that the one layer that is broken is not hidden
among layers that were rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ..language.folding import Folded, fold_items
from ..language.grouping import template
from ..wording import counted
from .numbers import Difference

__all__ = ["Ranked", "ranked"]

_GAP = 4.0
"""A family of keys is cut where, from one key to the next in size, the difference grows by more than this factor."""

_Size = tuple[int, float]
"""How bad a difference is: its sort, then the largest |a - b|; what cannot be measured comes first."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """One line of differences.

    Args:
        text: the keys, folded.
        said: the numbers of these keys and of no others.
        count: how many keys there are.
    """

    text: str
    said: str
    count: int


def ranked(values: Mapping[str, Difference]) -> list[Ranked]:
    """Fold keys that differ by about as much, the largest difference first.

    >>> rows = ranked({f"h.{i}.w": Difference(4, 4, max_abs=0.5 if i == 2 else 1e-7) for i in range(4)})
    >>> [(row.text, row.said) for row in rows][0]
    ('h.2.w', '4 of 4 elements, max |a - b| 0.5, relative 0')
    >>> rows[1].text, rows[1].count
    ('h.{0,1,3}.w', 3)
    """
    families: dict[str, list[str]] = {}
    for key in values:
        families.setdefault(template(key), []).append(key)
    labels: dict[str, _Size] = {}
    for keys in families.values():
        labels.update((key, part) for part, some in _parts(keys, values) for key in some)
    found = [(_worst(line, values), line) for line in fold_items({key: labels[key] for key in values})]
    found.sort(key=lambda pair: _size(values[pair[0]]), reverse=True)  # stable: equal ones stay in their order
    return [Ranked(line.text, _said(line, worst, values), line.count) for worst, line in found]


def _parts(keys: list[str], values: Mapping[str, Difference]) -> Iterator[tuple[_Size, list[str]]]:
    """The keys of a family in parts that differ by about as much; each part told by its sort and its number."""
    by_size = sorted(keys, key=lambda key: _size(values[key]))
    part, number = [by_size[0]], 0
    for before, key in pairwise(by_size):
        (sort, low), (other, high) = _size(values[before]), _size(values[key])
        if sort != other or high > _GAP * low:
            yield (sort, number), part
            part, number = [], number + 1
        part.append(key)
    yield (_size(values[part[0]])[0], number), part


def _size(found: Difference) -> _Size:
    if found.differing is None:
        return 3, 0.0
    if not found.differing:
        return 0, 0.0
    return (2 if found.nonfinite else 1), found.max_abs


def _worst(line: Folded, values: Mapping[str, Difference]) -> str:
    return max(line.keys, key=lambda key: _size(values[key]))


def _said(line: Folded, worst: str, values: Mapping[str, Difference]) -> str:
    """The numbers of a line: sums, the largest, and where it is."""
    found = [values[key] for key in line.keys]
    if found[0].differing is None:
        return "other bytes"
    differing, numel = sum(d.differing or 0 for d in found), sum(d.numel for d in found)
    if not differing:
        return "other bits of equal values, such as the sign of a zero"
    largest, least = max(d.max_abs for d in found), min(d.max_abs for d in found)
    parts = [f"{differing:,} of {counted(numel, 'element')}", f"max |a - b| {largest:.3g}"]
    if least < largest:
        parts.append(f"in {worst}, {least:.3g} at least")
    parts.append(f"relative {max(d.max_rel for d in found):.3g}")
    cosines = [d.cosine for d in found if d.cosine is not None]
    parts += [f"cosine {min(cosines):.6f}"] if cosines else []
    nonfinite = sum(d.nonfinite for d in found)
    parts += [f"{nonfinite:,} with NaN or Inf"] if nonfinite else []
    return ", ".join(parts)
