"""Tensors of a model that share some of their memory: a copy into one changes the others.

So before anything is written it is proved that they get equal values wherever they meet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import Diagnostic, LoadError, Remedy
from ..modeling.shared_memory import overlapping
from ..modeling.ties import equal_bytes
from ..planning.plan import Plan
from ..storage.checkpoint import Checkpoint
from ..storage.plain_memory import oddity
from ..storage.tensors import span
from .executor.programs import run_step

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["prove_overlaps"]

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
