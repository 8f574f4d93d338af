"""Writing a plan's result as it comes: bytes that only move are copied, the rest is computed one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..planning.plan import Plan
from ..planning.steps import Step
from ..storage.checkpoint import Checkpoint
from ..storage.staging import Writer
from .copying import ByteRun, copy_runs, merged, runs_of
from .executing import run_step

if TYPE_CHECKING:
    from torch import Tensor

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


def stream(plan: Plan, checkpoint: Checkpoint, writer: Writer, moved: Callable[[int], object]) -> None:
    """Fill a writer: first what is copied, in the order of the output, then what is computed, step by step."""
    runs: list[ByteRun] = []
    computed: list[Step] = []
    for step in plan.steps:
        if not any(key in writer.places for key in step.targets):
            continue
        found = _byte_runs(step, checkpoint, writer)
        if found is None:
            computed.append(step)
        else:
            runs += found
    copy_runs(merged(runs), checkpoint, writer, moved)
    loads = Loads(checkpoint, computed)
    for step in computed:
        if not _left_from_before(step, writer, moved):
            for key, tensor in zip(step.targets, run_step(step, loads)):
                if key in writer.places:
                    _write(key, tensor, writer, moved)
        loads.done(step)


def _left_from_before(step: Step, writer: Writer, moved: Callable[[int], object]) -> bool:
    """Whether an interrupted run wrote all that the step makes."""
    places = [writer.places[key] for key in step.targets if key in writer.places]
    if not all(writer.has(place.file, place.offset, place.nbytes) for place in places):
        return False
    for place in places:
        writer.skip(place.nbytes)
        moved(place.nbytes)
    return True


def _byte_runs(step: Step, checkpoint: Checkpoint, writer: Writer) -> list[ByteRun] | None:
    layout = step.program.moves
    if layout is None:
        return None
    extents = [checkpoint.extent(key) for key in step.sources]
    known = [e for e in extents if e is not None]
    if len(known) < len(extents):
        return None
    wanted = [n for n, key in enumerate(step.targets) if key in writer.places]
    if len(wanted) < len(step.targets):
        return None
    return runs_of(layout, [s.dtype for s in step.program.outputs], known, [writer.places[k] for k in step.targets])


def _write(key: str, tensor: Tensor, writer: Writer, moved: Callable[[int], object]) -> None:
    from ..storage.tensors import dense_bytes

    place = writer.places[key]
    data = dense_bytes(tensor, key)
    writer.write(place.file, place.offset, data)
    moved(len(data))


@dataclass
class Loads:
    """Loads sources, and holds one only as long as a later step still wants it."""

    checkpoint: Checkpoint
    steps: Iterable[Step]
    wanted: dict[str, int] = field(default_factory=dict)
    held: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for step in self.steps:
            for key in _reads(step):
                self.wanted[key] = self.wanted.get(key, 0) + 1

    def __call__(self, key: str) -> Tensor:
        if key not in self.held:
            tensor = self.checkpoint.load(key)
            if self.wanted.get(key, 0) < 2:
                return tensor
            self.held[key] = tensor
        return self.held[key]

    def done(self, step: Step) -> None:
        """Forget what no later step wants."""
        for key in _reads(step):
            self.wanted[key] -= 1
            if self.wanted[key] <= 0:
                self.held.pop(key, None)


def _reads(step: Step) -> set[str]:
    return set(step.sources)


def renamed_metadata(metadata: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """A state_dict's `_metadata`, by the module paths of the result: a module goes where its tensors went."""
    moved: dict[str, str] = {"": ""}
    for step in plan.steps:
        for source in step.sources[:1]:
            for target in step.targets[:1]:
                moved.setdefault(source.rpartition(".")[0], target.rpartition(".")[0])
    return {moved[path]: value for path, value in metadata.items() if path in moved}
