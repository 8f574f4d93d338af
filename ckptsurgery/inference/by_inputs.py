"""Recipes between two live models: names first, then the order of use; what both models compute decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from ..errors import CkptSurgeryError, Diagnostic, LoadError
from ..specs import TensorSpec
from .assumptions import Assumption
from .by_data import DataSearch
from .by_names import attempt
from .findings import Finding, Known
from .forward_pass import by_use
from .matches import Matched, match
from .parity import verify
from .recipe_stages import StagedCut, staged
from .sides import UnitSide
from .suggestion import Suggestion
from .units import read_units

__all__ = ["by_inputs"]


def by_inputs(
    source: Any, target: Any, inputs: Any, specs: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]
) -> Suggestion:
    """The first recipe after whose conversion both models compute the same; the likeliest one where none does.

    Raises:
        LoadError: a side is not a live model, or fails on the inputs.
    """
    if not all(callable(getattr(side, "named_modules", None)) for side in (source, target)):
        text = "the order of use is known of two live models, and one side is none"
        raise LoadError(Diagnostic("bad-argument", text, help="leave out the inputs, or give the models"))
    first, second = by_use(source, inputs, specs, "the source"), by_use(target, inputs, wanted, "the target")
    named = _tried(source, target, inputs, attempt(first, second, cut=False, in_order=True))
    if named.parity:
        return named
    found, equal = DataSearch(source, deepcopy(target), inputs, specs, wanted).run()
    known = Known()
    for finding in found:
        known.add(finding)
    if not equal:
        # The models differ in more than their weights: what the names of both tell is left.
        spoken = match(list(first.items()), list(second.items()), (True, True))
        for move in spoken.moves:
            finding = Finding((move,))
            if known.takes(finding) and not spoken.placed & set(move.targets):
                known.add(finding)
    moved = _tried(source, target, inputs, _written(target, first, second, known.findings))
    return moved if moved.parity else _doubted(moved, wanted)


def _written(
    target: Any, first: Mapping[str, TensorSpec], second: Mapping[str, TensorSpec], found: Sequence[Finding]
) -> Suggestion:
    """The recipe of findings, with the ties of the target."""
    made = {k for f in found for k in f.targets}
    state = target.state_dict(keep_vars=True)
    ties = {k: other for k in second if k not in made for other in made if state[k] is state[other]}
    sides = UnitSide(read_units(first.items()), True), UnitSide(read_units(second.items()), True)
    moves = [m for f in found if not f.splits and not f.joins for m in f.moves]
    cut = StagedCut(
        [c for f in found for c in f.splits], [c for f in found for c in f.joins],
        [m for f in found if f.splits or f.joins for m in f.moves],
    )  # fmt: skip
    return staged(first, second, Matched(*sides, moves, dict(sorted(ties.items()))), cut)


def _tried(source: Any, target: Any, inputs: Any, found: Suggestion) -> Suggestion:
    """The suggestion with what both models compute after it; without where it does not run."""
    from ..running.runner import plan

    twin = deepcopy(target)
    try:
        made = plan(source, found.recipe)
        state = made.state_dict()
        twin.load_state_dict({k: t for k, t in state.items() if k in target.state_dict()}, strict=False)
        return replace(found, parity=verify(source, twin, inputs, plan=made))
    except (CkptSurgeryError, RuntimeError):
        return found


def _doubted(found: Suggestion, wanted: Mapping[str, TensorSpec]) -> Suggestion:
    """The suggestion with all of its targets named where the outputs differ."""
    if found.parity is None or found.parity.ok:
        return found
    lost = {*found.unmatched_target, *(q.target for q in found.ambiguous)}
    text = "after this recipe the two models compute different outputs"
    text += f", and {len(lost)} target tensors are open" if lost else ": some of its rules are wrong"
    made = tuple(k for k in wanted if k not in lost)
    return replace(found, assumptions=(*found.assumptions, Assumption("parity", text, made)))
