"""Running the program of a step on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

from ...errors import CheckpointError, Diagnostic
from ...ops.base import Op, OpError
from ...ops.keyed import At, run_at
from ...planning.layout import Layout
from ...planning.naming_results import names_on_the_way, results_of
from ...planning.steps import ApplyOp, Make, Move, Parallel, Program, Select, Step
from ...storage.plain_memory import plain
from ...storage.tensors import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Loads", "execute", "move_box", "rearrange", "run_step"]

T = TypeVar("T")
Load = Callable[[str], "Tensor"]


def run_step(step: Step, load: Load) -> tuple[Tensor, ...]:
    """The tensors that a step makes, in the order of its targets; contiguous, and views of its sources where it may.

    Args:
        load: gives the tensor of a source key.

    Raises:
        CheckpointError: an op refused the values it met, or returned a tensor that is not plain memory.
    """
    tensors = tuple(load(key) for key in step.sources)
    try:
        return execute(step.program, tensors, step.sources, step.targets)
    except OpError as error:
        raise CheckpointError(
            Diagnostic(
                "op-failed", str(error), place=step.targets[0], facts=(("sources", ", ".join(step.sources[:6])),)
            )
        ) from error


def execute(
    program: Program, tensors: Sequence[Tensor], sources: Sequence[str] = (), targets: Sequence[str] = ()
) -> tuple[Tensor, ...]:
    """What a program makes of tensors.

    Args:
        sources, targets: the keys on both sides, for ops that ask for them.
    """
    current = tuple(tensors)
    names = names_on_the_way(program, sources, targets) if program.asks_at else ()
    for number, instruction in enumerate(program.instructions):
        match instruction:
            case Move(layout, dtypes):
                current = rearrange(layout, current, dtypes)
            case Select():
                current = instruction.applied(current)
            case Parallel():
                ends = instruction.ends(names[number], names[number + 1]) if names else repeat(((), ()))
                parts = zip(instruction.shares(current), ends)
                current = tuple(t for (part, share), keys in parts for t in execute(part, share, *keys))
            case Make(op):
                current = (*current, *run_at(op, (), At(names[number + 1][-1])))
            case ApplyOp(op):
                results = results_of(instruction, len(current), names[number + 1]) if names else repeat("")
                # an op of the caller's may return a tensor of any kind
                made = instruction.applied(current, partial(_run_next, op, results))
                current = tuple(plain(tensor, f"the result of {op}") for tensor in made)
    return tuple(t.contiguous() for t in current)


def _run_next(op: Op, keys: Iterator[str], group: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What an op makes of one group, whose result has the next of the keys."""
    return run_at(op, group, At(next(keys)))


def rearrange(layout: Layout, tensors: Sequence[Tensor], dtypes: Sequence[str]) -> tuple[Tensor, ...]:
    """The targets of a rearrangement; a whole source that only changes its shape is passed on as a view.

    Args:
        dtypes: of the targets; one without elements has it from no source.
    """
    copies = layout.copies
    if copies is not None:
        # What keeps its shape is left alone: torch counts two packed elements as one, so its own shape is another.
        return tuple(
            whole if layout.sources[s] == shape else whole.reshape(shape)
            for s, shape, whole in zip(copies, layout.targets, (tensors[s].contiguous() for s in copies))
        )
    flat = {piece.source: tensors[piece.source].detach().contiguous() for piece in layout.pieces}
    made = []
    for number, shape in enumerate(layout.targets):
        pieces = layout.into(number)
        if pieces:
            target = flat[pieces[0].source].new_empty(shape)
        else:
            target = tensors[0].new_empty(shape, dtype=torch_dtype(dtypes[number], "a tensor without elements"))
        for p in pieces:
            box = flat[p.source].as_strided(
                p.shape, p.source_strides, flat[p.source].storage_offset() + p.source_offset
            )
            move_box(box, target.as_strided(p.shape, p.target_strides, p.target_offset))
        made.append(target)
    return tuple(made)


def move_box(box: Tensor, target: Tensor) -> None:
    """Copy one view into another of its shape, a whole transposed matrix in the way that torch has a fast path for."""
    # It wants two dimensions and a contiguous target; all else goes element by element, five times slower.
    if box.dim() == 2 and box.stride() == (1, box.size(0)) and not target.is_contiguous():
        box = box.contiguous()
    target.copy_(box)


@dataclass
class Loads(Generic[T]):
    """Loads sources, and holds one only as long as a later step still wants it; from any thread."""

    load: Callable[[str], T]
    steps: Iterable[Step]
    wanted: dict[str, int] = field(default_factory=dict)
    held: dict[str, T] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        for step in self.steps:
            self.expect(step)

    def expect(self, step: Step) -> None:
        """Count a step among those that will ask for its sources."""
        for key in set(step.sources):
            self.wanted[key] = self.wanted.get(key, 0) + 1

    def __call__(self, key: str) -> T:
        if key not in self.held and self.wanted.get(key, 0) < 2:
            return self.load(key)
        with self.lock:
            if key not in self.held:
                self.held[key] = self.load(key)
            return self.held[key]

    def done(self, step: Step) -> None:
        """Forget what no later step wants."""
        with self.lock:
            for key in set(step.sources):
                self.wanted[key] -= 1
                if self.wanted[key] <= 0:
                    self.held.pop(key, None)
