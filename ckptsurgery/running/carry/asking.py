"""Which trees beside the model are to follow a plan, and by whose word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...language.carrying import check_carry_lost
from ...planning.plan import Plan
from ...storage.mirrors import Mirror

__all__ = ["Carrying", "on_one_way"]


def on_one_way(path: str, other: str) -> bool:
    """Whether two dotted paths are equal, or one of them leads on from the other.

    >>> on_one_way("run.optimizer", "run"), on_one_way("run", "run.optimizer"), on_one_way("ema", "ema2")
    (True, True, False)
    """
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


@dataclass(frozen=True)
class Carrying:
    """Trees that follow a plan.

    Args:
        paths: path -> the keys of its parameters in its order, or nothing.
        lost: "error" or "drop".
        asked: the paths that the caller named; those of a recipe may be missing from a checkpoint.
    """

    paths: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lost: str = "error"
    asked: tuple[str, ...] = ()

    @classmethod
    def of(cls, plan: Plan, carry: Mapping[str, Sequence[str]] | None = None, lost: str | None = None) -> Carrying:
        """Return the caller's wishes, or those of the plan's recipe.

        Raises:
            RecipeError: a word for lost state that is not known.
        """
        recipes = [] if plan.recipe is None else [plan.recipe, *plan.recipe.stages]
        said: dict[str, Sequence[str]] = {}
        for recipe in recipes:
            said |= recipe.carry
        word = "drop" if any(recipe.carry_lost == "drop" for recipe in recipes) else "error"
        return cls(said if carry is None else carry, check_carry_lost(lost or word), tuple(carry or ()))

    def taken(self, mirrors: Sequence[Mirror]) -> tuple[list[Mirror], list[Mirror]]:
        """Return the trees that follow, and the others."""
        follow = [mirror for mirror in mirrors if self._names(mirror.path)]
        return follow, [mirror for mirror in mirrors if not self._names(mirror.path)]

    def _names(self, path: str) -> bool:
        return any(on_one_way(path, name) for name in self.paths)
