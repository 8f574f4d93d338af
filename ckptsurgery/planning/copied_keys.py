"""Which of two rules takes a key: the rule whose tensor it is, or one whose result is proved equal to another's.

The way back from `+ layers.{i} -> layers.{i+n}` is `layers.{i+n} -> + layers.{i}`: a copy, compared with the tensor
that another rule makes and then left out. The rule of the originals, `layers.{i} -> layers.{i}`, matches the copies
too. A key is a copy if the tensor that it repeats is made by another rule from a key that is not a copy itself. This
decides each key, unless the answer would depend on itself (`{7-i}` of a stack that is mirrored).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import RecipeError
from ..language.keys import KeyPattern
from .matching import MatchedColumns

__all__ = ["CopiedKeys", "KeyPath"]


@dataclass(frozen=True, slots=True)
class KeyPath:
    """The way of a key through a rule of one source and one target.

    >>> path = KeyPath(KeyPattern.parse("h.{i+2}.w"), KeyPattern.parse("h.{i}.w"))
    >>> path.made("h.3.w"), path.made("h.1.w"), path.read("h.1.w")
    ('h.1.w', None, 'h.3.w')

    Args:
        source, target: the patterns.
        copies: whether the target is made by another rule as well, and must be equal.
    """

    source: KeyPattern
    target: KeyPattern
    copies: bool = False

    def made(self, key: str) -> str | None:
        """The target key of a source key."""
        return _through(key, self.source, self.target)

    def read(self, key: str) -> str | None:
        """The source key of a target key."""
        return _through(key, self.target, self.source)


@dataclass
class CopiedKeys:
    """Decides which matched keys are copies; about each key once.

    Args:
        keys: of the source.
        paths: rule -> the way of its keys, where it has one source and one target.
        rests: the ways through fallback rules, which take what no rule matches.
        known: key -> the rule that copies it, or None for an original.
        undecided: keys whose answer depends on itself.
    """

    keys: Collection[str]
    paths: Mapping[int, KeyPath]
    rests: Sequence[KeyPath] = ()
    known: dict[str, int | None] = field(default_factory=dict)
    undecided: set[str] = field(default_factory=set)

    def settled(self, hits: Sequence[tuple[int, MatchedColumns]]) -> list[tuple[int, MatchedColumns]]:
        """Return the matches of rules on one group of keys, where each copied key is left to the rule that copies it.

        Args:
            hits: rule -> the keys that it matches.
        """
        if len(hits) < 2 or not any(self.copies(number) for number, _ in hits):
            return list(hits)
        times = Counter(key for _, matches in hits for key in matches.keys)
        kept = [(n, m.where([times[key] == 1 or self.keeps(n, key) for key in m.keys])) for n, m in hits]
        return [(number, matches) for number, matches in kept if matches.keys]

    def copies(self, number: int) -> bool:
        """Whether what a rule makes must be equal to what another makes."""
        return number in self.paths and self.paths[number].copies

    def keeps(self, number: int, key: str) -> bool:
        """Whether a rule keeps a key that several rules match."""
        chain = [key]  # no recursion: of a stack that is repeated often, each copy leads to the one before
        while chain:
            before = self.decide(chain[-1], chain)
            if before is None:
                chain.pop()
            else:
                chain.append(before)
        if key in self.undecided:
            return True
        copier = self.known[key]
        return number == copier if copier is not None else not self.copies(number)

    def decide(self, key: str, chain: Sequence[str]) -> str | None:
        """Decide about a key, or return another that has to be decided before."""
        if key in self.known:
            return None
        copier = None
        for number, path in self.paths.items():
            for origin in self.origins(key, number) if path.copies else ():
                if origin not in self.known and origin in chain:
                    self.undecided.update(chain[chain.index(origin) :])
                elif origin not in self.known:
                    return origin
                elif self.known[origin] is None and origin not in self.undecided:
                    copier = number
        self.known[key] = copier
        return None

    def origins(self, key: str, copier: int) -> list[str]:
        """The keys of which other rules make the tensor that a rule compares this key with."""
        made = self.paths[copier].made(key)
        if made is None:
            return []
        ways = [path for number, path in self.paths.items() if number != copier and not path.copies]
        found = {path.read(made) for path in (*ways, *self.rests)}
        return sorted(origin for origin in found if origin is not None and origin != key and origin in self.keys)


def _through(key: str, pattern: KeyPattern, other: KeyPattern) -> str | None:
    """The key of another pattern that goes with a key; None where there is none, or more than one."""
    try:
        found = pattern.readings(key)
        if len(found) != 1 or not all(capture.name in found[0] for capture in other.captures):
            return None
        return other.spell_match(pattern, found[0])
    except (RecipeError, KeyError, ValueError):
        return None
