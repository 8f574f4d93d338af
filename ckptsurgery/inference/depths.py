"""Parts that only one side has: the last layers of the deeper of two stacks, and copies of a network beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..specs import TensorSpec
from .assumptions import Assumption
from .stacks import Pairing, Stack, align, beyond, stacks_of
from .units import read_units
from .weight_copies import copied_trees, copies_in

__all__ = ["Depths", "depths_of"]


@dataclass(frozen=True)
class Depths:
    """The parts that one side has and the other does not.

    Args:
        source, target: the keys in layers, and in copies, that the other side does not have.
        pairings: the stacks of unequal depth.
        trees: for each side, the names of the copies.
        made: the target keys that may be made.
    """

    source: Mapping[str, None] = ()  # type: ignore[assignment]
    target: Mapping[str, None] = ()  # type: ignore[assignment]
    pairings: Sequence[Pairing] = ()
    trees: tuple[Sequence[str], Sequence[str]] = ((), ())
    made: tuple[str, ...] = ()

    def assumptions(self) -> list[Assumption]:
        """One for each pair of stacks, whose layers correspond by number, and one for copies that are left out."""
        found = [_assumption(p, self.target) for p in self.pairings]
        for name, trees in zip(("source", "target"), self.trees):
            if trees:
                called = " and ".join(map(repr, trees[:3]))
                text = f"the {name} holds copies of its tensors, called {called}, which have no counterpart"
                found.append(Assumption("tree", text + "; the originals have one", self.made))
        return found


def depths_of(source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec]) -> Depths:
    """The layers, and the copies, that only one side has.

    >>> spec = TensorSpec((2,), "F32")
    >>> one, two = ({f"{at}.{i}.{m}": spec for i in range(n) for m in "ab"} for at, n in (("h", 2), ("layers", 3)))
    >>> list(depths_of(one, two).target), len(depths_of(one, two).source)
    (['layers.2.a', 'layers.2.b'], 0)
    """
    copies = [copies_in(specs) for specs in (source, target)]
    if copies[0] and copies[1]:
        copies = [{}, {}]
    listed = [{k: s for k, s in specs.items() if k not in copy} for specs, copy in zip((source, target), copies)]
    sides = [read_units(specs.items()) for specs in listed]
    pairings = [p for p in align(stacks_of(sides[0]), stacks_of(sides[1])) if not p.whole]
    keys = []
    for side, units in enumerate(sides):
        over = beyond(pairings, side, (u.path for u in units))
        lost = {k for u in units if u.path in over for leaf in u.leaves.values() for k in leaf.keys}
        keys.append(dict.fromkeys(k for k in (source, target)[side] if k in lost or k in copies[side]))
    trees = copied_trees(copies[0]), copied_trees(copies[1])
    return Depths(keys[0], keys[1], pairings, trees, tuple(k for k in target if k not in keys[1]))


def _assumption(pairing: Pairing, target: Mapping[str, None]) -> Assumption:
    one, two = pairing.source, pairing.target
    ends = (("source", one, set(pairing.layers)), ("target", two, set(pairing.layers.values())))
    more = [f"layers {_run(stack, known)} of the {name} have no counterpart" for name, stack, known in ends
            if len(stack.layers) > len(known)]  # fmt: skip
    text = (
        f"'{one.at}' has {len(one.layers)} layers and '{two.at}' has {len(two.layers)}: layers correspond by number; "
        + ", and ".join(more)
    )
    return Assumption("depth", text, tuple(k for k in target if two.holds(k) is not None))


def _run(stack: Stack, known: set[int]) -> str:
    left = [v for v in stack.layers if v not in known]
    return f"{left[0]} to {left[-1]}" if left == list(range(left[0], left[-1] + 1)) else ", ".join(map(str, left))
