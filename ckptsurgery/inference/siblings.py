"""Tensors whose values differ between the sides: they follow their siblings, which are called alike but for numbers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..language.folding import fold
from ..specs import TensorSpec
from .assumptions import Assumption
from .moves import TensorMove

__all__ = ["casts", "changed", "differing"]

_EQUAL = 0.3  # from this share of equal tensors on, the others are taken for changed ones
_NUMBER = re.compile(r"[0-9]+")


def casts(
    one: Mapping[str, TensorSpec], two: Mapping[str, TensorSpec], moves: Sequence[TensorMove]
) -> tuple[Assumption, ...]:
    """What holds the same values in another dtype."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for move in moves:
        for key in move.targets:
            pair = one[move.sources[0]].dtype, two[key].dtype
            if pair[0] != pair[1]:
                groups[pair].append(key)
    return tuple(
        Assumption(
            "cast",
            f"{len(keys)} tensors are {a} in the source and {b} in the target, equal after the cast",
            tuple(keys),
        )
        for (a, b), keys in groups.items()
    )


def differing(changed: Sequence[TensorMove]) -> Iterator[Assumption]:
    """What keeps the rule of its siblings though its values differ."""
    keys = tuple(k for m in changed for k in m.targets)
    if keys:
        lines = [text for text, _ in fold(keys)]
        more = f", and {len(lines) - 4} more" if len(lines) > 4 else ""
        text = "values differ between the source and the target; these follow the rule of their siblings: "
        yield Assumption("values", text + ", ".join(lines[:4]) + more, keys)


def changed(
    specs: Mapping[str, TensorSpec],
    wanted: Mapping[str, TensorSpec],
    proved: Sequence[TensorMove],
    named: Sequence[TensorMove],
    ties: Mapping[str, str],
) -> list[TensorMove]:
    """The moves of tensors that were changed on one side, such as by fine-tuning; none where little else is equal.

    A tensor follows its siblings, which are called alike but for their numbers; one without siblings its name.
    """
    made, used = {k for m in proved for k in m.targets} | set(ties), {k for m in proved for k in m.sources}
    if len(made) < _EQUAL * len(wanted):
        return []
    siblings: dict[tuple[str, ...], list[TensorMove]] = defaultdict(list)
    for move in proved:
        siblings[tuple(_NUMBER.sub("#", k) for k in move.targets)].append(move)
    found: list[TensorMove] = []

    def take(move: TensorMove | None) -> None:
        if move is None or made & set(move.targets) or used & set(move.sources):
            return
        if all(k in specs for k in move.sources) and all(k in wanted for k in move.targets):
            found.append(move)
            made.update(move.targets)
            used.update(move.sources)

    for key in wanted:
        alike = [] if key in made else next((v for t, v in siblings.items() if _NUMBER.sub("#", key) in t), [])
        if alike:
            take(_like(alike, key, specs, wanted))
    for move in named:
        if tuple(_NUMBER.sub("#", k) for k in move.targets) not in siblings:
            take(move)
    return found


def _like(
    siblings: Sequence[TensorMove], key: str, specs: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]
) -> TensorMove | None:
    """The siblings' move with the numbers of another target key; None where its shapes or keys are others."""
    model = siblings[0]
    at = next(n for n, k in enumerate(model.targets) if _NUMBER.sub("#", k) == _NUMBER.sub("#", key))
    numbers = [int(n) for n in _NUMBER.findall(key)]
    keys: list[tuple[str, ...]] = []
    for side in (0, 1):
        listed = []
        for n in range(len((model.sources, model.targets)[side])):
            rows = [((m.sources, m.targets)[side][n], m.targets[at]) for m in siblings]
            listed.append(_renumbered(rows, numbers))
        if None in listed:
            return None
        keys.append(tuple(k for k in listed if k is not None))
    for table, old, new in ((specs, model.sources, keys[0]), (wanted, model.targets, keys[1])):
        if any(k not in table or table[k].shape != table[o].shape for o, k in zip(old, new)):
            return None
    return replace(model, sources=keys[0], targets=keys[1])


def _renumbered(rows: Sequence[tuple[str, str]], numbers: Sequence[int]) -> str | None:
    """A key whose numbers follow from a target's as they do in all rows: equal, shifted, or always the same."""
    tables = [([int(n) for n in _NUMBER.findall(k)], [int(n) for n in _NUMBER.findall(t)]) for k, t in rows]
    made: list[int] = []
    for place in range(len(tables[0][0])):
        column = [own[place] for own, _ in tables]
        ways = [(p, column[0] - tables[0][1][p]) for p in range(len(numbers))]
        shifts = [(p, c) for p, c in ways if all(own[place] == t[p] + c for own, t in tables)]
        # A number that follows the target's own is likelier than one that happens to be the same everywhere.
        moving = [(p, c) for p, c in shifts if len({t[p] for _, t in tables}) > 1]
        if moving or (shifts and len(tables) == 1):
            p, c = min(moving or shifts, key=lambda s: abs(s[1]))
            made.append(numbers[p] + c)
        elif len(set(column)) == 1:
            made.append(column[0])
        else:
            return None
    fresh = iter(made)
    return _NUMBER.sub(lambda _: str(next(fresh)), rows[0][0])
