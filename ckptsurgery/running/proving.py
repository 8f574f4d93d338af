"""Proofs that need data, made before anything is written: names that must be one tensor hold equal bytes.

The same is proved of tensors of a model that share some of their memory: a copy into one changes the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING

from ..errors import Diagnostic, LoadError, PlanError, Remedy, literal
from ..language.captures import escape
from ..modeling.shared_memory import overlapping
from ..modeling.ties import equal_bytes
from ..planning.costing import CHUNK
from ..planning.plan import Plan
from ..planning.steps import Step
from ..storage.checkpoint import Checkpoint
from ..storage.plain_memory import oddity
from ..storage.tensors import span
from .executor.programs import run_step

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["prove", "prove_overlaps"]


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


_ALIGNED = 16  # bytes of the widest element


def prove_overlaps(plan: Plan, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], kept: Collection[str]) -> None:
    """Check that tensors of the model which share memory get equal values wherever they meet.

    Args:
        tensors: those of the model; what is filled was found to be plain memory before.
        kept: keys that are to stay as they are.

    Raises:
        LoadError: some of them get different values, of which one copy would overwrite the other.
    """
    skipped = {other for other, _ in plan.tie_proofs}
    makers = {key: step for step in plan.steps for key in step.targets if key not in skipped}
    left = {key for key in kept if key in tensors and oddity(tensors[key]) is None}
    groups = overlapping({key: tensor for key, tensor in tensors.items() if key in makers or key in left})
    problems: list[Diagnostic] = []
    for group in groups:
        values = []
        for key in group:
            step = makers.get(key)
            made = run_step(step, checkpoint.load)[step.targets.index(key)] if step else tensors[key].detach().clone()
            values.append(made)
        wrong = _overwritten([tensors[key].detach() for key in group], values)
        if wrong:
            problems.append(_overlap(group, [group[at] for at in wrong]))
    if problems:
        raise LoadError(problems)


def _overwritten(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> list[int]:
    """Which of the values would not be there after all were copied, in turn, into memory laid out as the tensors'."""
    import torch

    first = min(t.data_ptr() for t in tensors) // _ALIGNED * _ALIGNED
    ends = [t.data_ptr() + span(tuple(t.shape), t.stride()) * t.element_size() for t in tensors]
    scratch = torch.zeros(-(-(max(ends) - first) // _ALIGNED) * _ALIGNED, dtype=torch.uint8)
    rooms = [
        scratch.view(t.dtype).as_strided(t.shape, t.stride(), (t.data_ptr() - first) // t.element_size())
        for t in tensors
    ]
    wanted = [value.to(room.dtype) for room, value in zip(rooms, values)]
    for room, value in zip(rooms, wanted):
        room.copy_(value)
    return [n for n, (room, value) in enumerate(zip(rooms, wanted)) if not equal_bytes(room.clone(), value)]


def _overlap(group: Sequence[str], wrong: Sequence[str]) -> Diagnostic:
    if len(group) == 1:
        text = f"elements of {group[0]!r} share memory in the model, and the source gives them different values"
    else:
        text = f"{group[0]!r} and {group[1]!r} share memory in the model, and get different values where they meet"
    return Diagnostic(
        "overlapping-values",
        text,
        notes=tuple(f"{key} would be overwritten" for key in wrong[:8]),
        remedies=(Remedy("assign", True, "gives each a tensor of its own"),),
    )
