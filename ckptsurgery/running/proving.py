"""Proofs that need data, made before anything is written: names that must be one tensor hold equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from operator import attrgetter

from ..errors import Diagnostic, PlanError, Remedy, literal
from ..language.captures import escape
from ..planning.costing import CHUNK
from ..planning.plan import Plan
from ..planning.steps import Step
from ..storage.checkpoint import Checkpoint

__all__ = ["prove"]


def prove(plan: Plan, checkpoint: Checkpoint) -> None:
    """Check every pair of the plan that must be equal, and that there are values to read.

    Raises:
        PlanError: all pairs that differ, each with the line that settles it.
        CheckpointError: sources of which only shape and dtype are known.
    """
    checkpoint.refuse_without_data(chain.from_iterable(map(attrgetter("sources"), plan.steps)))
    if not plan.proofs and not plan.tie_proofs:
        return
    makers = {key: step for step in plan.steps for key in step.targets}
    problems = [_differ(a, b) for a, b in plan.proofs if not same_bytes(checkpoint, a, b)]
    problems += [_tied(plan, a, b, makers[a]) for a, b in plan.tie_proofs if not _made_equal(makers, a, b, checkpoint)]
    if problems:
        raise PlanError(problems)


def same_bytes(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two keys hold equal bytes, read in blocks."""
    if checkpoint.specs[a] != checkpoint.specs[b]:
        return False
    extent = checkpoint.extent(a)
    if extent is not None and extent == checkpoint.extent(b):
        return True
    if extent is None and checkpoint.extent(b) is None:
        # In blocks each of them would be made dense, or be fetched from its device, for every block anew.
        from ..modeling.ties import equal_bytes

        return equal_bytes(checkpoint.load(a), checkpoint.load(b))
    total = checkpoint.specs[a].nbytes
    for start in range(0, total, CHUNK):
        stop = min(start + CHUNK, total)
        if bytes(checkpoint.read(a, start, stop)) != bytes(checkpoint.read(b, start, stop)):
            return False
    return True


def _made_equal(makers: Mapping[str, Step], a: str, b: str, checkpoint: Checkpoint) -> bool:
    first, second = makers[a], makers[b]
    if first.kind == second.kind == "copy" and len(first.sources) == len(second.sources) == 1:
        return same_bytes(checkpoint, first.sources[0], second.sources[0])
    from ..modeling.ties import equal_bytes
    from .executor.programs import run_step

    x = run_step(first, checkpoint.load)[first.targets.index(a)]
    y = run_step(second, checkpoint.load)[second.targets.index(b)]
    return equal_bytes(x, y)


def _differ(alias: str, base: str) -> Diagnostic:
    return Diagnostic(
        "tied-values-differ",
        f"{alias!r} and {base!r} must be equal, and their values differ",
        help="one of them is meant: drop the other instead of proving it equal, or give it a rule of its own",
    )


def _tied(plan: Plan, alias: str, base: str, maker: Step) -> Diagnostic:
    remedies = []
    if plan.uses[maker.rules[0]].is_rest:  # what a rule takes cannot be dropped as well
        remedies.append(Remedy("drop", [*map(escape, maker.sources)], "takes the other", kind="recipe"))
    if plan.target is not None and plan.target.name == "model":
        remedies.append(Remedy("untie", f"cs.untie(model, {literal(alias)})", kind="before"))
    return Diagnostic(
        "tied-values-differ",
        f"the target ties {alias!r} and {base!r}, and the source gives them different values",
        remedies=tuple(remedies),
        advice=None if remedies else "say which one is meant: leave out the rule for the other",
    )
