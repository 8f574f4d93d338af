"""Deep models made small before they are matched: of many layers that are alike, four stand for all.

Alike means: the same keys under another number, with the same shapes. The first two and the last two stay, so that
order, reversal and repetition can still be seen. Both sides are cut in the same way: a run of n alike is cut only
where the other side has a run of n too.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..specs import TensorSpec

__all__ = ["Reduced", "reduced"]

_NUMBER = re.compile(r"(\d+)")
_KEPT = 4

Split = tuple[str, ...]
Row = tuple[Split, Hashable]
_Table = dict[str, dict[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Reduced:
    """One side cut down.

    Args:
        keys: those that stand for all, in their order.
        whole: how many there were.
        stands_for: prefix with numbers as `#` -> number -> the numbers that it stands for beside itself.
    """

    keys: list[str]
    whole: int
    stands_for: Mapping[str, Mapping[int, tuple[int, ...]]]

    def values(self, prefix: str, seen: Sequence[int]) -> tuple[int, ...]:
        """All numbers that the seen ones stand for."""
        table = self.stands_for.get(prefix, {})
        return tuple(sorted({v for n in seen for v in (n, *table.get(n, ()))}))

    def stands_in(self, key: str) -> bool:
        """Whether a key stands in a run of which some were left out."""
        parts = _NUMBER.split(key)
        return any("#".join(parts[:at:2]) in self.stands_for for at in range(1, len(parts), 2))

    def expanded(self, everything: Iterable[str], keys: Iterable[str]) -> list[str]:
        """The keys, and all that they stand for."""
        chosen = set(keys)
        if not chosen or not self.stands_for:
            return [k for k in everything if k in chosen]
        hidden = {p: {v: n for n, vs in table.items() for v in vs} for p, table in self.stands_for.items()}
        return [k for k in everything if k in chosen or _shown(k, hidden) in chosen]


def _shown(key: str, hidden: Mapping[str, Mapping[int, int]]) -> str:
    """The key that stands for a key."""
    parts = _NUMBER.split(key)
    prefix = ""
    for at in range(1, len(parts), 2):
        prefix += _NUMBER.sub("#", parts[at - 1])
        value = hidden.get(prefix, {}).get(int(parts[at]))
        if value is not None:
            parts[at] = str(value)
        prefix += "#"
    return "".join(parts)


def reduced(
    source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec], cut: bool = True
) -> tuple[Reduced, Reduced]:
    """The keys of both sides that stand for all, each side in its order; all of them where nothing is to be cut.

    >>> spec = TensorSpec((2,), "F32")
    >>> many = {f"h.{i}.{m}": spec for i in range(80) for m in "ab"}
    >>> reduced(many, {"x." + k: s for k, s in many.items()})[0].keys
    ['h.0.a', 'h.0.b', 'h.1.a', 'h.1.b', 'h.78.a', 'h.78.b', 'h.79.a', 'h.79.b']
    """
    if not cut:
        return Reduced(list(source), len(source), {}), Reduced(list(target), len(target), {})
    sides = [_rows(source), _rows(target)]
    seen: list[set[int]] = [set(), set()]
    for rows, sizes in zip(sides, seen):
        _reduce(rows, 1, None, sizes, {})
    found = []
    for rows in sides:
        stands_for: _Table = {}
        kept = {"".join(split) for split, _ in _reduce(rows, 1, seen[0] & seen[1], set(), stands_for)}
        keys = ["".join(split) for split, _ in rows]
        found.append(Reduced([k for k in keys if k in kept], len(keys), stands_for))
    return found[0], found[1]


def _rows(specs: Mapping[str, TensorSpec]) -> list[Row]:
    return [(tuple(_NUMBER.split(key)), (tuple(spec.shape), spec.dtype)) for key, spec in specs.items()]


def _reduce(rows: Iterable[Row], at: int, allowed: set[int] | None, sizes: set[int], stands_for: _Table) -> list[Row]:
    """The rows that stay, cut at the number in place `at` and at all behind it."""
    kept: list[Row] = []
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        split = row[0]
        if len(split) <= at:
            kept.append(row)
        else:
            groups.setdefault(split[at - 1], {}).setdefault(split[at], []).append(row)
    for before, values in groups.items():
        alike: dict[Hashable, list[str]] = {}
        for value, members in values.items():
            signature = frozenset(("".join(split[at + 1 :]), spec) for split, spec in members)
            alike.setdefault(signature, []).append(value)
        for names in alike.values():
            ordered = sorted(names, key=int)
            stay = ordered
            padded = any(v[0] == "0" < v for v in ordered)  # these are spelled out one by one
            if len(ordered) > _KEPT and not padded:
                sizes.add(len(ordered))
                if allowed is None:
                    stay = ordered[:1]
                elif len(ordered) in allowed:
                    stay = [*ordered[: _KEPT // 2], *ordered[-_KEPT // 2 :]]
                    split = values[ordered[0]][0][0]
                    prefix = "#".join((*split[: at - 1 : 2], before))
                    hidden = tuple(int(v) for v in ordered[_KEPT // 2 : -_KEPT // 2])
                    table = stands_for.setdefault(prefix, {})
                    table[int(stay[1])] = tuple(sorted({*table.get(int(stay[1]), ()), *hidden}))
            for name in stay:
                kept += _reduce(values[name], at + 2, allowed, sizes, stands_for)
    return kept
