"""Stacks of unequal depth: what both sides have goes by its number, and the other layers stay open as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..specs import TensorSpec
from .assumptions import Assumption
from .stacks import Pairing, Stack, align, beyond, stacks_of
from .units import read_units

__all__ = ["Depths", "depths_of"]


@dataclass(frozen=True)
class Depths:
    """What the longer of two stacks has more than the other.

    Args:
        source, target: the keys in layers that the other side does not have.
        pairings: the stacks of unequal depth.
    """

    source: Mapping[str, None] = ()  # type: ignore[assignment]
    target: Mapping[str, None] = ()  # type: ignore[assignment]
    pairings: Sequence[Pairing] = ()

    def assumptions(self) -> list[Assumption]:
        """One for each pair of stacks: its layers correspond by number, and which have no counterpart."""
        return [_assumption(p, self.target) for p in self.pairings]


def depths_of(source: Mapping[str, TensorSpec], target: Mapping[str, TensorSpec]) -> Depths:
    """The layers that only one side has.

    >>> spec = TensorSpec((2,), "F32")
    >>> one, two = ({f"{at}.{i}.{m}": spec for i in range(n) for m in "ab"} for at, n in (("h", 2), ("layers", 3)))
    >>> list(depths_of(one, two).target), len(depths_of(one, two).source)
    (['layers.2.a', 'layers.2.b'], 0)
    """
    sides = [read_units(specs.items()) for specs in (source, target)]
    pairings = [p for p in align(stacks_of(sides[0]), stacks_of(sides[1])) if not p.whole]
    keys = []
    for side, units in enumerate(sides):
        over = beyond(pairings, side, (u.path for u in units))
        lost = {k for u in units if u.path in over for leaf in u.leaves.values() for k in leaf.keys}
        keys.append(dict.fromkeys(k for k in (source, target)[side] if k in lost))
    return Depths(keys[0], keys[1], pairings)


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
