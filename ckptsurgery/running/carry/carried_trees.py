"""`carry`: trees beside the model that follow the plan's rules, each by its kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...errors import Diagnostic, PlanError, Remedy
from ...language.folding import fold
from ...planning.followers import read_twice
from ...planning.plan import Plan
from ...planning.sharing import output_aliases
from ...planning.steps import Step, cut
from ...storage.checkpoint import Checkpoint
from ...storage.mirrors import Mirror, leaf_spec
from ...storage.unpickling.nodes import name_of
from ...wording import counted
from .copies import Copying
from .remaking import Remaking
from .state_names import first_names
from .state_reading import UnknownParameter, form_of, read_optimizer
from .tree_leaves import Leaves

__all__ = ["Carried", "carried_trees"]

_SHOWN = 8
LOST = ("error", "drop")
"""The choices for state that cannot follow its parameter."""


@dataclass(frozen=True, slots=True)
class Carried:
    """Trees that followed the plan.

    Args:
        trees: dotted path -> the tree as it is now.
        notes: what became of them.
    """

    trees: Mapping[str, Any]
    notes: tuple[str, ...]


def carried_trees(
    plan: Plan, checkpoint: Checkpoint, mirrors: Iterable[Mirror], names: Mapping[str, Sequence[str]], lost: str
) -> Carried:
    """Return the trees that belong to a model as they belong to what a plan makes of it.

    Args:
        names: path of an optimizer -> the key of each of its parameters, in its order, where the caller gives them.
        lost: "error", or "drop" to reset the state of parameters that it cannot follow.

    Raises:
        PlanError: state that cannot follow, entries that belong to no key, groups that disagree; all at once.
    """
    carrier = _TreeCarrier(plan, checkpoint, names, lost)
    trees = {mirror.path: carrier.tried(mirror) for mirror in mirrors}
    if carrier.problems:
        raise PlanError(carrier.problems)
    return Carried(trees, tuple(carrier.notes))


@dataclass
class _TreeCarrier:
    plan: Plan
    checkpoint: Checkpoint
    names: Mapping[str, Sequence[str]]
    policy: str
    problems: list[Diagnostic] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def leaves(self) -> Leaves:
        return Leaves(self.checkpoint)

    @cached_property
    def first(self) -> dict[str, str]:
        return first_names(self.checkpoint)

    @cached_property
    def aliases(self) -> dict[str, str]:
        return output_aliases(self.plan, self.checkpoint)

    @cached_property
    def twice(self) -> set[str]:
        """Sources that the plan makes copies of, other than tied names of one tensor."""
        own = (part for step in self.plan.steps for part in self._without_aliases(step))
        return read_twice(own, self.first)

    def _without_aliases(self, step: Step) -> tuple[Step, ...]:
        kept = [key for key in step.targets if key not in self.aliases]
        return (step,) if len(kept) == len(step.targets) else cut(step, kept)

    def tried(self, mirror: Mirror) -> Any:
        try:
            return self.of(mirror.tree, mirror.path)
        except UnknownParameter as reason:
            self.problems.append(_unknown(mirror.path, reason))
            return mirror.tree

    def of(self, value: Any, path: str) -> Any:
        """Return the tree, or part of one, that follows from another."""
        if isinstance(value, list | tuple):
            if value and all(leaf_spec(part) is not None for part in value):
                return self._listing(value, path)
            parts = [self.of(part, f"{path}.{n}") for n, part in enumerate(value)]
            return parts if isinstance(value, list) else tuple(parts)
        if not isinstance(value, dict):
            return value
        form = form_of(value, self.plan.source)
        if form is not None:
            optimizer = read_optimizer(value, form, self.plan.source, self.first, self.names.get(path, ()))
            made = Remaking(self.plan, self.leaves, optimizer, self.first, self.aliases, self.twice)
            tree = made.remade()
            self._judge(path, made.lost, "state")
            self._tell(path, made)
            return tree
        if any(leaf_spec(part) is not None for part in value.values()):
            copying = Copying(self.plan, self.leaves, self.first, self.aliases)
            tree = copying.mapping(value)
            self._judge(path, copying.lost, "copy", may_drop=False)
            self.notes.append(f"carried along: {path}, {counted(_tensors(tree), 'tensor')}")
            return tree
        return {key: self.of(part, f"{path}.{name_of(key)}") for key, part in value.items()}

    def _listing(self, value: Sequence[Any], path: str) -> Any:
        copying = Copying(self.plan, self.leaves, self.first, self.aliases)
        made = copying.listing(value, self.names.get(path, ()))
        self._judge(path, copying.lost, "copy", may_drop=False)
        self.notes.append(f"carried along: {path}, {counted(len(made), 'tensor')} {_order(self.plan)}")
        return made if isinstance(value, list) else tuple(made)

    def _judge(self, path: str, lost: Mapping[str, str], what: str, may_drop: bool = True) -> None:
        """Refuse what cannot follow, or note that it starts anew."""
        reasons: dict[str, list[str]] = {}
        for key, reason in lost.items():
            reasons.setdefault(reason, []).append(key)
        lines = [f"{text}  {reason}" for reason, keys in reasons.items() for text, _ in fold(keys)[:_SHOWN]]
        if not lost:
            return
        if self.policy == "drop" and may_drop:
            self.notes += [f"reset, as asked: the state in {path} of {line}" for line in lines]
            return
        text = f"{path}: the {what} of {counted(len(lost), 'tensor')} cannot follow what the plan makes of the model"
        remedies = (Remedy("carry_lost", "drop", "starts it anew"),) if may_drop else ()
        drop = (Remedy("beside", {path: "drop"}, "leaves the tree out"),)
        self.problems.append(Diagnostic("carry-lost", text, notes=tuple(lines[:16]), remedies=remedies or drop))

    def _tell(self, path: str, made: Remaking) -> None:
        if made.apart:
            first, reason = next(iter(made.apart.items()))
            text = f"{path}: no one group is right for {first!r}: {reason}"
            more = tuple(f"{key}  {why}" for key, why in list(made.apart.items())[1:_SHOWN])
            drop = Remedy("beside", {path: "drop"}, "leaves the optimizer out")
            help = "or give them one group before"
            self.problems.append(Diagnostic("groups-differ", text, notes=more, remedies=(drop,), advice=help))
        before, numbered = len(made.optimizer.group_of), made.optimizer.spelling is None
        order = f", numbered {_order(self.plan)}" if numbered else ""
        self.notes.append(f"carried along: {path}, the state of {counted(before, 'parameter')}{order}")
        for text, keys in (("padded with zeros: the moments", made.padded), ("new, without state", made.fresh)):
            folded = ", ".join(shown for shown, _ in fold(keys)[:_SHOWN])
            self.notes += [f"{text} in {path} of {folded}"] if keys else []


def _order(plan: Plan) -> str:
    return "in the order of the target" if plan.target is not None else "in the order of the output's keys"


def _tensors(tree: Any) -> int:
    return sum(leaf_spec(leaf) is not None for leaf in tree.values())


def _unknown(path: str, reason: UnknownParameter) -> Diagnostic:
    return Diagnostic(
        "carry-unknown",
        f"{path} cannot be carried: {reason}",
        remedies=(Remedy("beside", {path: "drop"}, "leaves it out"),),
        advice=reason.advice or f'carry={{"{path}": [the key of each parameter, in the order of the tree]}} names them',
    )
