"""Two plans, one after the other, as one: steps that meet in a tensor between them become one step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..errors import Diagnostic
from .plan import Plan
from .steps import Instruction, Parallel, Program, Select, Step

__all__ = ["chained"]

Made = Mapping[str, tuple[Step, int]]
"""Keys between two stages: the step that makes each, and the number of the output."""


def chained(first: Plan, second: Plan, problems: list[Diagnostic]) -> Plan:
    """The plan that does what `second` does to what `first` makes; keys between them are neither read nor written."""
    made = {key: (step, n) for step in first.steps for n, key in enumerate(step.targets)}
    made.update({alias: made[base] for alias, base in first.ties.items()})
    ties = _still_tied(first.ties, second.steps)
    programs: dict[object, Program] = {}
    offset = len(first.uses)
    parts = _parts([s for s in second.steps if s.targets[0] not in ties], made)
    return replace(
        second,
        steps=tuple(_joined(part, made, offset, programs) for part in parts),
        specs={key: spec for key, spec in second.specs.items() if key not in ties},
        ties={**ties, **{alias: ties.get(base, base) for alias, base in second.ties.items()}},
        uses=(*first.uses, *second.uses),
        dropped={**first.dropped, **_dropped(first, second)},
        proofs=(*first.proofs, *_proofs(second, made, problems)),
        config=(*first.config, *second.config),
    )


def _parts(steps: Sequence[Step], made: Made) -> Iterable[list[Step]]:
    """The steps of the second plan, those together that want something of one step of the first."""
    group: dict[int, list[Step]] = {}
    for step in steps:
        makers = dict.fromkeys(id(made[key][0]) for key in step.sources)
        met = list({id(group[m]): group[m] for m in makers if m in group}.values())
        mine = met[0] if met else []
        for other in met[1:]:
            mine += other
            makers.update(dict.fromkeys(id(made[key][0]) for s in other for key in s.sources))
        mine.append(step)
        group.update(dict.fromkeys(makers, mine))
    return {id(part): part for part in group.values()}.values()


def _joined(part: Sequence[Step], made: Made, offset: int, programs: dict[object, Program]) -> Step:
    makers = list({id(maker): maker for step in part for key in step.sources for maker in (made[key][0],)}.values())
    starts, at = {}, 0
    for maker in makers:
        starts[id(maker)] = at
        at += len(maker.targets)
    wants = tuple(starts[id(made[key][0])] + made[key][1] for step in part for key in step.sources)
    place = (tuple(id(m.program) for m in makers), wants, tuple(id(s.program) for s in part))
    if place not in programs:
        instructions = [*_beside(makers), *([] if wants == tuple(range(at)) else [Select(wants)]), *_beside(part)]
        programs[place] = Program.of(tuple(s for m in makers for s in m.program.inputs), instructions)
    rules = (*(n for m in makers for n in m.rules), *(n + offset for s in part for n in s.rules))
    return Step(
        tuple(k for m in makers for k in m.sources),
        tuple(k for s in part for k in s.targets),
        programs[place],
        tuple(dict.fromkeys(rules)),
    )


def _beside(steps: Sequence[Step]) -> Sequence[Instruction]:
    if len(steps) == 1:
        return steps[0].program.instructions
    return (Parallel(tuple(s.program for s in steps)),) if any(s.program.instructions for s in steps) else ()


def _still_tied(ties: Mapping[str, str], steps: Sequence[Step]) -> dict[str, str]:
    """Ties of the first plan that the second keeps: it does the same to both names, each alone."""
    alone = {s.sources[0]: s for s in steps if len(s.sources) == len(s.targets) == 1}
    pairs = ((alone.get(alias), alone.get(base)) for alias, base in ties.items())
    return {a.targets[0]: b.targets[0] for a, b in pairs if a and b and a.program == b.program}


def _dropped(first: Plan, second: Plan) -> dict[str, str]:
    """Sources of which everything was dropped by the second plan."""
    found: dict[str, str] = {}
    for step in first.steps:
        lines = [second.dropped.get(key) for key in step.targets]
        if all(line is not None for line in lines):
            found.update({key: str(lines[0]) for key in step.sources})
    return found


def _proofs(second: Plan, made: Made, problems: list[Diagnostic]) -> tuple[tuple[str, str], ...]:
    proofs = []
    for pair in second.proofs:
        keys = [_copied(*made[key]) for key in pair]
        if None in keys:
            problems.append(
                Diagnostic(
                    "not-the-same",
                    f"{pair[0]!r} and {pair[1]!r} are computed by an earlier stage; they can be proved "
                    "equal only where they are copies",
                    help=f"{pair[0]}, {pair[1]} -> … | same",
                )
            )
        elif keys[0] != keys[1]:
            proofs.append((str(keys[0]), str(keys[1])))
    return tuple(proofs)


def _copied(step: Step, output: int) -> str | None:
    """The source that an output is byte for byte, where it is one."""
    copies = step.program.copies
    return None if copies is None else step.sources[copies[output]]
