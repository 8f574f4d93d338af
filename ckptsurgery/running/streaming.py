"""Writing a plan's result as it comes: bytes that only move are copied, the rest is computed one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..planning.costing import BUDGET, REGION
from ..planning.cutting import copies_bytes
from ..planning.plan import Plan
from ..planning.steps import Step
from ..storage.checkpoint import Checkpoint
from ..storage.staging import Writer
from .copying import ByteRun, copy_runs, merged, runs_of

__all__ = ["output_aliases", "stream"]


def output_aliases(plan: Plan, checkpoint: Checkpoint) -> dict[str, str]:
    """Target keys that are one tensor with another: tied by the plan, or made alike from names tied in the source."""
    first = {name: tie.names[0] for tie in checkpoint.ties for name in tie.names}
    seen: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for step in plan.steps if first else ():
        if not any(key in first for key in step.sources):
            continue
        sources = tuple(first.get(k, k) for k in step.sources)
        for number, (key, spec) in enumerate(zip(step.targets, step.program.outputs)):
            way: object = "copy" if step.kind == "copy" else id(step.program)
            kept = seen.setdefault((way, number, sources, spec), key)
            if kept != key:
                aliases[key] = kept
    aliases.update({alias: aliases.get(base, base) for alias, base in plan.ties.items()})
    return aliases


def stream(
    plan: Plan,
    checkpoint: Checkpoint,
    writer: Writer,
    moved: Callable[[int], object],
    *,
    budget: int = BUDGET,
    region: int = REGION,
) -> None:
    """Fill a writer: first what is copied, in the order of the output, then what is computed, over the cores.

    Args:
        budget: bytes that tasks may hold together.
        region: bytes of a target that are computed at a time where a step can be cut.
    """
    runs: list[ByteRun] = []
    computed: list[Step] = []
    for step in plan.steps:
        if any(key in writer.places for key in step.targets):
            found = _byte_runs(step, checkpoint, writer)
            if found is None:
                computed.append(step)
            else:
                runs += found
    copy_runs(merged(runs), checkpoint, writer, moved)
    if computed:
        from .computing import run_tasks, tasks_of

        run_tasks(tasks_of(computed, checkpoint, writer, region), moved, budget)


def _byte_runs(step: Step, checkpoint: Checkpoint, writer: Writer) -> Iterable[ByteRun] | None:
    layout = step.program.moves
    if layout is None or not copies_bytes(step.program):
        return None
    extents = [checkpoint.extent(key) for key in step.sources]
    known = [e for e in extents if e is not None]
    if len(known) < len(extents):
        return None
    places = [writer.places.get(key) for key in step.targets]
    return runs_of(layout, [s.dtype for s in step.program.outputs], known, places)


def renamed_metadata(metadata: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """A state_dict's `_metadata`, by the module paths of the result: a module goes where its tensors went."""
    moved: dict[str, str] = {"": ""}
    for step in plan.steps:
        for source in step.sources[:1]:
            for target in step.targets[:1]:
                moved.setdefault(source.rpartition(".")[0], target.rpartition(".")[0])
    return {moved[path]: value for path, value in metadata.items() if path in moved}
