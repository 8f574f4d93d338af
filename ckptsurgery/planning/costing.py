"""What a plan will cost, known before it runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .steps import Step

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["CHUNK", "Cost", "cost_of"]

CHUNK = 1 << 20
"""Bytes that a copy reads at a time."""


@dataclass(frozen=True)
class Cost:
    """What running a plan takes, in bytes.

    Args:
        bytes_read: read from the source, each step's sources once.
        bytes_written: written to a file; tied tensors once.
        peak_memory: held at once while streaming to a file: the largest step, or one chunk where all is copied.
        copies, moves, computes: steps by kind; copies and moves never change a value.
    """

    bytes_read: int
    bytes_written: int
    peak_memory: int
    copies: int
    moves: int
    computes: int

    def to_json(self) -> dict[str, Any]:
        """The cost as plain data."""
        return dict(vars(self))

    def __str__(self) -> str:
        return (
            f"reads {_shown(self.bytes_read)}, writes {_shown(self.bytes_written)}, holds at most {_shown(self.peak_memory)}; "
            f"{self.copies} copies, {self.moves} moves, {self.computes} computed"
        )


def cost_of(plan: Plan) -> Cost:
    """The cost of streaming a plan to a file."""
    kinds = Counter(step.kind for step in plan.steps)
    uses = Counter(key for step in plan.steps for key in step.sources)
    sizes = {key: plan.source[key].nbytes for key in uses if key in plan.source}
    read = sum(sizes[key] for key in uses if key in sizes)
    read += sum(plan.source[k].nbytes for pair in plan.proofs for k in pair)
    written = sum(spec.nbytes for key, spec in plan.specs.items() if key not in plan.ties)
    peak = max((_held(step) for step in plan.steps), default=0)
    return Cost(read, written, peak, kinds["copy"], kinds["move"], kinds["compute"])


def _held(step: Step) -> int:
    if step.kind == "copy":
        return min(CHUNK, max((s.nbytes for s in step.program.outputs), default=0))
    return sum(s.nbytes for s in step.program.inputs) + sum(s.nbytes for s in step.program.outputs)


def _shown(count: int) -> str:
    """A number of bytes for people, in decimal units.

    >>> _shown(999), _shown(1_500_000)
    ('999 B', '1.5 MB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return ""
