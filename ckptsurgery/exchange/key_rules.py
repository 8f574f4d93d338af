"""Few rules that say what many pairs of keys say: numbers become captures, and what does not matter is left open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError
from ..language.captures import Literal, escape
from ..language.keys import KeyPattern

__all__ = ["FLAT", "NO_AXES", "KeyPair", "Kind", "generalised", "spread"]

_DIGITS = re.compile(r"\d+")
_INDICES = ("i", "j", "k", "l", "m", "n")
_REPRESENTATIVES = 4  # keys that differ in their numbers alone, of which so many are looked at


Kind = tuple[str, str, tuple[tuple[str, Any], ...], int]
"""The axes of both sides as text, sizes that they need, and a number of tensors that may not differ."""

FLAT = -1
"""In the place of that number: tensors of several targets that are numbered in one row."""

NO_AXES: Kind = ("", "", (), 0)


@dataclass(frozen=True)
class KeyPair:
    """Keys of two sides that go together.

    Args:
        source, target: patterns of exactly these keys: literal text, and the captures that are gathered or scattered.
        sources, targets: the keys that stand behind them.
        kind: rules of different kinds never share a pair, such as those of different axes.
    """

    source: str
    target: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    kind: Kind = NO_AXES


def spread(keys: Sequence[str], name: str) -> str:
    """Return the pattern of keys that differ in one run of whole segments.

    >>> spread(["a.0.w1.weight", "a.0.w3.weight"], "p")
    'a.0.{p:w1,w3}.weight'
    >>> spread(["x.0.w", "x.1.w", "x.2.w"], "e")
    'x.{e}.w'
    """
    if len(keys) == 1:
        return escape(keys[0])
    apart = [key.split(".") for key in keys]
    head, tail = _common(apart)
    middles = [".".join(parts[head : len(parts) - tail]) for parts in apart]
    if middles == [str(n) for n in range(len(keys))]:
        inner = f"{{{name}}}"
    else:
        cut = _numbered(middles)
        inner = cut.format(f"{{{name}}}") if cut is not None else f"{{{name}:{','.join(map(escape, middles))}}}"
    before, after = apart[0][:head], apart[0][len(apart[0]) - tail :]
    return ".".join([*map(escape, before), inner, *map(escape, after)])


def _common(apart: Sequence[Sequence[str]]) -> tuple[int, int]:
    """How many segments all begin with, and how many all end with."""
    shortest = min(map(len, apart))
    head = 0
    while head < shortest - 1 and len({parts[head] for parts in apart}) == 1:
        head += 1
    tail = 0
    while tail < shortest - 1 - head and len({parts[-1 - tail] for parts in apart}) == 1:
        tail += 1
    return head, tail


def _numbered(middles: Sequence[str]) -> str | None:
    """The text around a number that counts up from 0, such as `shard_{}`."""
    found = [_DIGITS.split(text) for text in middles]
    numbers = [_DIGITS.findall(text) for text in middles]
    plain = all(len(n) == 1 for n in numbers) and len({tuple(f) for f in found}) == 1
    if plain and [n[0] for n in numbers] == [str(n) for n in range(len(middles))]:
        return "{}".join(text.replace("{", "{{").replace("}", "}}") for text in found[0])
    return None


def generalised(pairs: Iterable[KeyPair], others: Iterable[str]) -> list[tuple[str, str, Kind]]:
    """Return rules, as texts of both sides and their kind, that say of each pair what it says.

    Args:
        others: source keys that no rule may match: they keep their names.
    """
    work = list(pairs)
    sample = _Sample(work, others)
    rules: list[tuple[str, str, Kind]] = []
    done: set[str] = set()
    for pair in sorted(work, key=_telling):
        if pair.sources[0] in done:
            continue
        for source, target in _candidates(pair):
            matched = sample.matched(source, target, pair.kind, done)
            pattern = KeyPattern.parse(source)
            if matched is not None and pattern.readings(pair.sources[0]):
                rules.append((source, target, pair.kind))
                done |= matched
                done |= {k for one in work for k in one.sources if one.kind == pair.kind and pattern.readings(k)}
                break
    return rules


def _form(pair: KeyPair) -> tuple[str, str]:
    return _DIGITS.sub("#", pair.source), _DIGITS.sub("#", pair.target)


def _telling(pair: KeyPair) -> tuple[int, int, int]:
    """The order in which pairs are asked: those first whose numbers cannot be mistaken for each other."""
    numbers = [int(text) for text in _DIGITS.findall(pair.source)]
    return len(set(numbers)) < len(numbers), -len(set(numbers)), -max(numbers, default=0)


class _Sample:
    """Keys that stand for all: of those that differ in numbers alone, the first few and the last."""

    def __init__(self, pairs: Sequence[KeyPair], others: Iterable[str]) -> None:
        self.of: dict[str, KeyPair | None] = {}
        self.made: dict[str, KeyPair | None] = {}
        seen: dict[tuple[str, str], int] = {}
        last = {_form(pair): pair for pair in pairs}
        for pair in pairs:
            form = _form(pair)
            seen[form] = seen.get(form, 0) + 1
            if seen[form] <= _REPRESENTATIVES or pair is last[form]:
                ends = {*pair.sources[:2], pair.sources[-1], *pair.sources[:: max(1, len(pair.sources) // 4)]}
                self.of.update(dict.fromkeys(ends, pair))
                self.made.update(dict.fromkeys(pair.targets, pair))
        for key in others:
            form = _DIGITS.sub("#", key), ""
            seen[form] = seen.get(form, 0) + 1
            if seen[form] <= _REPRESENTATIVES:
                self.of.setdefault(key, None)
                self.made.setdefault(key, None)

    def matched(self, source: str, target: str, kind: Kind, done: set[str]) -> set[str] | None:
        """The keys that a rule matches; None where it says another thing of one of them, or takes one twice.

        Backwards it must be right as well: what its right side matches must come from what its left side does.
        """
        try:
            left, right = KeyPattern.parse(source), KeyPattern.parse(target)
        except RecipeError:
            return None
        found: set[str] = set()
        for key, pair, values in _readings(left, self.of):
            if pair is None or pair.kind != kind or values is None or key in done:
                return None
            if not set(_spelled(right, values)) <= set(pair.targets):
                return None
            found.add(key)
        for _, pair, values in _readings(right, self.made):
            if pair is None or pair.kind != kind or values is None or not left.readings(pair.sources[0]):
                return None
        return found


def _readings(
    pattern: KeyPattern, keys: Mapping[str, KeyPair | None]
) -> Iterator[tuple[str, KeyPair | None, dict[str, str] | None]]:
    """The keys that a pattern matches, with its captures; with None where it can be read in two ways."""
    texts = [piece.text for piece in pattern.pieces if isinstance(piece, Literal)]
    for key, pair in keys.items():
        if all(text in key for text in texts):
            readings = pattern.readings(key)
            if readings:
                yield key, pair, readings[0] if len(readings) == 1 else None


def _spelled(pattern: KeyPattern, values: Mapping[str, str]) -> Iterator[str]:
    """The keys that a pattern spells; choices that only it has, each."""
    free = [c for c in pattern.firsts if c.name not in values and c.choices]
    if not free:
        yield pattern.spell(values)
    for choice in free[0].choices or () if free else ():
        yield from _spelled(pattern, {**values, free[0].name: choice})


def _candidates(pair: KeyPair) -> Iterator[tuple[str, str]]:
    """Rules that say of a pair what it says, the most general first."""
    source, target = _segments(pair.source), _segments(pair.target)
    if pair.source == pair.target:
        head = tail = 0
        yield from _anchored(source)
    else:
        head, tail = _common([source, target])
        if "." not in pair.source or "." not in pair.target:
            head = tail = 0
    options = sorted(
        ((before, after) for before in range(head + 1) for after in range(tail + 1)), key=lambda one: (sum(one), one[1])
    )
    for before, after in options:
        names = iter((*_INDICES, *(f"n{n}" for n in range(99))))
        heads = _indexed(source[head - before : head], names)
        tails = _indexed(source[len(source) - tail : len(source) - tail + after], names)
        middles = _middle(source[head : len(source) - tail], target[head : len(target) - tail], names)
        start = ["{r...}"] if before < head else []
        end = ["{s...}"] if after < tail else []
        yield tuple(".".join([*start, *heads, *middle, *tails, *end]) for middle in middles)  # type: ignore[misc]
    yield pair.source, pair.target


def _anchored(segments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Patterns of a key that keeps its name, the shortest text in the middle first."""
    for width in range(1, len(segments) + 1):
        for at in range(len(segments) - width + 1):
            names = iter((*_INDICES, *(f"n{n}" for n in range(99))))
            inner = _indexed(segments[at : at + width], names)
            if all(text.startswith("{") for text in inner):
                continue
            start = ["{r...}"] if at else []
            end = ["{s...}"] if at + width < len(segments) else []
            text = ".".join([*start, *inner, *end])
            yield text, text


def _segments(text: str) -> list[str]:
    """A pattern cut at the dots outside of its captures."""
    return re.findall(r"(?:\{[^}]*\}|\\.|[^.{\\])+", text)


def _indexed(segments: Sequence[str], names: Iterator[str]) -> list[str]:
    """Segments that both sides have, their numbers captured."""
    return [_captured(segment, [f"{{{next(names)}}}" for _ in _numbers(segment)]) for segment in segments]


def _middle(source: Sequence[str], target: Sequence[str], names: Iterator[str]) -> tuple[list[str], list[str]]:
    """What differs, with numbers captured that both sides have in the same order."""
    left, right = ([m.group() for s in side for m in _numbers(s)] for side in (source, target))
    kept: list[tuple[int, int]] = []
    for at, number in enumerate(left):
        start = kept[-1][1] + 1 if kept else 0
        if number in right[start:]:
            kept.append((at, right.index(number, start)))
    captures = [f"{{{next(names)}}}" for _ in kept]
    spelled = []
    for side, numbers, which in ((source, left, 0), (target, right, 1)):
        texts = list(numbers)
        for pair, capture in zip(kept, captures):
            texts[pair[which]] = capture
        rest = iter(texts)
        spelled.append([_captured(segment, [next(rest) for _ in _numbers(segment)]) for segment in side])
    return spelled[0], spelled[1]


def _numbers(segment: str) -> list[re.Match[str]]:
    """The numbers of a segment that count something: the whole of it, or its end behind an underscore."""
    if segment.isdigit():
        return list(_DIGITS.finditer(segment))
    found = re.search(r"(?<=_)\d+$", segment)
    return [found] if found is not None else []


def _captured(segment: str, texts: Sequence[str]) -> str:
    """A segment with its numbers replaced."""
    for match, text in reversed(list(zip(_numbers(segment), texts))):
        segment = segment[: match.start()] + text + segment[match.end() :]
    return segment
