"""Lists of a config that have an entry for each layer, such as `layer_types`, after a plan that changes the layers.

An entry belongs to a layer, so it goes where the layer's tensors go: twice where they are copied, elsewhere where they
are moved, nowhere where they are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ..planning.plan import Plan

__all__ = ["NUMBER", "entries_by_layer", "has_number", "is_layer_list"]

NUMBER = re.compile(r"(?<![0-9A-Za-z_])\d+(?![0-9A-Za-z_])")
_OF_LAYERS = re.compile(r"(^|_)(layers?|blocks?|depths?)($|_)")


class _LayerPlace(NamedTuple):
    """The outermost number of a key, and the key before it."""

    stack: str
    layer: int


def has_number(key: str) -> bool:
    """Return whether a key has an index, as a tensor of a layer does.

    >>> has_number("model.layers.3.norm.weight"), has_number("lm_head.weight")
    (True, False)
    """
    return NUMBER.search(key) is not None


def is_layer_list(name: str, value: Any) -> bool:
    """Return whether a field may have one entry for each layer: a list of plain values, not of ascending indices.

    >>> is_layer_list("layer_types", ["full", "sliding"]), is_layer_list("mlp_only_layers", [0, 3])
    (True, False)
    """
    if not _OF_LAYERS.search(name) or not isinstance(value, list) or len(value) < 2:
        return False
    numbers = all(type(entry) is int for entry in value)
    return all(isinstance(entry, str | int | float | None) for entry in value) and not (
        numbers and all(one < other for one, other in pairwise(value))
    )


def entries_by_layer(entries: Sequence[Any], plan: Plan) -> list[Any] | None:
    """Return the list for the layers that a plan makes, or None where they do not determine it.

    The source must have a run of as many layers. Each layer of the output has the entry of the layer that its tensors
    come from; several must agree, and so must several runs of layers.
    """
    runs = {stack for stack, layers in _stacks(plan.source).items() if layers == set(range(len(entries)))}
    origins: dict[str, dict[int, set[int]]] = {}
    for step in plan.steps:
        layers = {place.layer for key in step.sources if (place := _place(key)) and place.stack in runs}
        for key in step.targets if layers else ():
            if place := _place(key):
                origins.setdefault(place.stack, {}).setdefault(place.layer, set()).update(layers)
    made = _stacks(plan.specs)
    found: list[list[Any]] = []
    for stack, layers_of in origins.items():
        picked = [[entries[n] for n in sorted(layers_of.get(at, ()))] for at in range(len(made[stack]))]
        if made[stack] != set(range(len(made[stack]))) or any(not p or p != [p[0]] * len(p) for p in picked):
            return None
        found.append([p[0] for p in picked])
    return found[0] if found and all(one == found[0] for one in found) else None


def _place(key: str) -> _LayerPlace | None:
    match = NUMBER.search(key)
    return _LayerPlace(key[: match.start()], int(match.group())) if match else None


def _stacks(keys: Iterable[str]) -> dict[str, set[int]]:
    """The layers of each stack."""
    found: dict[str, set[int]] = {}
    for key in keys:
        if place := _place(key):
            found.setdefault(place.stack, set()).add(place.layer)
    return found
