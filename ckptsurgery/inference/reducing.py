"""Deep models made small before they are matched: of many layers that are alike, four stand for all.

Alike means: the same keys under another number, with the same shapes. The first two and the last two stay, so that order,
reversal and repetition can still be seen. Both sides are cut in the same way: a run of n alike is cut only where the
other side has a run of n too.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping

from ..specs import TensorSpec

__all__ = ["reduced"]

_NUMBER = re.compile(r"(\d+)")
_KEPT = 4

Split = tuple[str, ...]
Row = tuple[Split, Hashable]


def reduced(source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec]) -> tuple[list[str], list[str]]:
    """The keys of both sides that stand for all, each side in its order.

    >>> spec = TensorSpec((2,), "F32")
    >>> many = {f"h.{i}.{m}": spec for i in range(80) for m in "ab"}
    >>> reduced(many, {"x." + k: s for k, s in many.items()})[0]
    ['h.0.a', 'h.0.b', 'h.1.a', 'h.1.b', 'h.78.a', 'h.78.b', 'h.79.a', 'h.79.b']
    """
    sides = [_rows(source), _rows(target)]
    seen: list[set[int]] = [set(), set()]
    for rows, sizes in zip(sides, seen):
        _reduce(rows, 1, None, sizes)
    both = seen[0] & seen[1]
    kept = [{"".join(split) for split, _ in _reduce(rows, 1, both, set())} for rows in sides]
    return [k for k in source if k in kept[0]], [k for k in target if k in kept[1]]


def _rows(specs: Mapping[str, TensorSpec]) -> list[Row]:
    return [(tuple(_NUMBER.split(key)), (tuple(spec.shape), spec.dtype)) for key, spec in specs.items()]


def _reduce(rows: Iterable[Row], at: int, allowed: set[int] | None, sizes: set[int]) -> list[Row]:
    """The rows that stay, cut at the number in place `at` and at all behind it."""
    kept: list[Row] = []
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        split = row[0]
        if len(split) <= at:
            kept.append(row)
        else:
            groups.setdefault(split[at - 1], {}).setdefault(split[at], []).append(row)
    for values in groups.values():
        alike: dict[Hashable, list[str]] = {}
        for value, members in values.items():
            signature = frozenset(("".join(split[at + 1 :]), spec) for split, spec in members)
            alike.setdefault(signature, []).append(value)
        for names in alike.values():
            ordered = sorted(names, key=int)
            stay = ordered
            if len(ordered) > _KEPT:
                sizes.add(len(ordered))
                if allowed is None:
                    stay = ordered[:1]
                elif len(ordered) in allowed:
                    stay = [*ordered[: _KEPT // 2], *ordered[-_KEPT // 2 :]]
            for name in stay:
                kept += _reduce(values[name], at + 2, allowed, sizes)
    return kept
