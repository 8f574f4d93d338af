"""An optimizer for what a plan makes: each state moved as its parameter is, counters and groups that agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ops.base import Specs
from ...planning.followers import CannotFollow, factors_following, moments_following
from ...planning.layout import Layout
from ...planning.plan import Plan
from ...planning.steps import Move, Program, Step, cut
from ...specs import DTYPES
from ...storage.mirrors import leaf_spec
from ...storage.unpickling.inert import Opaque
from .state_names import COLUMN_FACTORS, ROW_FACTORS, parameters_of
from .state_reading import MOMENTS, OptimizerTree
from .tree_leaves import Leaves, alike

__all__ = ["Remaking"]

_QUANTISED = frozenset({"absmax1", "absmax2", "qmap1", "qmap2"})  # bitsandbytes' blocks and code books
_RECOMPUTED = frozenset({"RMS"})  # of the parameter, at each step
_FACTORS = ROW_FACTORS | COLUMN_FACTORS
_PARTNER = {"exp_avg_sq_row": "exp_avg_sq_col", "row_var": "col_var"}
_PARTNER |= {column: row for row, column in _PARTNER.items()}
_TWICE = "each copy of a parameter has a gradient of its own"

State = Mapping[str, Any]


@dataclass
class Remaking:
    """Remakes one optimizer; what went wrong, and what is worth a note, is collected.

    Args:
        first: tied source key -> the first of its group. aliases: target keys that are one tensor with another.
        twice: source keys of which the plan makes copies.
        lost: target key -> why its parameter has no state.
        apart: target key -> the groups that disagree on it.
        padded: target keys whose moments have new zeros.
        fresh: parameters that the plan adds.
    """

    plan: Plan
    leaves: Leaves
    optimizer: OptimizerTree
    first: Mapping[str, str]
    aliases: Mapping[str, str]
    twice: set[str]
    lost: dict[str, str] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    padded: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)

    def remade(self) -> dict[Any, Any]:
        """Return the optimizer's tree for the parameters that the plan makes."""
        states: dict[str, State] = {}
        groups: dict[str, int] = {}
        for step in self.plan.steps:
            keys = [self.first.get(key, key) for key in step.sources]
            own = [key for key in keys if key in self.optimizer.group_of]
            targets = [key for key in step.targets if key not in self.aliases]
            if not own or not targets:
                self.fresh += targets if not step.sources else []
                continue
            for target in targets:
                groups[target] = self._group(target, own)
            try:
                states.update(self._states(step, keys, targets))
            except CannotFollow as reason:
                self.lost.update(dict.fromkeys(targets, str(reason)))
        self._place_fresh(groups)
        order = [key for key in self.plan.keys if key in groups]
        return self.optimizer.remade(states, {key: groups[key] for key in order})

    def _states(self, step: Step, keys: Sequence[str], targets: Sequence[str]) -> dict[str, State]:
        """The states of a step's targets."""
        states = [self.optimizer.states.get(key) or {} for key in keys]
        if not any(states):
            return {}
        lacking = [key for key, state in zip(keys, states) if not state]
        if lacking:
            raise CannotFollow(f"{lacking[0]!r} has no state in the optimizer, and {_having(keys, states)!r} has")
        if self.twice & set(keys):
            raise CannotFollow(_TWICE)
        for name, value in ((name, value) for state in states for name, value in state.items()):
            if isinstance(value, Opaque):
                raise CannotFollow(f"{name!r} is not a plain tensor but {value.path}")
        program, numbers = step.program, {key: n for n, key in enumerate(step.targets)}
        if program.copies is not None and _same_shapes(program):
            return {target: states[program.copies[numbers[target]]] for target in targets}
        return {target: self._state(step, keys, states, target) for target in targets}

    def _state(self, step: Step, keys: Sequence[str], states: Sequence[State], target: str) -> State:
        names = dict.fromkeys(name for state in states for name in state)
        for name in names:
            without = [key for key, state in zip(keys, states) if name not in state]
            if without:
                raise CannotFollow(f"{without[0]!r} has no {name!r}, and {_having(keys, states, name)!r} has")
        if _QUANTISED & names.keys():
            raise CannotFollow("its state is quantised to 8 bits in blocks, which a moved tensor cuts in other places")
        made: dict[str, Any] = {}
        for name in names:
            values = [state[name] for state in states]
            if name in _FACTORS:
                new, program = self._factors(name, step.program, values)
                made[new] = self._moved(step, keys, values, target, name, program)
            elif self._is_counter(name, values, step.program.inputs):
                if name not in _RECOMPUTED and not alike(self.leaves, values):
                    shown = ", ".join(dict.fromkeys(map(self._shown, values)))
                    raise CannotFollow(f"its parts have different values of {name!r}: {shown}")
                made[name] = self.leaves.copy(values[0], name)
            else:
                made[name] = self._moved(step, keys, values, target, name, self._moments(name, step.program, values))
        return made

    def _is_counter(self, name: str, values: Sequence[Any], inputs: Specs) -> bool:
        specs = [leaf_spec(value) for value in values]
        return any(spec is None for spec in specs) or (
            all(spec is not None and not spec.shape for spec in specs)
            and (name == "step" or any(spec.shape for spec in inputs))
        )

    def _shown(self, value: Any) -> str:
        return str(value) if leaf_spec(value) is None else str(self.leaves.load(value, "a counter").item())

    def _moments(self, name: str, program: Program, values: Sequence[Any]) -> Program:
        specs = tuple(spec for value in values if (spec := leaf_spec(value)) is not None)
        if any(spec.shape != own.shape for spec, own in zip(specs, program.inputs)):
            raise CannotFollow(f"{name!r} has not the shape of its parameter: {specs[0]}, and {program.inputs[0]}")
        if any(DTYPES[spec.dtype].kind not in ("float", "complex") for spec in specs):
            raise CannotFollow(f"{name!r} holds {specs[0].dtype} codes")
        if any(len(spec.shape) > 1 for spec in program.outputs) != any(len(spec.shape) > 1 for spec in program.inputs):
            self._refuse_factored("its moment is factored on one side of the rule only")
        made = moments_following(program, specs)
        if sum(spec.numel for spec in made.outputs) > sum(spec.numel for spec in made.inputs) and name not in MOMENTS:
            raise CannotFollow(f"{name!r} is not known to start at zero, and the rule adds entries")
        return made

    def _refuse_factored(self, reason: str) -> None:
        if any(_FACTORS & state.keys() for state in self.optimizer.states.values()):
            raise CannotFollow(reason)

    def _factors(self, name: str, program: Program, values: Sequence[Any]) -> tuple[str, Program]:
        """The name that a factor has afterwards, and the program that moves it."""
        rows, columns, swapped = factors_following(program)
        row = name in ROW_FACTORS
        layout = rows if row else columns
        specs = tuple(spec for value in values if (spec := leaf_spec(value)) is not None)
        if all(len(spec.shape) == len(own.shape) for spec, own in zip(specs, program.inputs)):
            layout = _with_ones(layout, row, row != swapped)
        if tuple(spec.shape for spec in specs) != layout.sources:
            raise CannotFollow(f"{name!r} is {specs[0]}, which is not the factor of {program.inputs[0]}")
        moved = Program.of(specs, [Move(layout, (specs[0].dtype,) * len(layout.targets))])
        return _PARTNER[name] if swapped else name, moved

    def _moved(
        self, step: Step, keys: Sequence[str], values: Sequence[Any], target: str, name: str, program: Program
    ) -> Any:
        if sum(s.numel for s in program.outputs) > sum(s.numel for s in program.inputs) and target not in self.padded:
            self.padded.append(target)
        # several sources may be one tied name: each stays a source of its own here
        sources = tuple(f"{n}:{key}" for n, key in enumerate(keys))
        (one,) = cut(Step(sources, step.targets, program, step.rules), {target})
        return self.leaves.made(one, dict(zip(sources, values)), f"{name!r}")

    def _group(self, target: str, keys: Sequence[str]) -> int:
        numbers = list(dict.fromkeys(self.optimizer.group_of[key] for key in keys))
        odd = _disagreement(self.leaves, [self.optimizer.groups[n] for n in numbers])
        if odd:
            shown = " and ".join(map(str, numbers))
            self.apart[target] = f"{', '.join(keys[:4])} are in groups {shown}, which differ in {odd}"
        return numbers[0]

    def _place_fresh(self, groups: dict[str, int]) -> None:
        """Give parameters that the plan adds a group: the only one, or the one that holds their kind of shape."""
        known = self.plan.source
        whole = all(key in self.optimizer.group_of for key in parameters_of(known, self.first))
        self.fresh = parameters_of({key: self.plan.specs[key] for key in self.fresh}, {}) if whole else []
        for key in self.fresh:
            dims = len(self.plan.specs[key].shape)
            alike = {n for other, n in groups.items() if other not in self.fresh and self._dims(other) == dims}
            choices = sorted(alike) if alike else list(range(len(self.optimizer.groups)))
            groups[key] = choices[0]
            if _disagreement(self.leaves, [self.optimizer.groups[n] for n in choices]):
                self.apart[key] = f"it is new, and belongs to group {' or '.join(map(str, choices))}"

    def _dims(self, key: str) -> int:
        return len(self.plan.specs[key].shape)


def _having(keys: Sequence[str], states: Sequence[State], name: str | None = None) -> str:
    return next(key for key, state in zip(keys, states) if (name in state if name else state))


def _same_shapes(program: Program) -> bool:
    copies = program.copies or ()
    return len(set(copies)) == len(copies) and all(
        program.inputs[n].shape == spec.shape for n, spec in zip(copies, program.outputs)
    )


def _disagreement(leaves: Leaves, groups: Sequence[Mapping[str, Any]]) -> str:
    """The hyper-parameters in which groups differ; empty where they agree."""
    names = dict.fromkeys(name for group in groups for name in group)
    odd = [name for name in names if not alike(leaves, [group.get(name) for group in groups])]
    return ", ".join(odd)


def _with_ones(layout: Layout, row_before: bool, row_after: bool) -> Layout:
    """The layout of factors that keep the dimension which they average over, at size 1."""

    def kept(shapes: Sequence[tuple[int, ...]], row: bool) -> Iterator[tuple[int, ...]]:
        for shape in shapes:
            yield (*shape, 1) if row else (*shape[:-1], 1, shape[-1])

    return Layout(tuple(kept(layout.sources, row_before)), tuple(kept(layout.targets, row_after)), layout.pieces)
