"""Keys that differ in numbers only, found together: `layers.0.w` and `layers.1.w` have the template `layers.0.w`.

What is true of a template is true of its keys, so that a hundred thousand keys are some dozen cases.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["KeyGroup", "group_keys", "template"]

_DIGITS = re.compile(r"[0-9]+")
_ZEROS = {ord(digit): "0" for digit in "0123456789"}


@dataclass(slots=True)
class KeyGroup:
    """Keys of one template, and their numbers.

    Args:
        template: the keys with `0` for every number.
        keys: in the checkpoint's order.
        slots: for each number of the template, its text in every key.
        spans: where these numbers stand in the template.
    """

    template: str
    keys: list[str]
    slots: list[list[str]]
    spans: list[tuple[int, int]]


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
    # No search a key: of keys that agree but for their digits, the numbers stand at the same places.
    listed = list(keys)
    alike: dict[str, list[int]] = {}
    for number, masked in enumerate(_masked(listed)):
        alike.setdefault(masked, []).append(number)
    found: dict[str, list[tuple[str, list[int]]]] = {}
    for masked, places in alike.items():
        found.setdefault(template(masked), []).append((masked, places))
    same: dict[str, str] = {}
    return [_joined_group(text, parts, listed, same) for text, parts in found.items()]


def _masked(keys: list[str]) -> list[str]:
    """Each key with `0` for every digit."""
    text = "".join(keys)
    separator = next(c for c in map(chr, range(sys.maxunicode)) if c not in text and ord(c) not in _ZEROS)
    return separator.join(keys).translate(_ZEROS).split(separator) if keys else []


def _joined_group(text: str, parts: list[tuple[str, list[int]]], keys: list[str], same: dict[str, str]) -> KeyGroup:
    """The group of one template, whose numbers have as many digits in one part as in no other.

    Args:
        same: each number's text, so that it lies in memory once.
    """
    slots: list[list[str]] = [[] for _ in _DIGITS.finditer(text)]
    for masked, places in parts:
        for slot, (start, end) in zip(slots, (m.span() for m in _DIGITS.finditer(masked))):
            numbers = [keys[place][start:end] for place in places]
            slot += [same.setdefault(n, n) for n in numbers]
    order = [place for _, places in parts for place in places]
    if len(parts) > 1:  # back into the checkpoint's order
        ranks = sorted(range(len(order)), key=order.__getitem__)
        order = [order[rank] for rank in ranks]
        slots = [[slot[rank] for rank in ranks] for slot in slots]
    return KeyGroup(text, [keys[place] for place in order], slots, [m.span() for m in _DIGITS.finditer(text)])
