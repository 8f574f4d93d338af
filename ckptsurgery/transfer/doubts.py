"""Tensors whose name and shape fit and whose values would not: codes without their scales, squares on their side."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ..errors import Diagnostic
from ..specs import TensorSpec
from .codes import Code, unscaled
from .orienting import transposed

__all__ = ["Doubts"]


@dataclass(frozen=True)
class Doubts:
    """What must not be loaded as it is.

    Args:
        codes: keys of the model that would get quantised codes.
        squares: keys that would get a transposed matrix -> how that shows. across: others whose shape shows it.
    """

    codes: Mapping[str, Code] = field(default_factory=dict)
    squares: Mapping[str, str] = field(default_factory=dict)
    across: Collection[str] = ()

    @property
    def reasons(self) -> dict[str, str]:
        """Why each key is not loaded."""
        turned = {k: f"would load untransposed: {why}" for k, why in self.squares.items()}
        return turned | {k: f"would load unscaled: {code}" for k, code in self.codes.items()}

    def problems(
        self, refused: Collection[str], made: Mapping[str, TensorSpec], origins: Mapping[str, tuple[str, ...]]
    ) -> list[Diagnostic]:
        """The problems of those that the caller did not set aside."""
        codes = {k: c for k, c in self.codes.items() if k in refused}
        squares = {k: why for k, why in self.squares.items() if k in refused}
        found = unscaled(codes, made, origins) if codes else []
        return [*found, transposed(squares, self.across, made)] if squares else found
