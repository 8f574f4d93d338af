"""What holds a match together: layers go over whole, and one kind of module comes from one kind of module.

A pair that breaks with what all others say is no pair: its true partner is missing, and an open question is better
than a wrong tensor.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .sides import UnitSide

__all__ = ["Agreement"]

_CONSISTENT = 0.75  # from this share on, a loop's counting is a rule, and what breaks it an exception

Slot = tuple[str, int]


@dataclass(frozen=True)
class Agreement:
    """What the pairs of two sides say together.

    Args:
        a, b: the sides.
        loops: for each loop of one side, told by the side and its prefix, the loop of the other that it goes with.
        slots: (side, prefix, value) -> the value that goes with it there.
        kinds: (side, family) -> how many pairs it makes with each family of the other side.
        placed: (family, family) -> pairs that stand where the layers say, and pairs that do not.
    """

    a: UnitSide
    b: UnitSide
    loops: Mapping[tuple[int, str], str]
    slots: Mapping[tuple[int, str, int], int]
    kinds: Mapping[tuple[int, str], Counter[str]]
    placed: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, a: UnitSide, b: UnitSide, pairs: Mapping[tuple[int, int], float]) -> Agreement:
        """What pairs say, each as loudly as its score."""
        kinds: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
        said: dict[tuple[int, str], dict[str, dict[int, dict[int, float]]]] = {}
        heard: dict[tuple[int, str], float] = defaultdict(float)
        for (i, j), score in pairs.items():
            worth = max(score, 0.1)
            ends = (a.families[i], a.slots[i]), (b.families[j], b.slots[j])
            for side, ((family, slots), (other, others)) in enumerate((ends, ends[::-1])):
                kinds[side, family][other] += 1
                for prefix, value in slots:
                    heard[side, prefix] += worth
                    for there, number in others:
                        votes = said.setdefault((side, prefix), {}).setdefault(there, {}).setdefault(value, {})
                        votes[number] = votes.get(number, 0.0) + worth
        loops: dict[tuple[int, str], str] = {}
        slots_: dict[tuple[int, str, int], int] = {}
        for name, rows in said.items():
            best = (_CONSISTENT, 0)
            for there, table in rows.items():
                share = sum(max(c.values()) for c in table.values()) / heard[name]
                wanted = {v: max(c, key=c.__getitem__) for v, c in sorted(table.items())}
                rank = (round(share, 2), len(set(wanted.values())))
                if rank >= best and _monotone(list(wanted.values())):
                    best = rank
                    loops[name] = there
                    slots_ |= {(*name, v): w for v, w in wanted.items()}
        found = cls(a, b, loops, slots_, kinds)
        for i, j in pairs:
            names = a.families[i], b.families[j]
            well, ill = found.placed.get(names, (0, 0))
            out = bool(found._misplaced(i, j))
            found.placed[names] = (well + (not out), ill + out)
        return found

    def breaks(self, i: int, j: int) -> bool:
        """Whether a pair stands in layers that do not belong together, or takes the place of what is missing."""
        return self._lost(i, j) or self._substitutes(i, j)

    def _lost(self, i: int, j: int) -> bool:
        """Whether a pair is out of its layer where others of its kind are not."""
        out = self._misplaced(i, j)
        if not out:
            return False
        names = self.a.families[i], self.b.families[j]
        well, ill = self.placed.get(names, (0, 1))
        if well >= ill:
            return True
        # A kind that is out of its layers as a whole is where it belongs.
        kin = [counts for pair, counts in self.placed.items() if (pair[0] == names[0]) != (pair[1] == names[1])]
        return ill == 1 and (out == "elsewhere" or any(counts[0] for counts in kin))

    def _misplaced(self, i: int, j: int) -> str:
        """Whether a pair is not where its layers are: `"elsewhere"` among them, or `"outside"`; empty where it is."""
        ends = (self.a.slots[i], self.b.slots[j])
        found = ""
        for side in (0, 1):
            there = dict(ends[1 - side])
            for slot in ends[side]:
                wanted = self._there(side, slot)
                if wanted is None or there.get(wanted[0]) == wanted[1]:
                    continue
                if wanted[0] in there:
                    return "elsewhere"
                found = "outside"
        return found

    def _substitutes(self, i: int, j: int) -> bool:
        """Whether one of two takes a place whose own holder is missing, though its own place is there."""
        return {self._usual(0, i, j), self._usual(1, j, i)} == {"there", "missing"}

    def _usual(self, side: int, at: int, to: int) -> str:
        """Whether the family that a unit's own family goes with otherwise is `"there"`, `"missing"` or `"same"`."""
        one, two = (self.a, self.b)[side], (self.a, self.b)[1 - side]
        others = Counter(self.kinds[side, one.families[at]])
        others[two.families[to]] -= 1
        usual, count = max(others.items(), key=lambda item: item[1])
        if count <= others[two.families[to]] or count < 1:
            return "same"
        wanted = [self._there(side, slot) for slot in one.slots[at]]
        if not wanted or None in wanted:
            return "same"
        rows = [slots for family, slots in zip(two.families, two.slots) if family == usual]
        return "there" if any(all(w in slots for w in wanted) for slots in rows) else "missing"

    def _there(self, side: int, slot: Slot) -> Slot | None:
        loop, value = self.loops.get((side, slot[0])), self.slots.get((side, *slot))
        return None if loop is None or value is None else (loop, value)


def _monotone(values: Sequence[int]) -> bool:
    """Whether numbers only rise or only fall, and are not all the same."""
    steps = {b > a for a, b in pairwise(values) if a != b}
    return len(steps) == 1
