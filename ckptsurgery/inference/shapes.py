"""Which rearrangements could turn one shape into another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

__all__ = ["ShapeRelation", "relations"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShapeRelation:
    """One way from a shape to another: axes put in another order, ones dropped or added, neighbours merged or split.

    Args:
        cost: 0 for the same shape; less means likelier.
        kind: `"same"`, `"squeeze"`, `"transpose"`, `"merge"` or `"split"`.
        source, target: the axis lists, as a rule spells them; empty where the tensor moves as it is.
        moved: whether axes change places.
    """

    cost: float
    kind: str
    source: str = ""
    target: str = ""
    moved: bool = False


_LETTERS = "abcdefgh"


@lru_cache(maxsize=65536)
def relations(source: Shape, target: Shape) -> tuple[ShapeRelation, ...]:
    """All rearrangements between two shapes, the likeliest first.

    >>> [(r.kind, r.source, r.target) for r in relations((2, 3), (3, 2))]
    [('transpose', '[a b]', '[b a]')]
    >>> [(r.kind, r.target) for r in relations((1, 4, 3), (4, 3))], relations((2, 3), (6, 2))
    ([('squeeze', '[a b]')], ())
    >>> [(r.kind, r.source, r.target) for r in relations((8, 2, 3), (6, 8))]
    [('merge', '[a b c]', '[(b c) a]')]
    """
    if source == target:
        if len(source) == 2 and source[0] == source[1] and source[0] > 1:
            return (ShapeRelation(0.0, "same"), ShapeRelation(1.5, "transpose", "[a b]", "[b a]", True))
        return (ShapeRelation(0.0, "same"), *_same_permuted(source))
    if _product(source) != _product(target) or len(source) > 6 or len(target) > 6:
        return ()
    return _ranked([*_permuted(source, target), *_merged(source, target), *_split(source, target)])


def _product(shape: Shape) -> int:
    result = 1
    for n in shape:
        result *= n
    return result


def _ranked(found: Sequence[ShapeRelation]) -> tuple[ShapeRelation, ...]:
    best: dict[tuple[str, str], ShapeRelation] = {}
    for relation in sorted(found, key=lambda r: r.cost):
        best.setdefault((relation.source, relation.target), relation)
    return tuple(best.values())


def _same_permuted(shape: Shape) -> list[ShapeRelation]:
    """Permutations that a shape does not show: a convolution whose channels are equal, say."""
    if len(shape) < 3 or len(shape) > 5:
        return []
    return [r for r in _permuted(shape, shape) if r.kind == "transpose"][:4]


def _names(shape: Shape) -> list[str]:
    """A letter for each axis, `1` for a one."""
    letters = iter(_LETTERS)
    return ["1" if n == 1 else next(letters) for n in shape]


def _permuted(source: Shape, target: Shape) -> list[ShapeRelation]:
    """Ones dropped and added, the other axes in any order."""
    names = _names(source)
    real = [(n, c) for n, c in zip(source, names) if n != 1]
    wanted = [n for n in target if n != 1]
    if sorted(n for n, _ in real) != sorted(wanted):
        return []
    found = []
    for order in permutations(range(len(real))):
        if [real[i][0] for i in order] != wanted:
            continue
        picked = iter(real[i][1] for i in order)
        right = ["1" if n == 1 else next(picked) for n in target]
        left_text, right_text = _spelled(names, right)
        if list(order) == list(range(len(order))):
            if source == target:
                continue
            found.append(ShapeRelation(0.2, "squeeze", left_text, right_text))
        else:
            disorder = 0.0 if order in _kernels(source, target) else _disorder(order)
            found.append(ShapeRelation(1.0 + disorder, "transpose", left_text, right_text, True))
    return found


def _kernels(source: Shape, target: Shape) -> set[tuple[int, ...]]:
    """Orders of the axes that are not one in which kernels keep height before width, where ones hide the channels."""
    found = set()
    for full in ((3, 2, 0, 1), (2, 3, 0, 1), (2, 3, 1, 0)) if len(source) == len(target) == 4 else ():
        if 1 in source and tuple(source[i] for i in full) == target:
            real = [i for i in range(4) if source[i] != 1]
            found.add(tuple(real.index(i) for i in full if source[i] != 1))
    return found


def _disorder(order: Sequence[int]) -> float:
    """Small where the axes move in blocks that are usual: reversed matrices, trailing axes brought to the front."""
    n = len(order)
    if n == 2:
        return 0.0
    usual = {(n - 1, n - 2, *range(n - 2)): 0.0, (*range(2, n), 1, 0): 0.05}
    if tuple(order) in usual:
        return usual[tuple(order)]
    return 0.3 + 0.05 * sum(a > b for i, a in enumerate(order) for b in order[i + 1 :])


def _spelled(left: list[str], right: list[str]) -> tuple[str, str]:
    """Both lists, a one that stands on both sides left out of neither: it may appear on one side only."""
    if "1" not in left or "1" not in right:
        return f"[{' '.join(left)}]", f"[{' '.join(right)}]"
    spare = iter("xyzuvw")
    left, right = list(left), list(right)
    while "1" in left and "1" in right:
        name = next(spare)
        left[left.index("1")] = name
        right[right.index("1")] = name
    return f"[{' '.join(left)}]", f"[{' '.join(right)}]"


def _merged(source: Shape, target: Shape) -> list[ShapeRelation]:
    """Axes of the source as one axis of the target: neighbours, in any order of the groups, or others."""
    if not len(source) > len(target) >= 1 or len(source) > 4:
        return []
    names = _names(source)
    found = _gathered(source, target, names)
    for cuts in _groupings(len(source), len(target)):
        sizes = [_product(source[a:b]) for a, b in cuts]
        for order in permutations(range(len(cuts))):
            if [sizes[i] for i in order] != list(target):
                continue
            groups = [names[cuts[i][0] : cuts[i][1]] for i in order]
            if any("1" in g for g in groups):
                continue
            right = " ".join(g[0] if len(g) == 1 else f"({' '.join(g)})" for g in groups)
            moved = list(order) != sorted(order)
            found.append(ShapeRelation(1.2 + 0.4 * moved, "merge", f"[{' '.join(names)}]", f"[{right}]", moved))
    return found


def _gathered(source: Shape, target: Shape, names: list[str]) -> list[ShapeRelation]:
    """Axes that are no neighbours as one: the heads of a kernel `[h d k]` as a matrix `[(h k) d]`."""
    if (len(source), len(target)) != (3, 2) or 1 in source:
        return []
    found = []
    for apart in ((0, 2),):
        alone = next(n for n in range(3) if n not in apart)
        both = f"({names[apart[0]]} {names[apart[1]]})"
        size = source[apart[0]] * source[apart[1]]
        for right, wanted in (
            ((both, names[alone]), (size, source[alone])),
            ((names[alone], both), (source[alone], size)),
        ):
            if wanted == target:
                text = f"[{' '.join(right)}]"
                found.append(ShapeRelation(1.7, "merge", f"[{' '.join(names)}]", text, True))
    return found


def _split(source: Shape, target: Shape) -> list[ShapeRelation]:
    return [ShapeRelation(r.cost, "split", r.target, r.source, r.moved) for r in _merged(target, source)]


def _groupings(n: int, parts: int) -> list[list[tuple[int, int]]]:
    """All ways to cut n axes into runs."""
    if parts == 1:
        return [[(0, n)]]
    found = []
    for first in range(1, n - parts + 2):
        for rest in _groupings(n - first, parts - 1):
            found.append([(0, first), *((a + first, b + first) for a, b in rest)])
    return found
