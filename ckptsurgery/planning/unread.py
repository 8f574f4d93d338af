"""Tensors of a source that cannot be read: a plan drops each of them, or is an error that says which line to add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import Diagnostic, Remedy
from ..language.covering import exact_patterns
from ..storage.unpickling.unreadable import unreadable_tensors

__all__ = ["Unreadable"]


@dataclass(frozen=True)
class Unreadable:
    """Tensors that cannot be read, as the stages of a recipe see them.

    Args:
        kinds: source key -> kind, such as "a sparse tensor".
        refused: whether one that nothing drops is an error; the caller settles it otherwise.
        prefix: what an additional first stage takes off all names, so that the second stage is asked.
    """

    kinds: Mapping[str, str] = field(default_factory=dict)
    refused: bool = True
    prefix: str = ""

    def names_at(self, stage: int) -> dict[str, str]:
        """Name in a stage -> source key, in the stage that is asked for drops; empty in the others."""
        if stage != (1 if self.prefix else 0):
            return {}
        return {key.removeprefix(self.prefix): key for key in self.kinds}

    def refusal(self, names: Mapping[str, str], left: Sequence[str], others: Iterable[str]) -> Diagnostic:
        """The diagnostic for those that nothing drops.

        Args:
            names: as `names_at` returns. left: names of those that nothing drops.
            others: names of the tensors that can be read, which the line must not drop.
        """
        lost = {names[name]: self.kinds[names[name]] for name in left}
        patterns = exact_patterns(left, [*others, *left])
        return unreadable_tensors(lost, [Remedy("drop", patterns, "leaves them out", kind="recipe")])
