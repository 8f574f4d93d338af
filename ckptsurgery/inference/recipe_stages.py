"""Recipes in stages: tensors are cut into blocks, the blocks move, and what is fused of blocks is joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..language.recipe import Recipe
from ..specs import TensorSpec
from .atoms import atoms
from .by_names import written
from .chunks import ChunkedMatch
from .drafts import merged
from .matches import Matched
from .moves import TensorMove
from .suggestion import Suggestion

__all__ = ["StagedCut", "alone", "staged"]


@dataclass(frozen=True)
class StagedCut:
    """Tensors that are cut into blocks first, or joined last, and the moves of their blocks."""

    splits: list[ChunkedMatch]
    joins: list[ChunkedMatch]
    moves: list[TensorMove]


def staged(
    specs: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], known: Matched, cut: StagedCut
) -> Suggestion:
    """The recipe in up to three stages: what is cut, what moves, what is joined."""
    if not cut.moves:
        return written(specs, wanted, known)
    within = _replaced(specs, cut.splits), _replaced(wanted, cut.joins)
    found = written(*within, replace(known, moves=[*known.moves, *cut.moves]))
    recipe = found.recipe
    if cut.splits:
        recipe = alone([c.move(True) for c in cut.splits], specs).then(recipe)
    if cut.joins:
        recipe = recipe.then(alone([c.move(False) for c in cut.joins], within[1]))
    spare = [k for k in specs if k in set(found.unmatched_source)]
    made = {c.key for c in cut.joins} | {k for m in (*known.moves, *cut.moves) for k in m.targets} | set(known.ties)
    coverage = sum(k in made for k in wanted) / max(1, len(wanted))
    return replace(found, recipe=recipe, coverage=coverage, unmatched_source=tuple(spare))


def _replaced(specs: Mapping[str, TensorSpec], chunked: Sequence[ChunkedMatch]) -> dict[str, TensorSpec]:
    table = {c.key: c.specs for c in chunked}
    return {k: s for key, spec in specs.items() for k, s in table.get(key, {key: spec}).items()}


def alone(moves: Sequence[TensorMove], specs: Mapping[str, TensorSpec]) -> Recipe:
    """A recipe of these moves that keeps everything else."""
    loops = lambda prefix: True  # noqa: E731
    listed = atoms(moves, list(specs), (loops, loops), lambda prefix, seen: tuple(seen))
    used = {k for m in moves for k in m.sources}
    draft = merged(listed, list(specs), [k for k in specs if k not in used])
    return Recipe(rules=draft.rules, names=draft.names, dims=draft.dims, rest="keep")
