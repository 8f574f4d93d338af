"""Which layers belong together, as far as known tensors show it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .findings import Finding

__all__ = ["Context"]

_ENOUGH = 4  # partners that all have to stand in one module before others are kept out of it
_LAYER = re.compile(r"\d+(?=[./_]|$)")


@dataclass(frozen=True)
class Context:
    """For each numbered path of one side, the paths of the other that its tensors go with.

    Args:
        ends: source's path -> target's paths, and target's path -> source's paths.
    """

    ends: tuple[Mapping[str, frozenset[str]], Mapping[str, frozenset[str]]]

    @classmethod
    def of(cls, findings: Iterable[Finding]) -> Context:
        """Collect the evidence of findings."""
        seen: tuple[dict[str, list[set[str]]], dict[str, list[set[str]]]] = defaultdict(list), defaultdict(list)
        for finding in findings:
            sides = finding.sources, finding.targets
            for side in (0, 1):
                there = {p for k in sides[1 - side] for p in _around(k)}
                for path in {p for k in sides[side] for p in _layers(k)}:
                    seen[side][path].append(there)
        return cls((_shared(seen[0]), _shared(seen[1])))

    def agrees(self, sources: Sequence[str], targets: Sequence[str]) -> bool:
        """Whether tensors stand in layers that go together as far as is known."""
        sides = sources, targets
        for side in (0, 1):
            there = {p for k in sides[1 - side] for p in _around(k)}
            for path in {p for k in sides[side] for p in _layers(k)}:
                if not self.ends[side].get(path, frozenset()) <= there:
                    return False
        return True


def _shared(seen: Mapping[str, Sequence[set[str]]]) -> dict[str, frozenset[str]]:
    """Return the layers of all partners of a path's tensors or, where these are in none and are enough, the modules."""
    found = {}
    for path, rows in seen.items():
        shared = set.intersection(*rows)
        layers = {p for p in shared if p[-1].isdigit()}
        found[path] = frozenset(layers or (shared if len(rows) >= _ENOUGH else ()))
    return found


def _layers(key: str) -> Iterator[str]:
    """The paths of a key that end in a number."""
    return (key[: found.end()] for found in _LAYER.finditer(key))


def _around(key: str) -> Iterator[str]:
    """The modules around a tensor, and its paths that end in a number."""
    yield from (key[: found.start()] for found in re.finditer(r"[./]", key))
    yield from _layers(key)
