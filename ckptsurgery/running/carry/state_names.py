"""Which of a model's tensors the entries of a tree beside it belong to: by name, or by the order of parameters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...specs import DTYPES, TensorSpec
from ...storage.checkpoint import Checkpoint
from ...storage.mirrors import leaf_spec

__all__ = [
    "COLUMN_FACTORS",
    "ROW_FACTORS",
    "Spelling",
    "by_order",
    "first_names",
    "is_alphabetical",
    "parameters_of",
    "shape_of_state",
]

ROW_FACTORS = frozenset({"exp_avg_sq_row", "row_var"})
"""Names of the row factors of a factored second moment, as transformers and torch write them."""
COLUMN_FACTORS = frozenset({"exp_avg_sq_col", "col_var"})
"""Names of its column factors."""
_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})  # of torch's normalisations
_COUNTERS = frozenset({"step", "RMS"})

_ORDERS = 100  # so rarely are names in alphabetical order by chance

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a tree beside the model spells the model's keys.

    >>> Spelling.of(["module.a.w"], ["a.w", "b.w"]).name("b.w")
    'module.b.w'
    >>> Spelling.of(["a.w"], ["model.a.w", "model.b.w"]).key("b.w")
    'model.b.w'

    Args:
        lead: prefix of the model's keys that the tree's names lack.
        front: prefix of the tree's names that the model's keys lack.
    """

    lead: str = ""
    front: str = ""

    @classmethod
    def of(cls, names: Sequence[str], keys: Collection[str]) -> Spelling:
        """Return the spelling under which most of the names are keys; the plain one where none is."""
        known = keys if isinstance(keys, set | dict | Mapping) else set(keys)
        found = Counter({cls(): sum(name in known for name in names)})
        strange = next((name for name in names if name not in known), None)
        if strange is not None:
            leads = {key[: -len(strange)] for key in known if key.endswith(f".{strange}")}
            fronts = {strange[: -len(key)] for key in known if strange.endswith(f".{key}")}
            for one in [*(cls(lead=lead) for lead in leads), *(cls(front=front) for front in fronts)]:
                found[one] = sum(one.key(name) in known for name in names)
        return max(found, key=lambda one: (found[one], -len(one.lead) - len(one.front)))

    def key(self, name: str) -> str:
        """The model's key of a name."""
        return self.lead + (name[len(self.front) :] if name.startswith(self.front) else f"\0{name}")

    def name(self, key: str) -> str:
        """The name of a model's key."""
        return self.front + key.removeprefix(self.lead)


def first_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return for each tied name the first of its group, which is the one that an optimizer has."""
    return {name: tie.names[0] for tie in checkpoint.ties for name in tie.names}


def parameters_of(specs: Mapping[str, TensorSpec], first: Mapping[str, str]) -> list[str]:
    """Return the keys that may be parameters, in order: floats, tied ones once, without torch's running statistics."""
    return [
        key
        for key, spec in specs.items()
        if DTYPES[spec.dtype].kind in ("float", "complex")
        and first.get(key, key) == key
        and key.rpartition(".")[2] not in _BUFFERS
    ]


def shape_of_state(state: Mapping[str, Any]) -> Shape | None:
    """Return the shape of the parameter that a state belongs to; None where nothing shows it."""
    specs = {name: spec for name, leaf in state.items() if (spec := leaf_spec(leaf)) is not None}
    row = next((specs[name].shape for name in ROW_FACTORS & specs.keys()), None)
    column = next((specs[name].shape for name in COLUMN_FACTORS & specs.keys()), None)
    if row is not None and column is not None:
        if row[-1:] == (1,) and len(row) == len(column) and column[-2:-1] == (1,):  # torch keeps the dimensions
            return (*row[:-1], column[-1])
        return (*row, column[-1])
    shapes = {spec.shape for name, spec in specs.items() if name not in _COUNTERS}
    shapes = shapes - {()} or shapes  # a scalar beside a moment counts something
    return shapes.pop() if len(shapes) == 1 else None


def is_alphabetical(keys: Sequence[str]) -> bool:
    """Return whether keys are sorted as a file sorts them, so that their order is not that of a module's parameters.

    A few names may be sorted by chance. The siblings at each level of the names, layers taken as one, would have to be
    in one order of at least 100.

    >>> is_alphabetical(["fc1.weight", "fc2.weight"]), is_alphabetical([f"attn.{p}.weight" for p in "koqvw"])
    (False, True)
    """
    if any(one > other for one, other in pairwise(keys)):
        return False
    siblings: dict[tuple[str, ...], set[str]] = {}
    for key in keys:
        names = tuple("0" if name.isdigit() else name for name in key.split("."))
        for n, name in enumerate(names):
            siblings.setdefault(names[:n], set()).add(name)
    return math.prod(math.factorial(len(names)) for names in siblings.values()) >= _ORDERS


def by_order(
    groups: Sequence[Sequence[Any]], shapes: Mapping[Any, Shape | None], keys: Sequence[str], specs: Mapping[str, Any]
) -> dict[Any, str] | None:
    """Return which parameter each number of an optimizer is, or None where order and shapes do not settle it.

    An optimizer numbers its parameters in the order of its groups, and each group in the order of the model. One group
    of all parameters is that order. Of several groups each shape must lie in one of them, with as many parameters as
    the model has of that shape. Keys that a file has sorted have lost the model's order; only shapes tell then.

    >>> specs = {"a.w": TensorSpec([2, 2], "F32"), "a.b": TensorSpec([2], "F32"), "c.w": TensorSpec([2, 2], "F32")}
    >>> by_order([[0, 1], [2]], {0: (2, 2), 1: (2, 2), 2: (2,)}, list(specs), specs)
    {0: 'a.w', 1: 'c.w', 2: 'a.b'}

    Args:
        groups: the numbers of each group. shapes: number -> shape, where its state shows it.
        keys: the model's parameters, in order.
    """
    numbers = [number for group in groups for number in group]
    ordered = not is_alphabetical(keys)
    if ordered and len([group for group in groups if group]) == 1 and len(numbers) == len(keys):
        fits = all(shapes.get(n) in (None, specs[key].shape) for n, key in zip(numbers, keys))
        return dict(zip(numbers, keys)) if fits else None
    found: dict[Any, str] = {}
    for shape in {shapes.get(number) for number in numbers}:
        alike = [number for number in numbers if shapes.get(number) == shape]
        candidates = [key for key in keys if specs[key].shape == shape]
        together = [group for group in groups if any(number in alike for number in group)]
        if shape is None or len(alike) != len(candidates) or len(together) != 1:
            return None
        if len(alike) > 1 and not ordered:
            return None
        found.update(zip(alike, candidates))
    return {number: found[number] for number in numbers}
