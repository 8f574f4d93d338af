"""The shortest names for a set of keys that name none of the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from .captures import escape
from .folding import fold_groups
from .keys import Capture, KeyPattern, is_index

__all__ = ["exact_paths", "exact_patterns"]

_FEW = 8
_BELOW = ".{below...}"


def exact_patterns(keys: Iterable[str], all_keys: Iterable[str]) -> list[str]:
    """Key patterns that match these keys and no others.

    >>> exact_patterns(["h.0.mask", "h.1.mask"], ["h.0.mask", "h.1.mask", "h.2.mask", "h.0.w"])
    ['h.{i:0,1}.mask']

    Where there are many, whole subtrees go by one pattern, as far as nothing else is below them.
    """
    mine = dict.fromkeys(keys)
    others = [key for key in all_keys if key not in mine]
    patterns = [_narrowed(g.pattern, mine, others, "") for g in fold_groups(mine)]
    if len(patterns) <= _FEW:
        return patterns
    roots = _roots(mine, others)
    below = [root for root in roots if root not in mine]
    wide = [_narrowed(g.pattern, below, others, _BELOW) + _BELOW for g in fold_groups(below)]
    wide += [_narrowed(g.pattern, mine, others, "") for g in fold_groups(r for r in roots if r in mine)]
    return wide if len(wide) < len(patterns) else patterns


def exact_paths(keys: Iterable[str], all_keys: Iterable[str]) -> list[str]:
    """Module paths, keys or patterns of such paths whose subtrees hold these keys and no others.

    >>> every = ["net.body.w", "net.head.weight", "net.head.bias", "h.0.a.w", "h.1.a.w", "h.2.a.w"]
    >>> exact_paths(["net.head.weight", "net.head.bias", "h.0.a.w", "h.2.a.w"], every)
    ['net.head', 'h.{i:0,2}.a.w']
    """
    mine = dict.fromkeys(keys)
    others = [key for key in all_keys if key not in mine]
    roots = _roots(mine, others)
    return [
        g.first if g.count == 1 else _narrowed(g.pattern, roots, [*others, *_prefixes(others)], "")
        for g in fold_groups(roots)
    ]


def _roots(keys: Collection[str], others: Iterable[str]) -> list[str]:
    """The paths whose subtrees hold these keys alone, each as long as its keys allow."""
    taken = {*others, *_prefixes(others)}
    below: dict[str, list[str]] = {}
    for key in keys:
        ends = [*(at for at, char in enumerate(key) if char == "."), len(key)]
        root = next((key[:at] for at in ends if key[:at] not in taken and key[:at]), key)
        below.setdefault(root, []).append(key)
    return list(dict.fromkeys(_common(root, found) for root, found in below.items()))


def _prefixes(keys: Iterable[str]) -> set[str]:
    return {key[:at] for key in keys for at, char in enumerate(key) if char == "."}


def _common(root: str, keys: Sequence[str]) -> str:
    """The longest path above all of the keys; of a single key, the key."""
    if len(keys) == 1 or root in keys:
        return keys[0] if len(keys) == 1 else root
    first, last = min(keys).split("."), max(keys).split(".")
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return ".".join(first[:shared])


def _narrowed(text: str, mine: Iterable[str], others: Iterable[str], below: str) -> str:
    """A folded pattern, its numbers restricted to those of its own keys where it would match another."""
    pattern = KeyPattern.parse(text)
    reach = KeyPattern.parse(text + below)
    if not pattern.captures or not any(reach.readings(key) for key in others):
        return text
    values: dict[str, dict[str, None]] = {}
    for key in mine:
        for reading in pattern.readings(key)[:1]:
            for name, value in reading.items():
                values.setdefault(name, {})[value] = None
    pieces = [_restricted(p.name, list(values[p.name])) if isinstance(p, Capture) else str(p) for p in pattern.pieces]
    return "".join(pieces)


def _restricted(name: str, values: Sequence[str]) -> str:
    if not all(map(is_index, values)):  # words, or numbers with leading zeros
        return escape(values[0]) if len(values) == 1 else f"{{{name}:{','.join(map(escape, sorted(values)))}}}"
    ordered = sorted(values, key=int)
    numbers = [int(value) for value in ordered]
    run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    if run and len(numbers) > 2:
        return f"{{{name}:{ordered[0]}..{ordered[-1]}}}"
    return escape(ordered[0]) if len(ordered) == 1 else f"{{{name}:{','.join(ordered)}}}"
