"""What a plan makes, as one side of a comparison."""

from __future__ import annotations

from collections.abc import Mapping

from ..planning.plan import Plan
from ..planning.sharing import output_aliases
from ..running.executor.programs import run_step
from ..specs import TensorSpec
from ..storage.tensors import dense_bytes
from .compared_sides import Groups

__all__ = ["Made"]


class Made:
    """What a plan makes, computed step by step when it is asked for; one step's result is held at a time."""

    def __init__(self, plan: Plan) -> None:
        self.name = f"{plan.checkpoint.source} by the recipe"
        aliases = output_aliases(plan, plan.checkpoint)
        made = {**plan.specs, **{alias: plan.specs[base] for alias, base in aliases.items()}}
        self.specs: Mapping[str, TensorSpec] = {key: made[key] for key in plan.keys if key in made}
        groups: dict[str, list[str]] = {}
        for alias, base in aliases.items():
            groups.setdefault(base, [base]).append(alias)
        self.ties: Groups = tuple(map(tuple, groups.values()))
        self._aliases, self._checkpoint = aliases, plan.checkpoint
        self._steps = {key: step for step in plan.steps for key in step.targets}
        self._held: dict[str, memoryview] = {}

    def read(self, key: str, start: int, stop: int) -> bytes | bytearray | memoryview:
        """Copied from the source where the plan copies, else from the step's tensors."""
        key = self._aliases.get(key, key)
        step = self._steps[key]
        copies = step.program.copies
        if copies is not None:
            return self._checkpoint.read(step.sources[copies[step.targets.index(key)]], start, stop)
        if key not in self._held:
            tensors = run_step(step, self._checkpoint.load)
            self._held = {k: dense_bytes(t, k) for k, t in zip(step.targets, tensors)}
        return self._held[key][start:stop]
