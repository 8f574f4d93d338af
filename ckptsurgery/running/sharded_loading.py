"""Putting a plan's result into a sharded model: each rank makes the boxes that it holds.

The plan was made for a plain twin of the model (`sharding/twins.py`). Work goes in rounds, so that a rank that fails
stops all of them with its error:

1. Each rank reads its boxes. Where several ranks hold the same box, one of them reads it.
2. Boxes that one rank read go to the others that hold them.
3. Steps that have to see whole tensors run on one rank each, which sends every rank its box.
4. What the twin was given (first values, what modules load in their own way) is cut to boxes: every rank draws the
   same numbers, from the seed and the key, on any mesh.

Ranks may hold parts of the keys, as stages of a pipeline do: the plan is that of all keys, and each rank fills its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from ..boxes import Box
from ..errors import CkptSurgeryError, Diagnostic, LoadError
from ..modeling.initialising import FirstValues, computed_buffers
from ..modeling.places import named_tensors
from ..planning.options import OWN, LoadOptions
from ..planning.plan import Plan
from ..planning.report import Report
from ..planning.steps import Step
from ..sharding.exchanges import Exchange
from ..sharding.peers import Peers, dealt
from ..sharding.shards import LocalShard, empty_shard, home_of, is_on_mesh, is_sharded, offloaded, shard_of
from ..sharding.twins import Twin
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.tensors import torch_dtype
from ..wording import counted
from .executor.chunking import by_elements, to_boxes
from .executor.programs import run_step
from .fingerprints import plan_digest
from .model_loading import non_finite, refuse_bad, report_of
from .progress import ByteBar
from .proving import prove
from .sinks.existing_tensors import ShardSink
from .sinks.new_tensors import fill
from .writing_together import share_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["load_shards"]


def load_shards(
    plan: Plan,
    checkpoint: Checkpoint,
    model: nn.Module,
    options: LoadOptions,
    *,
    extra_load: Callable[[], object] | None = None,
    extra_keys: Sequence[str] = (),
    twin: Twin,
    ranks: Peers,
) -> Report:
    """Carry a plan out on a sharded model; called by all ranks with equal arguments.

    Args:
        model: the twin's module.
        extra_load: further work on the twin, whose tensors are taken to the model.
        extra_keys: the keys that this work fills.
        twin: the plain twin of the sharded model.
        ranks: those that hold the model together.

    Raises:
        PlanError, LoadError, CheckpointError: the same on all ranks; what headers show before data is read.
    """
    prove(plan, checkpoint)
    own = twin.owners  # of a pipeline, this rank's stage; of any other model, all
    inits = {k: v for k, v in plan.inits.items() if v not in OWN and k in own}
    kept = [k for k, v in plan.inits.items() if v in OWN]
    skipped = {other for other, _ in plan.tie_proofs}
    loader = _Loader(twin, ranks, options.device)
    loader.refuse_empty(k for k in kept if k in own)
    made = [key for step in plan.steps for key in step.targets if key not in skipped]
    loader.hold(key for key in made if key in own)
    buffers = computed_buffers(model) if extra_load is None else {}
    values = FirstValues.of(model, inits, options.seed)
    seed = options.seed if plan.inits else None
    loader.meet((plan_digest(plan), seed, options.check_values, str(options.device), extra_load is None))
    if options.check_values:
        mine = share_of(plan.steps, ranks)
        bad = non_finite((k, t) for step in mine for k, t in zip(step.targets, run_step(step, checkpoint.load)))
        refuse_bad([line for found in ranks.shared(bad) for line in found])
    total = sum(shard.memory.numel() * shard.memory.element_size() for shard in loader.shards.values())
    with ByteBar(total, "loading", options.progress) as bar:
        loader.load(plan.steps, checkpoint, bar)
    if extra_load is not None:
        extra_load()
    rows = values.give(model)
    first = {row.name for row in rows if not row.by.startswith("tied to ")}
    loader.take(model, [*extra_keys, *first])
    loader.finish()
    loader.tie(plan)
    loader.take_buffers(computed_buffers(model) if extra_load is not None else buffers)
    told = ranks.shared((rows, type(model).__name__))
    drawn = [*{row.name: row for theirs, _ in told for row in theirs}.values()]
    written = sum(plan.specs[key].nbytes for key in made)
    report = ranks.tried(partial(report_of, plan, checkpoint, model, drawn, kept, skipped, written))
    return replace(report, target=told[0][1])


@dataclass
class _Loader:
    """The shards of a model, and the ranks that hold equal ones."""

    twin: Twin
    ranks: Peers
    device: torch.device | None
    shards: dict[str, LocalShard] = field(default_factory=dict)
    _new: dict[str, Tensor] = field(default_factory=dict)
    _boxes: list[dict[str, Box]] = field(default_factory=list)

    @cached_property
    def _home(self) -> torch.device:
        return home_of(self.twin.model)

    @cached_property
    def _offloaded(self) -> set[int]:
        return offloaded(self.twin.model)

    def refuse_empty(self, kept: Iterable[str]) -> None:
        """Check that what is left as constructed was constructed."""
        empty = [key for key in kept if self.twin.owners[key].tensor.is_meta]
        if empty:
            text = f"{counted(len(empty), 'key')} would be kept as built, and the model has them on the meta device"
            raise LoadError(Diagnostic("meta-kept", text, notes=tuple(empty[:12]), help="initialise them: init="))

    def hold(self, keys: Iterable[str]) -> None:
        """Find the part of each tensor that this rank holds, if any; what is on the meta device gets memory."""
        import torch

        for key in keys:
            tensor = self.twin.owners[key].tensor
            if tensor.is_meta:
                home = torch.device("cpu") if id(tensor) in self._offloaded else self._home
                tensor = self._new[key] = empty_shard(tensor, self.device or home)
            if is_on_mesh(tensor):
                self.shards[key] = shard_of(tensor, key)

    def meet(self, call: tuple[object, ...]) -> None:
        """Learn the boxes of all ranks, once they agree on the call.

        Args:
            call: what must be equal on all ranks.
        """
        self._boxes = self.ranks.agreed(call, {key: shard.box for key, shard in self.shards.items()})

    def load(self, steps: Sequence[Step], checkpoint: Checkpoint, moved: ByteBar) -> None:
        """Fill the shards that were found."""
        holders = dealt(self._boxes)
        mine = {key: shard for key, shard in self.shards.items() if holders[key, shard.box][0] == self.ranks.rank}
        whole = self._whole_steps(steps)
        left = {key for step in whole for key in step.targets}
        wanted = {key: shard.box for key, shard in mine.items() if key not in left and shard.box.numel}
        self.ranks.tried(lambda: _read(steps, checkpoint, wanted, mine, moved))
        copies = {(key, box): held for (key, box), held in holders.items() if box.numel and len(held) > 1}
        copies = {(key, box): held for (key, box), held in copies.items() if key not in left}
        if not copies and not whole:  # the same on all ranks, which save two rounds of messages
            return
        exchange = Exchange.begun(self.ranks, _broken_off)
        with self.ranks.in_step():
            for (key, _), ranks in copies.items():
                self._spread(key, ranks[0], ranks, exchange)
            exchange.check()
            self._make_whole(whole, checkpoint, exchange)

    def _whole_steps(self, steps: Sequence[Step]) -> list[Step]:
        """The steps that have to see whole tensors and of whose targets some rank holds a part, in one order."""
        held = set().union(*self._boxes)
        known: dict[int, bool] = {}
        found = []
        for step in steps:
            program = id(step.program)
            if program not in known:
                known[program] = by_elements(step.program) is None
            if known[program] and not held.isdisjoint(step.targets):
                found.append(step)
        return sorted(found, key=lambda step: step.targets)

    def _spread(self, key: str, reader: int, holders: Sequence[int], exchange: Exchange) -> None:
        """Send a box from the rank that has it to the others that hold it."""
        if self.ranks.rank == reader:
            exchange.send(self.shards[key].memory, holders)
        elif self.ranks.rank in holders:
            exchange.receive(self.shards[key].memory, reader)

    def _make_whole(self, steps: Sequence[Step], checkpoint: Checkpoint, exchange: Exchange) -> None:
        """Run steps on whole tensors, on one rank each, and send what they make."""
        load = [0] * self.ranks.size
        for step in steps:
            maker = load.index(min(load))
            load[maker] += sum(spec.nbytes for spec in (*step.program.inputs, *step.program.outputs))
            made: Sequence[Tensor | None] = [None] * len(step.targets)
            if maker == self.ranks.rank:
                made = exchange.attempt(partial(run_step, step, checkpoint.load)) or made
            for key, spec, whole in zip(step.targets, step.program.outputs, made):
                if any(key in boxes for boxes in self._boxes):
                    self._scatter(key, spec, whole, maker, exchange)
            exchange.check()

    def _scatter(self, key: str, spec: TensorSpec, whole: Tensor | None, maker: int, exchange: Exchange) -> None:
        """Send each rank its box of a tensor that one of them makes.

        Args:
            whole: on the rank that makes it, unless it failed.
        """
        import torch

        for rank, boxes in enumerate(self._boxes):
            box = boxes.get(key)
            if box is None or not box.numel:
                continue
            if self.ranks.rank == maker != rank:
                unmade = torch.empty(box.extent, dtype=torch_dtype(spec.dtype, key), device="meta")
                exchange.send(unmade if whole is None else _cut(whole, box), [rank])
            elif self.ranks.rank == rank != maker:
                exchange.receive(self.shards[key].memory, maker)
            elif self.ranks.rank == maker and whole is not None:
                exchange.attempt(partial(_copy, self.shards[key].memory, _cut(whole, box)))

    def take(self, model: nn.Module, keys: Sequence[str]) -> None:
        """Copy this rank's boxes of tensors that the twin was given whole."""
        whole = named_tensors(model)
        fresh = [key for key in keys if key in self.twin.owners]
        self.hold(key for key in fresh if key not in self.shards)
        for key in fresh:
            shard = self.shards.get(key)
            if shard is not None and shard.box.numel:
                _copy(shard.memory, _cut(whole[key].detach(), shard.box))

    def finish(self) -> None:
        """Register new tensors in the place of those on the meta device, under every name of each."""
        from ..modeling.assigning import parameter_like

        for key, tensor in self._new.items():
            old = self.twin.owners[key].tensor
            parameter = self.twin.owners[key].leaf in self.twin.owners[key].module._parameters
            new = parameter_like(old, tensor) if parameter else tensor
            for owner in self.twin.places(key):
                owner.put(new)
        self._new.clear()

    def tie(self, plan: Plan) -> None:
        """Make the names that the plan ties one tensor, where they are not."""
        for alias, base in plan.ties.items():
            if alias in self.twin.owners and base in self.twin.owners:
                held = self.twin.owners[base].tensor
                if self.twin.owners[alias].tensor is not held:
                    self.twin.owners[alias].put(held)

    def take_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Give the model the buffers that no file holds and that it had on the meta device."""
        for name, tensor in buffers.items():
            if name in self.twin.owners:
                self.twin.owners[name].put(self._like(self.twin.owners[name].tensor, tensor, name))
        left = [name for name, owner in self.twin.owners.items() if owner.tensor.is_meta]
        if left:
            text = f"{counted(len(left), 'model tensor', 'is')} still on the meta device"
            raise LoadError(Diagnostic("meta-left", text, notes=tuple(left[:12]), help="load or initialise them"))

    def _like(self, old: Tensor, whole: Tensor, name: str) -> Tensor:
        """A whole tensor where the model is, distributed as another one."""
        home = self.device or self._home
        if not is_sharded(old):
            return whole.to(home)
        made = empty_shard(old, home)
        if is_on_mesh(made):
            shard = shard_of(made, name)
            _copy(shard.memory, _cut(whole, shard.box))
        return made


def _cut(whole: Tensor, box: Box) -> Tensor:
    return whole[tuple(slice(low, low + n) for low, n in zip(box.low, box.extent))]


def _copy(target: Tensor, values: Tensor) -> None:
    import torch

    with torch.no_grad():
        target.copy_(values)


def _read(
    steps: Sequence[Step],
    checkpoint: Checkpoint,
    wanted: Mapping[str, Box],
    shards: Mapping[str, LocalShard],
    moved: ByteBar,
) -> None:
    """Fill shards from the source."""
    part = to_boxes(steps, checkpoint, wanted)
    try:
        fill(ShardSink(part.steps, shards), part.steps, part.checkpoint, moved)
    except Exception as error:
        raise _broken_off(error) from error


def _broken_off(error: Exception) -> LoadError:
    """The error of a load that has written some tensors."""
    about = str(error) or type(error).__name__
    first = error.diagnostics if isinstance(error, CkptSurgeryError) else (Diagnostic("read-failed", about),)
    half = Diagnostic(
        "half-loaded", "the load broke off on a rank: the model holds old and new values", help="load again"
    )
    return LoadError([*first, half])
