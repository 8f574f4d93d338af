"""Filling tensors of accelerators straight from the files: what only moves runs of bytes is no tensor of the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from ..modeling.places import place_of
from ..planning.cutting import copies_bytes
from ..planning.steps import Program, Step
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.links import Link, empty_on, link_to
from ..storage.sending import BUFFER, Run, send
from ..storage.tensors import torch_dtype, torch_shape
from .copying import Move, moves_of
from .filling import Load, Progress, is_plain_memory
from .progress import ByteBar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["fill_accelerators", "made_on"]

_LONG_RUN = 64 << 10
"""Bytes of a run from which on a copy of its own is worth starting."""

Room = Callable[[str, TensorSpec], "tuple[Tensor, Link] | None"]


@dataclass
class _Cargo:
    """Tensors that are filled by one way, and the runs of files that fill them."""

    link: Link
    keys: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def carry(self, checkpoint: Checkpoint, progress: Progress, bar: ByteBar | None) -> None:
        """Bring all of it, and note each key when its tensor is whole."""
        begun: set[int] = set()

        def arrived(number: int) -> None:
            begun.remove(number)
            progress.written.append(self.keys[number])
            if bar is not None:
                bar(self.tensors[number].numel() * self.tensors[number].element_size())

        checkpoint.read_in_order({run.file for run in self.runs})
        try:
            read = checkpoint.read_file_into
            send(self.runs, self.tensors, read, self.link, begun=begun.add, arrived=arrived, size=BUFFER)
        finally:
            progress.torn += [self.keys[number] for number in sorted(begun)]


def fill_accelerators(steps: Sequence[Step], load: Load) -> list[Step]:
    """Fill those of a model's tensors that lie on accelerators and take runs of bytes; the steps that are left.

    Raises:
        CheckpointError: a read failed or the device did; nothing is on its way any more when it is raised.
    """
    devices = {tensor.device for tensor in chain(load.model.parameters(), load.model.buffers())}
    # devices of one kind go by one way, so that all of them share its buffers
    links = {kind: link_to(device) for kind, device in {device.type: device for device in devices}.items()}
    if not any(links.values()):
        return list(steps)

    def room(key: str, spec: TensorSpec) -> tuple[Tensor, Link] | None:
        tensor = place_of(load.model, key).tensor
        link = links[tensor.device.type]
        if link is None or tensor.is_inference() or not is_plain_memory(tensor, spec.shape, spec.dtype):
            return None
        return tensor, link

    cargoes, others = _loaded(steps, load.checkpoint, load.skipped, room)
    for cargo in cargoes:
        cargo.carry(load.checkpoint, load.progress, load.bar)
    return others


def made_on(
    device: torch.device,
    steps: Sequence[Step],
    checkpoint: Checkpoint,
    skipped: Collection[str] = (),
    bar: ByteBar | None = None,
) -> tuple[dict[str, Tensor], list[Step]]:
    """New tensors on an accelerator for what takes runs of bytes, filled, and the steps that are left.

    Raises:
        CheckpointError: a read failed or the device did, or it has no room.
    """
    link = link_to(device)
    if link is None:
        return {}, list(steps)

    def room(key: str, spec: TensorSpec) -> tuple[Tensor, Link]:
        return empty_on(device, torch_shape(spec, key), torch_dtype(spec.dtype, key)), link

    cargoes, others = _loaded(steps, checkpoint, skipped, room)
    for cargo in cargoes:
        cargo.carry(checkpoint, Progress(), bar)
    return {key: tensor for cargo in cargoes for key, tensor in zip(cargo.keys, cargo.tensors)}, others


def _loaded(
    steps: Iterable[Step], checkpoint: Checkpoint, skipped: Collection[str], room: Room
) -> tuple[list[_Cargo], list[Step]]:
    """What goes by each way, and the steps of which some target does not."""
    cargoes: dict[int, _Cargo] = {}
    others: list[Step] = []
    moves: dict[int, list[Move] | None] = {}
    for step in steps:
        if id(step.program) not in moves:
            moves[id(step.program)] = _byte_moves(step.program)
        known = moves[id(step.program)]
        if known is None or not _add(step, known, checkpoint, skipped, room, cargoes):
            others.append(step)
    return list(cargoes.values()), others


def _byte_moves(program: Program) -> list[Move] | None:
    """The runs of bytes that a program moves, where they are few and long, and make up all of its targets."""
    if not copies_bytes(program) or program.moves is None:
        return None
    moves = moves_of(program.moves, program.outputs)
    made: Counter[int] = Counter()
    for _, target, _, _, nbytes in moves:
        made[target] += nbytes
    sizes = [spec.nbytes for spec in program.outputs]
    short = len(moves) > len(sizes) and sum(sizes) < len(moves) * _LONG_RUN
    return None if short or [made[n] for n in range(len(sizes))] != sizes else moves


def _add(
    step: Step,
    moves: Sequence[Move],
    checkpoint: Checkpoint,
    skipped: Collection[str],
    room: Room,
    cargoes: dict[int, _Cargo],
) -> bool:
    """Put all targets of a step on their way; whether that can be done."""
    extents = [checkpoint.extent(key) for key in step.sources]
    wanted = {n: key for n, key in enumerate(step.targets) if key not in skipped}
    if any(lies is None for lies in extents):
        return False
    rooms = {n: room(key, step.program.outputs[n]) for n, key in wanted.items()}
    if not all(rooms.values()):
        return False
    numbers = {}
    for n, found in rooms.items():
        assert found is not None
        tensor, link = found
        cargo = cargoes.setdefault(id(link), _Cargo(link))
        numbers[n] = cargo, len(cargo.keys)
        cargo.keys.append(wanted[n])
        cargo.tensors.append(tensor)
    for source, target, start, at, nbytes in moves:
        lies = extents[source]
        if target in numbers and lies is not None:
            cargo, number = numbers[target]
            cargo.runs.append(Run(lies.file, lies.offset + start, nbytes, number, at))
    return True
