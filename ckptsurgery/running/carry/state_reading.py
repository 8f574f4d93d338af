"""An optimizer's state dict in the forms that training code writes, as one object: parameters, states and groups.

Forms: `{"state": {0: …}, "param_groups": […]}` with numbers, or with names as FSDP and distributed checkpoints have
them; `{"state.NAME.exp_avg": …, "param_groups.NAME.lr": …}`, flattened; and states alone, by parameter or by moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...specs import TensorSpec
from ...storage.mirrors import is_optimizer, leaf_spec, parts_of
from ...storage.unpickling.nodes import name_of
from .state_names import Spelling, by_order, is_alphabetical, parameters_of, shape_of_state

__all__ = ["MOMENTS", "OptimizerTree", "UnknownParameter", "form_of", "read_optimizer"]

Form = Literal["groups", "flat", "states", "moments"]
State = Mapping[str, Any]
MOMENTS = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_inf", "square_avg", "acc_delta", "sum", "mu"}
)
"""Names of states that have the shape of their parameter and start at zero."""
_NAMES = ("params", "param_names")


class UnknownParameter(Exception):
    """A tree has an entry for a parameter that cannot be told; the text gives the reason.

    Args:
        advice: the way out, where it is not to name the tree's parameters.
    """

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.advice = advice


@dataclass(frozen=True)
class OptimizerTree:
    """An optimizer's state by the model's keys.

    Args:
        form: how the tree is written.
        tree: the tree itself, whose other parts stay.
        states: source key -> name -> value. groups: hyper-parameters of each group.
        group_of: source key -> number of its group; all of the optimizer's parameters.
        spelling: how the tree spells keys; None where it numbers them.
    """

    form: Form
    tree: dict[Any, Any]
    states: Mapping[str, State]
    groups: Sequence[Mapping[str, Any]]
    group_of: Mapping[str, int]
    spelling: Spelling | None

    def remade(self, states: Mapping[str, State], group_of: Mapping[str, int]) -> dict[Any, Any]:
        """Return the tree for other parameters, in their order.

        Args:
            states: target key -> state. group_of: target key -> group, for each parameter.
        """
        if self.spelling is None and is_alphabetical(list(group_of)):
            text = "it numbers its parameters, and the output's keys are sorted, which is not the order of parameters"
            raise UnknownParameter(text, "name the model that it is for as the target, whose parameters have an order")
        members = [[key for key, group in group_of.items() if group == n] for n in range(len(self.groups))]
        spelling, counted = self.spelling, {key: n for n, key in enumerate(key for keys in members for key in keys)}
        ids: Mapping[str, Any] = counted if spelling is None else {key: spelling.name(key) for key in counted}
        made = parts_of(self.tree)
        if self.form == "groups":
            made["state"] = {ids[key]: states[key] for key in counted if key in states}
            made["param_groups"] = [self._group(n, [ids[key] for key in keys], keys) for n, keys in enumerate(members)]
            return made
        made.clear()
        if self.form == "moments":
            for name in self.tree:
                made[name] = {ids[key]: states[key][name] for key in counted if name in states.get(key, ())}
        for key in counted if self.form == "states" else ():
            if key in states:
                made[ids[key]] = states[key]
        for key in counted if self.form == "flat" else ():
            made.update((f"state.{ids[key]}.{name}", value) for name, value in states.get(key, {}).items())
        for key in counted if self.form == "flat" else ():
            group = self.groups[group_of[key]]
            made.update((f"param_groups.{ids[key]}.{name}", value) for name, value in group.items())
        return made

    def _group(self, number: int, ids: list[Any], keys: Sequence[str]) -> dict[str, Any]:
        old = self.tree["param_groups"][number]
        new = {"params": ids, "param_names": list(keys)}
        return {name: new.get(name, value) if name in _NAMES else value for name, value in old.items()}


def form_of(tree: dict[Any, Any], keys: Mapping[str, Any]) -> Form | None:
    """Return the form of an optimizer's tree, or None for a mapping that is not an optimizer.

    Args:
        tree: the mapping from the checkpoint. keys: those of the model.
    """
    if is_optimizer(tree):
        return "groups"
    names = list(map(name_of, tree))
    if not names:
        return None
    if all(name.startswith(("state.", "param_groups.")) for name in names):
        return "flat"
    parts = list(tree.values())
    if not all(isinstance(part, dict) for part in parts):
        return None
    if all(name in MOMENTS for name in names):
        return "moments"
    inner = all(leaf_spec(leaf) is not None or not isinstance(leaf, dict | list) for p in parts for leaf in p.values())
    known = any(map(str, set().union(*parts) & MOMENTS))
    return "states" if inner and known else None


def read_optimizer(
    tree: dict[Any, Any], form: Form, specs: Mapping[str, TensorSpec], first: Mapping[str, str], given: Sequence[str]
) -> OptimizerTree:
    """Return an optimizer's tree by the model's keys.

    Args:
        specs: the model's headers. first: tied name -> the first of its group.
        given: the key of each parameter in the optimizer's order, where the caller gives them.

    Raises:
        UnknownParameter: an entry that belongs to no key, or to a key that cannot be told.
    """
    states, groups, members = _parts(tree, form, specs)
    ids = [one for member in members for one in member]
    if any(one not in ids for one in states):
        raise UnknownParameter(f"state for {next(one for one in states if one not in ids)!r}, which is in no group")
    spelling = None
    if given or not all(isinstance(one, str) for one in ids) or not ids:
        keys = _numbered(tree if form == "groups" else {}, states, members, specs, first, given)
    else:
        spelling = Spelling.of(ids, specs)
        keys = {one: spelling.key(one) for one in ids}
    strange = [one for one, key in keys.items() if key not in specs]
    if strange:
        raise UnknownParameter(f"it has {strange[0]!r}, which is not a key of the model")
    group_of = {first.get(keys[one], keys[one]): n for n, member in enumerate(members) for one in member}
    if len(group_of) < len(ids):
        raise UnknownParameter("two of its parameters are one tensor of the model")
    by_key = {first.get(keys[one], keys[one]): state for one, state in states.items()}
    return OptimizerTree(form, tree, by_key, groups, group_of, spelling)


def _numbered(
    tree: Mapping[Any, Any],
    states: Mapping[Any, State],
    members: Sequence[Sequence[Any]],
    specs: Mapping[str, TensorSpec],
    first: Mapping[str, str],
    given: Sequence[str],
) -> dict[Any, str]:
    ids = [one for member in members for one in member]
    told = [name for group in tree.get("param_groups", ()) for name in group.get("param_names", ())]
    if given and len(given) != len(ids):
        raise UnknownParameter(f"{len(given)} keys were given for its {len(ids)} parameters")
    shapes = {one: shape_of_state(states.get(one, {})) for one in ids}
    if given:
        found: dict[Any, str] | None = dict(zip(ids, given))
    elif len(told) == len(ids) and all(isinstance(name, str) for name in told):
        spelling = Spelling.of(told, specs)
        found = {one: spelling.key(name) for one, name in zip(ids, told)}
    else:
        keys = parameters_of(specs, first)
        found = by_order(members, shapes, keys, specs)
        if found is None and is_alphabetical(keys):
            raise UnknownParameter("it numbers its parameters, and the model's keys are sorted, not in their order")
    if found is None:
        raise UnknownParameter("it numbers its parameters, and neither names, order nor shapes tell which they are")
    for one, key in found.items():
        if key in specs and shapes[one] not in (None, specs[key].shape):
            raise UnknownParameter(f"its state {one} has shape {list(shapes[one] or ())}, and {key!r} is {specs[key]}")
    return found


def _parts(
    tree: dict[Any, Any], form: Form, specs: Mapping[str, TensorSpec]
) -> tuple[dict[Any, State], list[Mapping[str, Any]], list[list[Any]]]:
    """States by id, the hyper-parameters of each group, and the ids of each group."""
    if form == "groups":
        groups, state = tree["param_groups"], tree["state"]
        shaped = isinstance(groups, list | tuple) and all(isinstance(g, dict) and "params" in g for g in groups)
        if not shaped or not isinstance(state, dict) or not all(isinstance(s, dict) for s in state.values()):
            raise UnknownParameter("its groups or its state are not as torch writes them")
        hyper: list[Mapping[str, Any]] = [
            {name: value for name, value in group.items() if name not in _NAMES} for group in groups
        ]
        return dict(state), hyper, [list(group["params"]) for group in groups]
    if form == "flat":
        return _flat_parts(tree)
    states: dict[Any, State] = dict(tree)
    if form == "moments":
        ids = dict.fromkeys(one for part in tree.values() for one in part)
        states = {one: {name: part[one] for name, part in tree.items() if one in part} for one in ids}
    return states, [{}], [list(states)]


def _flat_parts(tree: dict[Any, Any]) -> tuple[dict[Any, State], list[Mapping[str, Any]], list[list[Any]]]:
    states: dict[Any, dict[str, Any]] = {}
    hyper: dict[Any, dict[str, Any]] = {}
    for kind, name, field, value in _split(tree):
        (states if kind == "state" else hyper).setdefault(name, {})[field] = value
    groups: list[Mapping[str, Any]] = []
    members: list[list[Any]] = []
    for name in dict.fromkeys([*hyper, *states]):
        mine = hyper.get(name, {})
        at = next((n for n, group in enumerate(groups) if repr(group) == repr(mine)), len(groups))
        if at == len(groups):
            groups.append(mine)
            members.append([])
        members[at].append(name)
    return dict(states), groups, members


def _split(tree: Mapping[Any, Any]) -> Iterator[tuple[str, str, str, Any]]:
    for key, value in tree.items():
        kind, _, rest = str(key).partition(".")
        name, _, field = rest.rpartition(".")
        yield kind, name, field, value
