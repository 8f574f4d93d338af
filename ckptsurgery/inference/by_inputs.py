"""Recipes between two live models: names first, then the order of use; what both models compute decides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from ..errors import CkptSurgeryError, Diagnostic, LoadError
from ..specs import TensorSpec
from .assumptions import Assumption
from .by_names import attempt, written
from .forward_pass import by_use
from .matches import Matched, match
from .moves import TensorMove
from .parity import verify
from .sides import UnitSide
from .suggestion import Suggestion
from .units import read_units
from .use_order import follow

__all__ = ["by_inputs"]

_TRIALS = 30  # how many orders of fused parts are tried, each with two forward passes


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
    best: Suggestion | None = None
    for turn, candidate in enumerate(_candidates(first, second)):
        if turn == _TRIALS:
            break
        tried = _tried(source, target, inputs, candidate)
        if tried.parity:
            return tried
        if best is None or tried.coverage > best.coverage:
            best = tried
    if best is None:
        raise LoadError(Diagnostic("bad-argument", "neither names nor the order of use make any tensor of the target"))
    return _doubted(best, wanted)


def _candidates(first: Mapping[str, TensorSpec], second: Mapping[str, TensorSpec]) -> Iterator[Suggestion]:
    yield attempt(first, second, cut=False, in_order=True)
    units = read_units(first.items()), read_units(second.items())
    seen = []
    for moves in follow(*units).moves():
        if moves and moves not in seen:
            seen.append(moves)
            yield _completed(first, second, moves)


def _completed(
    first: Mapping[str, TensorSpec], second: Mapping[str, TensorSpec], moves: list[TensorMove]
) -> Suggestion:
    """The moves, and what names and shapes show of the tensors that no module in the order of use holds."""
    used = {k for m in moves for k in m.sources}, {k for m in moves for k in m.targets}
    left = [[(k, s) for k, s in side.items() if k not in used[n]] for n, side in enumerate((first, second))]
    rest = match(left[0], left[1], (True, True)) if all(left) else None
    sides = UnitSide(read_units(first.items()), True), UnitSide(read_units(second.items()), True)
    if rest is None:
        return written(first, second, Matched(*sides, moves))
    return written(first, second, Matched(*sides, [*moves, *rest.moves], rest.ties, rest.questions))


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
