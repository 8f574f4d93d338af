"""Steps that make one key: united into one step, which proves that what they make is equal.

A rule may share a key with another (`+` in front of its target), and the way back from a tensor that several rules read
makes it several times. Copies are proved equal as source keys, so that one of them stays a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from ..ops.over_axes import Same
from .steps import ApplyOp, Instruction, Parallel, Program, Select, Step

__all__ = ["united"]


def united(steps: Iterable[Step]) -> tuple[list[Step], list[tuple[str, str]]]:
    """Return the steps with those that make the same key united, and pairs of source keys to be proved equal.

    Args:
        steps: in the order in which they shall stay.

    Raises:
        OpError: two steps make one key of different shapes or dtypes.
    """
    parts = _meeting(list(steps))
    found: list[Step] = []
    proofs: list[tuple[str, str]] = []
    programs: dict[object, Program] = {}
    for part in parts:
        if len(part) == 1:
            found.append(part[0])
        elif all(len(step.targets) == 1 and step.program.copies == (0,) for step in part):
            first, *others = part
            # Two steps of one source are one step; a key is not proved equal to itself.
            proofs += [(other.sources[0], first.sources[0]) for other in others if other.sources != first.sources]
            Same().infer(tuple(step.program.outputs[0] for step in part))
            found.append(first._replace(rules=_rules(part)))
        else:
            found.append(_together(part, programs))
    return found, proofs


def _meeting(steps: Sequence[Step]) -> Iterable[list[Step]]:
    """The steps in parts: those that make a key in common, directly or by way of a third."""
    part_of: dict[str, list[Step]] = {}
    for step in steps:
        mine: list[Step] = []
        for part in {id(part_of[key]): part_of[key] for key in step.targets if key in part_of}.values():
            mine += part
        mine.append(step)
        part_of.update((key, mine) for one in mine for key in one.targets)
    return {id(part): part for part in part_of.values()}.values()


def _together(part: Sequence[Step], programs: dict[object, Program]) -> Step:
    keys = [key for step in part for key in step.targets]
    places: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    sources = tuple(dict.fromkeys(chain.from_iterable(step.sources for step in part)))
    groups = tuple(tuple(found) for found in places.values() if len(found) > 1)
    wants = tuple(sources.index(key) for step in part for key in step.sources)
    like = (tuple(id(step.program) for step in part), groups, wants)
    if like not in programs:
        inputs = {key: spec for step in part for key, spec in zip(step.sources, step.program.inputs)}
        picked: list[Instruction] = [] if wants == tuple(range(len(sources))) else [Select(wants)]
        instructions = [*picked, Parallel(tuple(step.program for step in part)), ApplyOp(Same(), groups)]
        programs[like] = Program.of(tuple(inputs[key] for key in sources), instructions)
    return Step(sources, tuple(places), programs[like], _rules(part))


def _rules(part: Sequence[Step]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(chain.from_iterable(step.rules for step in part)))
