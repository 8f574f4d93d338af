"""The ops of a rule, and what planning asks of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.axes import Same
from ..ops.base import Op

__all__ = ["RuleOps"]


@dataclass(frozen=True)
class RuleOps:
    """The ops of a rule, made from their calls."""

    before: tuple[Op, ...]
    after: tuple[Op, ...]

    @property
    def joined_before(self) -> bool:
        """Whether the sources meet in an op before the rearrangement."""
        return any(op.joins for op in self.before)

    @property
    def joined_after(self) -> bool:
        """Whether the arrivals meet in an op after it."""
        return any(op.joins for op in self.after)

    @property
    def keep_shapes(self) -> bool:
        """Whether the target's shapes are those that the rearrangement makes: no op after it changes them."""
        return all(op.axis_role is not None or op.elementwise or isinstance(op, Same) for op in self.after)

    def over(self, role: str) -> tuple[Op, ...]:
        """The ops over an axis, in order."""
        return tuple(op for op in (*self.before, *self.after) if op.axis_role == role)
