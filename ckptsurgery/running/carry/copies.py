"""Trees of tensors that copy a model's values, such as averages: remade by what the plan does to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ops.base import OpError
from ...planning.followers import CannotFollow, values_following
from ...planning.plan import Plan
from ...planning.steps import Step, cut
from ...specs import DTYPES
from ...storage.mirrors import leaf_spec, parts_of
from ...storage.unpickling.nodes import name_of
from .state_names import Spelling, parameters_of
from .state_reading import UnknownParameter
from .tree_leaves import Leaves

__all__ = ["Copying"]


@dataclass
class Copying:
    """Remakes one tree of copies.

    Args:
        first: tied source key -> the first of its group. aliases: target keys that are one tensor with another.
        lost: target key -> why it cannot be made.
    """

    plan: Plan
    leaves: Leaves
    first: Mapping[str, str]
    aliases: Mapping[str, str]
    lost: dict[str, str] = field(default_factory=dict)

    def mapping(self, tree: dict[Any, Any]) -> dict[Any, Any]:
        """Return a mapping from the model's names to tensors, for the names that the plan makes.

        Parts that are not tensors of the model, such as a count of updates, stay.

        Raises:
            UnknownParameter: a tensor that is none of the model's.
        """
        names = {name_of(name): name for name, leaf in tree.items() if leaf_spec(leaf) is not None}
        spelling = Spelling.of(list(names), self.plan.source)
        known = {key: tree[names[name]] for name in names if (key := spelling.key(name)) in self.plan.source}
        strange = [name for name in names if spelling.key(name) not in known and _weighs(tree[names[name]])]
        if strange:
            raise UnknownParameter(f"it has {strange[0]!r}, which is not a key of the model")
        made = self._made(known)
        made |= {alias: made[base] for alias, base in self.plan.ties.items() if base in made}
        whole = parts_of(tree)
        whole.clear()
        whole.update((name, part) for name, part in tree.items() if spelling.key(name_of(name)) not in known)
        whole.update((spelling.name(key), made[key]) for key in self.plan.keys if key in made)
        return whole

    def listing(self, tree: Sequence[Any], given: Sequence[str]) -> list[Any]:
        """Return a list with one tensor for each parameter, in the order of the parameters that the plan makes.

        Raises:
            UnknownParameter: the list does not have the shapes of the model's parameters, in order.
        """
        keys = list(given) or parameters_of(self.plan.source, self.first)
        specs = [leaf_spec(leaf) for leaf in tree]
        if [spec.shape if spec else None for spec in specs] != [
            self.plan.source[key].shape if key in self.plan.source else () for key in keys
        ]:
            raise UnknownParameter("it lists tensors, and their shapes are not those of the parameters, in order")
        made = self._made(dict(zip(keys, tree)))
        return [made[key] for key in self.plan.keys if key in made and key not in self.aliases]

    def _made(self, known: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for step in self.plan.steps:
            own = [key for key in step.sources if key in known]
            if step.sources and not own:
                continue
            try:
                if len(own) < len(step.sources):
                    lacking = next(key for key in step.sources if key not in known)
                    raise CannotFollow(f"the tree has no {lacking!r}")
                made.update(self._targets(step, known))
            except (CannotFollow, OpError) as reason:
                self.lost.update(dict.fromkeys(step.targets, str(reason)))
        return made

    def _targets(self, step: Step, known: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: known[key] for key in step.sources}
        specs = tuple(spec for key in step.sources if (spec := leaf_spec(known[key])) is not None)
        program = values_following(step.program, specs)
        whole = step._replace(program=program)
        made = {}
        for target in step.targets:
            (one,) = cut(whole, {target})
            made[target] = self.leaves.made(one, values, f"the copy of {target!r}")
        return made


def _weighs(leaf: Any) -> bool:
    spec = leaf_spec(leaf)
    return spec is not None and bool(spec.shape) and DTYPES[spec.dtype].kind in ("float", "complex")
