"""Wrapper prefixes: which whole segments stand before the keys of one side and not of the other.

Nothing is guessed from a list of names. A prefix is taken off, put on or replaced when the other side shows the keys
without it, and by whole segments at the front only: no key is edited in its middle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..specs import TensorSpec

__all__ = ["Alignment", "align"]

_MOST_SAMPLED = 4096
Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Alignment:
    """A pair of prefixes, and how much it explains.

    Args:
        source, target: prefixes that end in their separator, or "".
        matched: source key -> target key, for all keys that it brings together.
        equal: how many of these have equal shapes.
    """

    source: str
    target: str
    matched: Mapping[str, str]
    equal: int

    @property
    def score(self) -> tuple[int, int, int]:
        """Better first: equal shapes, equal names, then short prefixes."""
        return self.equal, len(self.matched), -len(self.source) - len(self.target)

    def __str__(self) -> str:
        if self.source and self.target:
            return f"prefix {self.source!r} read as {self.target!r}"
        return f"prefix {self.source!r} taken off" if self.source else f"prefix {self.target!r} put on"


def align(source: Specs, target: Specs) -> tuple[Alignment, list[Alignment]]:
    """The alignment that explains most, and its rivals: others that explain as much from other keys.

    >>> a = {"module.fc.weight": TensorSpec([2, 2], "F32"), "module.fc.bias": TensorSpec([2], "F32")}
    >>> b = {"fc.weight": TensorSpec([2, 2], "F32"), "fc.bias": TensorSpec([2], "F32")}
    >>> best, rivals = align(a, b)
    >>> str(best), rivals
    ("prefix 'module.' taken off", [])
    """
    found = [_aligned(a, b, source, target) for a, b in _candidates(source, target)]
    plain = _aligned("", "", source, target)
    good = [f for f in found if f.equal and _shown(f, source, target)]
    best = max([plain, *good], key=lambda f: f.score)
    if not best.source and not best.target:
        return plain, []
    rivals = [f for f in good if f is not best and _rivals(f, best)]
    return best, rivals


def _aligned(a: str, b: str, source: Specs, target: Specs) -> Alignment:
    matched = {k: b + k[len(a) :] for k in source if k.startswith(a) and b + k[len(a) :] in target}
    equal = sum(source[k].shape == target[t].shape for k, t in matched.items())
    return Alignment(a, b, matched, equal)


def _shown(found: Alignment, source: Specs, target: Specs) -> bool:
    """Whether there is evidence enough: a prefix that is replaced needs more of it than one that is taken off."""
    mine = sum(k.startswith(found.source) for k in source)
    theirs = sum(k.startswith(found.target) for k in target)
    share = max(len(found.matched) / mine, len(found.matched) / theirs)
    if found.source and found.target:
        deep = any(k.count(".", len(found.source)) for k in found.matched)
        return share >= 0.5 and found.equal >= 3 and deep
    return share >= 0.5 or found.equal >= 8


def _rivals(other: Alignment, best: Alignment) -> bool:
    """Whether another alignment explains the same from other keys (student and teacher), or into other keys."""
    if len(other.matched) < 0.9 * len(best.matched) or other.equal < 0.5 * best.equal:
        return False
    apart = not (other.matched.keys() & best.matched.keys())
    into_others = not (set(other.matched.values()) & set(best.matched.values()))
    return apart != into_others


def _candidates(source: Specs, target: Specs) -> Iterator[tuple[str, str]]:
    """Pairs of prefixes that are left over when two keys end alike, most frequent first."""
    tree = _Suffixes(target)
    votes: Counter[tuple[str, str]] = Counter()
    keys = list(source)
    step = max(1, len(keys) // _MOST_SAMPLED)
    for key in keys[::step]:
        for other in tree.nearest(key):
            a, b = _leftover(key, other)
            votes[(a, b)] += 1
    votes.pop(("", ""), None)
    for pair, _ in votes.most_common(32):
        yield pair


class _Suffixes:
    """Keys by their last segments, to find those that share the longest end with another key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.by_suffix: dict[str, list[str]] = {}
        for key in keys:
            at = len(key)
            while at > 0:
                at = key.rfind(".", 0, at)
                self.by_suffix.setdefault(key[at + 1 :], []).append(key)

    def nearest(self, key: str, most: int = 4) -> list[str]:
        """Keys that share the longest end, whole segments; none when they are too many to tell."""
        at = -1
        while True:
            found = self.by_suffix.get(key[at + 1 :])
            if found is not None:
                exact = [k for k in found if k == key[at + 1 :]]
                rest = exact or found
                return rest if len(rest) <= most else []
            at = key.find(".", at + 1)
            if at < 0:
                return []


def _leftover(key: str, other: str) -> tuple[str, str]:
    a, b = key.split("."), other.split(".")
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    return "".join(s + "." for s in a[: len(a) - same]), "".join(s + "." for s in b[: len(b) - same])
