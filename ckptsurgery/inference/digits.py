"""A rearrangement read off its effect: which axes a tensor was cut into, and in which order they lie now.

Where element i of the target is element f(i) of the source, f is a sum over digits: i is written in a mixed radix, and
each digit moves f by its stride. The digits are the axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["axes_of", "digits_of"]

Digit = tuple[int, int]  # size, stride in the source
_NAMES = "uvwyz"


def digits_of(places: np.ndarray[Any, Any]) -> list[Digit] | None:
    """The digits of a map from target places to source places, the slowest first; None where there are none.

    >>> import numpy as np
    >>> digits_of(np.arange(6).reshape(2, 3).T.reshape(-1))
    [(3, 1), (2, 3)]
    >>> digits_of(np.array([0, 2, 1, 5])) is None
    True
    """
    import numpy as np

    if len(places) == 0 or places[0] != 0:
        return None
    found: list[Digit] = []
    rest = places
    while len(rest) > 1:
        stride = int(rest[1])
        steps = np.arange(len(rest)) * stride
        wrong = np.flatnonzero(rest != steps)
        size = int(wrong[0]) if len(wrong) else len(rest)
        # The run may go on by chance into the next digit: it is the longest that tiles the whole.
        while size > 1 and not _tiles(rest, size, stride):
            size = _smaller(size, len(rest))
        if size < 2:
            return None
        found.insert(0, (size, stride))
        rest = rest[::size]
    return found


def _tiles(places: np.ndarray[Any, Any], size: int, stride: int) -> bool:
    import numpy as np

    if len(places) % size:
        return False
    block = places.reshape(-1, size)
    return bool((block == block[:, :1] + np.arange(size) * stride).all())


def _smaller(size: int, whole: int) -> int:
    return next((n for n in range(size - 1, 1, -1) if whole % n == 0), 1)


def axes_of(
    digits: Sequence[Digit], source: Sequence[int], target: Sequence[int]
) -> tuple[str, str, dict[str, int]] | None:
    """The axis lists of both sides, and the sizes that shapes do not show.

    >>> axes_of([(3, 1), (2, 3)], (2, 3), (3, 2))
    ('[a b]', '[b a]', {})
    >>> axes_of([(2, 24), (2, 6), (2, 12), (6, 1)], (8, 6), (8, 6))
    ('[(u v w) a]', '[(u w v) a]', {'u': 2, 'v': 2})
    """
    cut = _refined(digits, source, target)
    if cut is None:
        return None
    ordered = sorted(range(len(cut)), key=lambda n: -cut[n][1])
    left = _grouped([(n, cut[n][0]) for n in ordered], source)
    right = _grouped([(n, size) for n, (size, _) in enumerate(cut)], target)
    if left is None or right is None:
        return None
    names: dict[int, str] = {}
    plain, grouped = iter("abcdefgh"), iter([*_NAMES, *(n + "2" for n in _NAMES)])
    inside = {n for group in left if len(group) > 1 for n in group}
    for group in left:
        for n in group:
            names[n] = next(grouped) if n in inside else next(plain)
    dims = {names[n]: cut[n][0] for group in left if len(group) > 1 for n in group[:-1]}
    return _list(left, names), _list(right, names), dims


def _refined(digits: Sequence[Digit], source: Sequence[int], target: Sequence[int]) -> list[Digit] | None:
    """The digits cut where an axis of either side ends inside one."""
    edges = _edges(source)
    found: list[Digit] = []
    for size, stride in digits:
        parts = [(size, stride)]
        for edge in edges:
            last, step = parts[0]
            if step < edge < step * last and edge % step == 0:
                inner = edge // step
                if last % inner:
                    return None
                parts[0:1] = [(last // inner, edge), (inner, step)]
        found += parts
    # And in the target's own order: runs of digits must end where its axes do.
    result: list[Digit] = []
    below = 1
    for size, stride in reversed(found):
        for edge in _edges(target):
            if below < edge < below * size and edge % below == 0:
                inner = edge // below
                if size % inner:
                    return None
                result.insert(0, (inner, stride))
                size, stride, below = size // inner, stride * inner, edge
        result.insert(0, (size, stride))
        below *= size
    return result


def _edges(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous tensor's axes, the fastest first, and its size."""
    found, step = [], 1
    for n in reversed(shape):
        step *= n
        found.append(step)
    return found


def _grouped(rows: Sequence[tuple[int, int]], shape: Sequence[int]) -> list[list[int]] | None:
    """Digits dealt out to axes, in order; an axis of size one gets none."""
    found, at = [], 0
    for wanted in shape:
        group, size = [], 1
        while size < wanted and at < len(rows):
            group.append(rows[at][0])
            size *= rows[at][1]
            at += 1
        if size != wanted:
            return None
        found.append(group)
    return found if at == len(rows) else None


def _list(groups: Sequence[Sequence[int]], names: dict[int, str]) -> str:
    texts = []
    for group in groups:
        texts.append(
            "1" if not group else names[group[0]] if len(group) == 1 else f"({' '.join(names[n] for n in group)})"
        )
    return "[" + " ".join(texts) + "]"
