"""Keys that differ in numbers only, found together: `layers.0.w` and `layers.1.w` have the template `layers.0.w`.

What is true of a template is true of its keys, so that a hundred thousand keys are some dozen cases.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

__all__ = ["KeyGroup", "group_keys", "template"]

_DIGITS = re.compile(r"[0-9]+")
_BLOCK = 4096
_ZEROS = {ord(digit): "0" for digit in "0123456789"}


@dataclass
class KeyGroup:
    """Keys of one template, and their numbers.

    Args:
        template: the keys with `0` for every number.
        keys: in the checkpoint's order.
    """

    template: str
    keys: list[str]

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where the numbers stand in the template."""
        return [match.span() for match in _DIGITS.finditer(self.template)]

    @cached_property
    def slots(self) -> list[list[str]]:
        """For each number of the template, its text in every key."""
        # No search a key: what is no digit is the same in all of them, and becomes the blanks between their numbers.
        blanks = {ord(character): " " for character in set(self.template) - {"0"}}
        numbers: list[str] = []
        same: dict[str, str] = {}  # each text lies in memory once
        for keys in _blocks(self.keys):
            found = " ".join(keys).translate(blanks).split()
            numbers += map(same.setdefault, found, found)
        return [numbers[at :: len(self.spans)] for at in range(len(self.spans))]


def template(text: str) -> str:
    """The text with `0` for every number.

    >>> template("layers.12.w1")
    'layers.0.w0'
    """
    return _DIGITS.sub("0", text)


def group_keys(keys: Iterable[str]) -> list[KeyGroup]:
    """Group keys by their digit template.

    >>> [(g.template, g.keys, g.slots) for g in group_keys(["a.7", "a.1", "b"])]
    [('a.0', ['a.7', 'a.1'], [['7', '1']]), ('b', ['b'], [])]
    """
    found: dict[str, list[str]] = {}
    members: dict[str, list[str]] = {}  # of keys that agree but for single digits, which are still far fewer
    for some in _blocks(list(keys)):
        masked = _masked(some)
        for mask in dict.fromkeys(masked):
            if mask not in members:
                members[mask] = found.setdefault(template(mask), [])
        for mask, key in zip(masked, some):
            members[mask].append(key)
    return [KeyGroup(text, group) for text, group in found.items()]


def _blocks(keys: list[str]) -> Iterator[list[str]]:
    """The keys, as many at a time as a processor's cache holds."""
    return (keys[at : at + _BLOCK] for at in range(0, len(keys), _BLOCK))


def _masked(keys: list[str]) -> list[str]:
    """Each key with `0` for every digit."""
    text = "".join(keys)
    separator = next(c for c in map(chr, range(sys.maxunicode)) if c not in text and ord(c) not in _ZEROS)
    return separator.join(keys).translate(_ZEROS).split(separator)
