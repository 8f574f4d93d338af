"""Two plans, one after the other, as one: what the first only copies vanishes, what it computes becomes upstream work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import Diagnostic, PlanError
from .plan import Plan
from .steps import Program, Step

__all__ = ["chained"]


def chained(first: Plan, second: Plan) -> Plan:
    """The plan that does what `second` does to what `first` makes.

    Raises:
        PlanError: `second` compares keys that the first computes.
    """
    makers = {key: step for step in first.steps for key in step.targets}
    makers.update({alias: _named(makers[base], base, alias) for alias, base in first.ties.items()})
    offset = len(first.uses)
    fused: dict[tuple[int, int], Program] = {}
    ties = _still_tied(first.ties, second.steps)
    steps = tuple(_follow(step, makers, offset, fused) for step in second.steps if step.targets[0] not in ties)
    return replace(
        second,
        steps=steps,
        specs={key: spec for key, spec in second.specs.items() if key not in ties},
        ties={**ties, **{alias: ties.get(base, base) for alias, base in second.ties.items()}},
        uses=(*first.uses, *second.uses),
        dropped={**first.dropped, **_dropped(first, second)},
        proofs=(*first.proofs, *_proofs(second, makers)),
    )


def _named(step: Step, key: str, alias: str) -> Step:
    """The step with another name for one of its targets."""
    return replace(step, targets=tuple(alias if k == key else k for k in step.targets))


def _still_tied(ties: Mapping[str, str], steps: Sequence[Step]) -> dict[str, str]:
    """Ties of the first plan that the second keeps: it does the same to both names, each alone."""
    alone = {s.sources[0]: s for s in steps if len(s.sources) == len(s.targets) == 1}
    pairs = ((alone.get(alias), alone.get(base)) for alias, base in ties.items())
    return {a.targets[0]: b.targets[0] for a, b in pairs if a and b and a.program == b.program}


def _follow(step: Step, makers: Mapping[str, Step], offset: int, fused: dict[tuple[int, int], Program]) -> Step:
    own = tuple(n + offset for n in step.rules)
    if len(step.sources) == 1:
        maker = makers[step.sources[0]]
        if len(maker.targets) == 1:
            place = (id(maker.program), id(step.program))
            if place not in fused:
                both = (*maker.program.instructions, *step.program.instructions)
                fused[place] = Program.of(maker.program.inputs, both)
            return Step(maker.sources, step.targets, fused[place], (*maker.rules, *own), maker.upstream)
    sources, upstream = [], {}
    for key in step.sources:
        maker = makers[key]
        if maker.kind == "copy" and len(maker.sources) == len(maker.targets) == 1 and maker.program.inputs == maker.program.outputs:
            sources.append(maker.sources[0])
        else:
            sources.append(key)
            upstream[key] = maker
    rules = (*dict.fromkeys(n for key in step.sources for n in makers[key].rules), *own)
    return Step(tuple(sources), step.targets, step.program, rules, upstream)


def _dropped(first: Plan, second: Plan) -> dict[str, str]:
    """Sources of which everything was dropped by the second plan."""
    found: dict[str, str] = {}
    for step in first.steps:
        lines = [second.dropped.get(key) for key in step.targets]
        if all(line is not None for line in lines):
            found.update({key: str(lines[0]) for key in step.sources})
    return found


def _proofs(second: Plan, makers: Mapping[str, Step]) -> tuple[tuple[str, str], ...]:
    proofs = []
    for pair in second.proofs:
        steps = [makers[key] for key in pair]
        if any(s.kind != "copy" or len(s.sources) != 1 for s in steps):
            raise PlanError(Diagnostic("not-the-same", f"{pair[0]!r} and {pair[1]!r} are computed by an earlier stage; they "
                                       "can be proved equal only where they are copies",
                                       help=f"{pair[0]}, {pair[1]} -> … | same"))  # fmt: skip
        pair = steps[0].sources[0], steps[1].sources[0]
        if pair[0] != pair[1]:
            proofs.append(pair)
    return tuple(proofs)
