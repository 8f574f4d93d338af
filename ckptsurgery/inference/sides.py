"""One side as matching sees it: what each unit's name means, where it stands, which numbers count what."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .norms import is_norm, stage
from .roles import attention_sorts
from .units import Unit, split_path
from .vocabulary import STRUCTURAL, concepts, words

__all__ = ["Loop", "UnitSide"]

_NUMBER = re.compile(r"(\d+)")
_ORDINALS = {"first": "1", "second": "2", "third": "3", "fourth": "4"}
_ORDINAL = re.compile(rf"(?<![A-Za-z])({'|'.join(_ORDINALS)})(?![A-Za-z])")
_FEED = frozenset({"gate", "up", "down"})
_FADE = 0.72  # what a concept is worth for each segment that it stands farther from the leaf


_Block = tuple[str, tuple[int, ...], int]


@dataclass(frozen=True)
class Loop:
    """A number that counts: all units under one prefix, under any outer numbers.

    Args:
        prefix: the template before the number.
        values: its values, in order.
        sizes: how many elements stand under each value, all outer numbers together.
    """

    prefix: str
    values: tuple[int, ...]
    sizes: tuple[int, ...]

    def rank(self, value: int) -> int:
        """Where a value stands among them."""
        return self.values.index(value)


class UnitSide:
    """The units of one side and what is known of each.

    Args:
        units: after fusing.
        ordered: whether the order of the keys is the order of definition, not of the alphabet.
        counted: the prefixes, numbers as `#`, behind which layers are counted, though there may be only one.

    Attributes:
        backwards: prefixes of loops that the other side counts from the other end.
    """

    def __init__(self, units: Sequence[Unit], ordered: bool, counted: Container[str] = ()) -> None:
        self.units = tuple(units)
        self.ordered = ordered
        self.counted = counted
        self.backwards: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.units)

    @cached_property
    def kernels(self) -> bool:
        """Whether more matrices are called kernels than weights."""
        keys = [u.leaves["weight"].keys[0] for u in self.units if "weight" in u.leaves and len(u.weight.shape) == 2]
        called = Counter(words(split_path(key)[1])[-1:] for key in keys)
        return called["kernel",] > called["weight",]

    @cached_property
    def bags(self) -> list[dict[str, float]]:
        """For each unit: concept -> weight, nearer the leaf weighing more."""
        seen: dict[str, dict[str, float]] = {}
        found = [seen.setdefault(u.template, _bag(u)) for u in self.units]
        sorts = attention_sorts(u.template for u in self.units)
        return [bag | {sorts[u.template]: 1.0} if u.template in sorts else bag for u, bag in zip(self.units, found)]

    @cached_property
    def splits(self) -> list[tuple[str, ...]]:
        """For each unit, its path cut at its numbers, also those in words: text, number, text, …"""
        return [tuple(_NUMBER.split(_ORDINAL.sub(lambda m: _ORDINALS[m[0]], u.path))) for u in self.units]

    @cached_property
    def loops(self) -> dict[str, Loop]:
        """Prefix template -> the loop behind it: numbers under which more than one unit stands."""
        under: dict[str, dict[int, Counter[str]]] = {}
        sizes: dict[str, Counter[int]] = {}
        for unit, split in zip(self.units, self.splits):
            prefix = ""
            for at in range(1, len(split), 2):
                prefix += split[at - 1]
                value = int(split[at])
                under.setdefault(prefix, {}).setdefault(value, Counter())["".join(split[at + 1 :])] += 1
                sizes.setdefault(prefix, Counter())[value] += _elements(unit)
                prefix += "#"
        found = {}
        for prefix, values in under.items():
            widths = sorted(len(v) for v in values.values())
            several = len(values) > 1 and (widths[len(widths) // 2] > 1 or len(values) > 6)
            if several or prefix in self.counted:
                order = tuple(sorted(values))
                found[prefix] = Loop(prefix, order, tuple(sizes[prefix][v] for v in order))
        return found

    @cached_property
    def families(self) -> list[str]:
        """For each unit: its path with the numbers of loops replaced by `#`, the others left."""
        return _named(self.splits, self.loops)

    @cached_property
    def spelled(self) -> list[str]:
        """The families with numbers in words left as they are."""
        return _named([tuple(_NUMBER.split(u.path)) for u in self.units], self.loops)

    def counts(self, layers: Container[str]) -> list[int]:
        """For each unit: how many are called alike but for the numbers behind these prefixes."""
        names = _named(self.splits, layers)
        many = Counter(names)
        return [many[name] for name in names]

    @cached_property
    def slots(self) -> list[tuple[tuple[str, int], ...]]:
        """For each unit: the loops that it stands in, outermost first, each with its value there."""
        found = []
        for split in self.splits:
            row, prefix = [], ""
            for at in range(1, len(split), 2):
                prefix += split[at - 1]
                if prefix in self.loops:
                    row.append((prefix, int(split[at])))
                prefix += "#"
            found.append(tuple(row))
        return found

    @property
    def numbers(self) -> list[tuple[int, ...]]:
        """For each unit, its path's numbers as the other side counts."""
        found = []
        for split in self.splits:
            row, prefix = [], ""
            for at in range(1, len(split), 2):
                prefix += split[at - 1]
                row.append(-int(split[at]) if prefix in self.backwards else int(split[at]))
                prefix += "#"
            found.append(tuple(row))
        return found

    @cached_property
    def prefixes(self) -> list[tuple[str, ...]]:
        """For each unit: the modules around it, outermost first."""
        found = []
        for unit in self.units:
            cuts = [m.start() for m in re.finditer(r"[./]", unit.path)]
            found.append(tuple(unit.path[:c] for c in cuts))
        return found

    @cached_property
    def norm_ranks(self) -> list[tuple[tuple[int, int, bool], ...]]:
        """For each norm, its rank and how many there are in each numbered block around it, innermost first.

        Among those that as many blocks have (True), and among all of its size. By name where names tell all of them
        apart, else by definition.
        """
        counts = self.counts(self.loops)
        blocks: dict[_Block, list[int]] = defaultdict(list)
        rows: list[list[_Block]] = [[] for _ in self.units]
        for i, (unit, split) in enumerate(zip(self.units, self.splits)):
            if self.slots[i] and len(unit.weight.shape) == 1 and is_norm(unit.path):
                paths = _blocks(split, self.loops)
                rows[i] = [(path, unit.weight.shape, n) for n in (counts[i], 0) for path in paths]
                for row in rows[i]:
                    blocks[row].append(i)
        ranks: dict[_Block, dict[int, int]] = {}
        for name, members in blocks.items():
            stages = {i: stage(self.spelled[i]) for i in members}
            told = set(stages.values())
            if None not in told and len(told) == len(members):
                ranked = sorted(members, key=lambda i: stages[i] or 0.0)
            elif self.ordered:
                ranked = sorted(members, key=lambda i: self.units[i].order)
            elif told == {None} and len({self.units[i].numbers for i in members}) == len(members):
                ranked = sorted(members, key=lambda i: self.units[i].numbers)
            else:
                continue
            ranks[name] = {i: rank for rank, i in enumerate(ranked)}
        return [tuple((ranks[r][i], len(ranks[r]), r[2] > 0) for r in row if r in ranks) for i, row in enumerate(rows)]

    @cached_property
    def norm_stages(self) -> list[float | None]:
        """For each norm in a layer, its place by words, numbers left out; None for others."""
        return [
            stage(_NUMBER.sub("", name)) if slots and len(unit.weight.shape) == 1 and is_norm(unit.path) else None
            for unit, slots, name in zip(self.units, self.slots, self.spelled)
        ]

    @cached_property
    def sequence_ranks(self) -> list[tuple[tuple[int, int, bool], ...]]:
        """For each unit: rank, count and whether all are numbered, in each module whose parts follow each other.

        They do where all are numbered alike, but for one that is called the input and one that is called the output.
        """
        modules: dict[str, list[int]] = defaultdict(list)
        for i, prefixes in enumerate(self.prefixes):
            for prefix in prefixes[-3:]:
                modules[prefix].append(i)
        found: list[list[tuple[int, int, bool]]] = [[] for _ in self.units]
        for prefix, members in modules.items():
            if not 2 < len(members) < 13:
                continue
            paths = [self.units[i].path[len(prefix) + 1 :] for i in members]
            ends = [{"in": -1, "out": 1}.get(end, 0) for end in (re.split(r"[._/]", path)[-1] for path in paths)]
            counted = [path for path, end in zip(paths, ends) if not end]
            if len({_NUMBER.sub("#", path) for path in counted}) != 1 or len(_NUMBER.findall(counted[0])) != 1:
                continue
            if sorted(filter(None, ends)) not in ([], [-1, 1]):
                continue
            keys = [(end, int(_NUMBER.findall(path)[0]) if not end else 0) for path, end in zip(paths, ends)]
            for rank, at in enumerate(sorted(range(len(members)), key=keys.__getitem__)):
                found[members[at]].append((rank, len(members), not any(ends)))
        return [tuple(row) for row in found]

    @cached_property
    def elements(self) -> dict[str, int]:
        """Module path -> the elements of all floating-point tensors under it."""
        total: Counter[str] = Counter()
        for unit, prefixes in zip(self.units, self.prefixes):
            size = _elements(unit)
            for prefix in (*prefixes, unit.path):
                total[prefix] += size
        return total


def _named(splits: Iterable[tuple[str, ...]], layers: Container[str]) -> list[str]:
    found = []
    for split in splits:
        text, prefix = "", ""
        for at in range(0, len(split) - 1, 2):
            prefix += split[at]
            text += split[at] + ("#" if prefix in layers else split[at + 1])
            prefix += "#"
        found.append(text + split[-1])
    return found


def _blocks(split: tuple[str, ...], loops: Mapping[str, Loop]) -> list[str]:
    """The paths up to the loops' numbers, the innermost first."""
    text, prefix = "", ""
    found: list[str] = []
    for at in range(0, len(split) - 1, 2):
        prefix += split[at]
        text += split[at] + split[at + 1]
        if prefix in loops:
            found.insert(0, text)
        prefix += "#"
    return found


def _elements(unit: Unit) -> int:
    total = 0
    for leaf in unit.leaves.values():
        size = 1 if leaf.kind == "float" else 0
        for n in leaf.shape:
            size *= n
        total += size
    return total


def _bag(unit: Unit) -> dict[str, float]:
    found: dict[str, float] = {}
    weight = 1.0
    for segment in reversed(unit.segments):
        listed = concepts(segment)
        for concept, worth in listed:
            worth *= weight * (0.2 if concept == STRUCTURAL else 1.0)
            found[concept] = max(found.get(concept, 0.0), worth)
        if listed:
            weight *= _FADE
    if unit.roles & _FEED:
        # `linear_1` is the first of two or the second: the shapes beside it know better than the word.
        found = {c: w for c, w in found.items() if c not in _FEED or c in unit.roles}
    for role in sorted(unit.roles):
        found[role] = max(found.get(role, 0.0), 0.6)
    return found
