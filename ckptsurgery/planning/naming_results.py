"""The key under which each tensor on the way through a program is known to ops that ask for it.

What is on its way to a target has the target's key. Before a rearrangement that makes another number of tensors it has
the key of its source. What has neither is numbered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .steps import ApplyOp, Instruction, Make, Move, Program, Select

__all__ = ["names_on_the_way", "results_of"]

Names = tuple[str, ...]


def names_on_the_way(program: Program, sources: Sequence[str], targets: Sequence[str]) -> list[Names]:
    """The names of the tensors before the first instruction and after each.

    >>> names_on_the_way(Program((), (), ()), (), ())
    [()]
    """
    counts = [len(specs) for specs in program.specs_on_the_way()]
    back: list[tuple[str | None, ...]] = [tuple(targets)]
    for instruction, count in zip(reversed(program.instructions), reversed(counts[:-1])):
        back.append(_before(instruction, back[-1], count))
    back.reverse()
    there: list[tuple[str | None, ...]] = [tuple(sources)]
    for instruction, count in zip(program.instructions, counts[1:]):
        there.append(_after(instruction, there[-1], count))
    first = targets[0] if targets else ""
    return [
        tuple(b or a or f"{first}#{n}" for n, (a, b) in enumerate(zip(*both, strict=True))) for both in zip(there, back)
    ]


def results_of(run: ApplyOp, count: int, names: Names) -> Iterator[str]:
    """The name of the first result of each group, in the order in which the groups run.

    Args:
        count: tensors before the instruction.
        names: of those after it.
    """
    heads = {group[0] for group in run.groups}
    inside = {place for group in run.groups for place in group}
    each = (len(names) - (count - len(inside))) // max(1, len(run.groups))
    at = 0
    for place in range(count):
        if place in heads:
            yield names[at]
        at += each if place in heads else place not in inside


def _before(instruction: Instruction, after: Sequence[str | None], count: int) -> tuple[str | None, ...]:
    match instruction:
        case Make():
            return tuple(after[:-1])
        case Select(indices):
            found: list[str | None] = [None] * count
            for place, index in reversed(list(enumerate(indices))):
                found[index] = after[place]
            return tuple(found)
        case ApplyOp(_, groups) if all(len(group) == 1 for group in groups) and len(after) == count:
            return tuple(after)
        case Move(layout) if len(layout.sources) == len(layout.targets) and layout.copies == tuple(range(count)):
            return tuple(after)
    return (None,) * count


def _after(instruction: Instruction, before: Sequence[str | None], count: int) -> tuple[str | None, ...]:
    match instruction:
        case Make():
            return (*before, None)
        case Select(indices):
            return tuple(before[i] for i in indices)
        case ApplyOp(_, groups) if all(len(group) == 1 for group in groups) and len(before) == count:
            return tuple(before)
    return (None,) * count
