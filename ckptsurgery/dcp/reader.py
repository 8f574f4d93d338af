"""A storage reader for `torch.distributed.checkpoint.load`: the keys it offers are those that a recipe makes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ..boxes import Box
from ..catalog import RecipeLike
from ..errors import CheckpointError, Diagnostic, LoadError, PlanError, Remedy
from ..language.dims import DimValue
from ..language.recipe import Recipe
from ..planning.drawing import with_draws
from ..planning.plan import Plan
from ..running.executor.chunking import to_boxes
from ..running.executor.programs import run_step
from ..running.proving import prove
from ..running.runner import plan as plan_of
from ..running.sinks.existing_tensors import ShardSink
from ..running.sinks.new_tensors import fill
from ..sharding.shards import LocalShard
from ..specs import TensorSpec, dtype_name, is_lossless
from ..storage.tensors import torch_dtype
from ..wording import counted, shown_keys

__all__ = ["StorageReader"]


class _Read(NamedTuple):
    """One request of the planner: which part of which tensor, and where it goes."""

    item: ReadItem
    key: str
    box: Box
    memory: torch.Tensor


class StorageReader(storage.StorageReader):
    """Read a checkpoint of any kind, changed by a recipe, under an unchanged `dcp.load`.

    >>> import warnings, torch, torch.distributed.checkpoint as dcp, ckptsurgery as cs
    >>> reader = cs.StorageReader({"h.0.w": torch.ones(3, 2)}, "h.{i}.w [o i_] -> layers.{i}.weight [i_ o]")
    >>> state = {"layers.0.weight": torch.zeros(2, 3)}
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     dcp.load(state, storage_reader=reader, no_dist=True)
    >>> state["layers.0.weight"].sum()
    tensor(6.)

    Each rank reads the parts that it asks for. What has to see whole tensors is computed on every rank that asks.

    Args:
        source: whatever `open` takes; None where `dcp.load` gets it as its `checkpoint_id`.
        recipe: a `Recipe`, its name or path, or rules; without one, names stay as they are.
        subtree: where in a training checkpoint the tensors are.
        config: what `config.` means in dims; the source's own by default.
        dims: sizes that go before the recipe's own.
        dtype: what a difference between dtypes means: "lossless" casts where no bit is lost, "model" always, "error"
            never.
        partial: whether tensors that no rank asks for are left out without an error.

    Raises:
        CheckpointError, RecipeError, PlanError: the source or the recipe has a problem, before `dcp.load` is called.
    """

    def __init__(
        self,
        source: Any = None,
        recipe: RecipeLike | None = None,
        *,
        subtree: str | None = None,
        config: Mapping[str, Any] | None = None,
        dims: Mapping[str, DimValue] | None = None,
        dtype: str = "lossless",
        partial: bool = False,
    ) -> None:
        if dtype not in ("lossless", "model", "error"):
            text = f"dtype={dtype!r} is not a policy of this reader"
            raise PlanError(Diagnostic("bad-argument", text, help='one of "lossless", "model", "error"'))
        self._recipe = recipe if recipe is not None else Recipe(rest="keep")
        self._subtree, self._config, self._dims = subtree, config, dims
        self._dtype, self._partial = dtype, partial
        self._plan: Plan | None = None
        if source is not None:
            self._open(source)

    def _open(self, source: Any) -> None:
        plan = plan_of(
            source, self._recipe, config=self._config, dims=self._dims, subtree=self._subtree, dtype="source"
        )
        self._plan = with_draws(plan, plan.options.seed)

    @property
    def plan(self) -> Plan:
        """What the recipe makes of the source.

        Raises:
            CheckpointError: the reader has no source yet.
        """
        if self._plan is None:
            help = "cs.StorageReader(source, recipe), or dcp.load(…, checkpoint_id=source)"
            raise CheckpointError(Diagnostic("no-source", "the storage reader has no source", help=help))
        return self._plan

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Open another source, where `dcp.load` names one."""
        if checkpoint_id is not None:
            self._open(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the tensors that the recipe makes, tied names included, each as one chunk."""
        specs = dict(self.plan.specs)
        specs |= {alias: specs[base] for alias, base in self.plan.ties.items() if base in specs}
        described: dict[str, Any] = {key: _described(key, spec) for key, spec in specs.items()}
        return Metadata(described, planner_data={}, storage_data={}, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the plan was made when the source was opened."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Check that the ranks together ask for each tensor that the recipe makes.

        Raises:
            LoadError: tensors that no rank asks for.
        """
        wanted = {self._made(item) for plan in plans for item in plan.items}
        left = [key for key, spec in self.plan.specs.items() if key not in wanted and spec.numel]
        if left and not self._partial:
            text = f"{counted(len(left), 'tensor', 'is')} made by the recipe, and no rank asks for it"
            raise LoadError(
                Diagnostic(
                    "unexpected-keys",
                    text,
                    notes=shown_keys(left, 12),
                    remedies=(Remedy("partial", True, "leaves them out"),),
                    advice="or drop them in the recipe",
                )
            )
        return plans

    def _made(self, item: ReadItem) -> str:
        """The tensor of the plan that a request means."""
        name = item.storage_index.fqn
        return self.plan.ties.get(name, name)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank asks for; the casts are checked before anything is read.

        Raises:
            LoadError: a tensor that the checkpoint has in a dtype which the model's cannot hold.
        """
        reads = [self._read(item, planner) for item in plan.items]
        self._refuse_casts(reads)
        prove(self.plan, self.plan.checkpoint)
        with torch.no_grad():
            for reads_of_one_pass in _passes(reads):
                self._fill(reads_of_one_pass)
        for read in reads:
            planner.commit_tensor(read.item, read.memory)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: LoadPlanner) -> _Read:
        box = Box(tuple(item.storage_offsets), tuple(item.lengths))
        return _Read(item, self._made(item), box, planner.resolve_tensor(item).detach())

    def _refuse_casts(self, reads: Sequence[_Read]) -> None:
        wrong = {}
        for read in reads:
            old, new = self.plan.specs[read.key].dtype, dtype_name(read.memory.dtype)
            allowed = self._dtype == "model" or old == new or (self._dtype == "lossless" and is_lossless(old, new))
            if not allowed:
                wrong[read.key] = f"{read.key}  {old} -> {new}"
        if wrong:
            text = f"{counted(len(wrong), 'tensor')} would be cast to a dtype that cannot hold every value"
            if self._dtype == "error":
                text = f"{counted(len(wrong), 'tensor')} would be cast"
            remedy = Remedy("dtype", "model", "casts all the same")
            raise LoadError(Diagnostic("dtype-mismatch", text, notes=tuple(wrong.values())[:12], remedies=(remedy,)))

    def _fill(self, reads: Mapping[str, _Read]) -> None:
        """Read one part of each of some tensors."""
        checkpoint = self.plan.checkpoint
        shards = {key: LocalShard(read.box, read.memory) for key, read in reads.items()}
        part = to_boxes(self.plan.steps, checkpoint, {key: shard.box for key, shard in shards.items()})
        fill(ShardSink(part.steps, shards), part.steps, part.checkpoint, lambda nbytes: None)
        for step in part.whole:
            for key, made in zip(step.targets, run_step(step, checkpoint.load)):
                if key in shards:
                    box = shards[key].box
                    index = tuple(slice(low, low + n) for low, n in zip(box.low, box.extent))
                    shards[key].memory.copy_(made[index])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether a name is that of a file, a folder or an address."""
        return "://" in os.fspath(checkpoint_id) or Path(checkpoint_id).exists()


def _passes(reads: Iterable[_Read]) -> Iterable[dict[str, _Read]]:
    """The requests in passes that ask for each tensor once; equal memory is filled once."""
    passes: list[dict[str, _Read]] = []
    seen: set[tuple[object, ...]] = set()
    times: dict[str, int] = {}
    for read in reads:
        memory = read.memory
        place = read.key, read.box, memory.data_ptr(), tuple(memory.shape), memory.stride(), memory.dtype
        if not read.box.numel or place in seen:
            continue
        seen.add(place)
        number = times[read.key] = times.get(read.key, -1) + 1
        if number == len(passes):
            passes.append({})
        passes[number][read.key] = read
    return passes


def _described(key: str, spec: TensorSpec) -> TensorStorageMetadata:
    size = torch.Size(spec.shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(dtype=torch_dtype(spec.dtype, key)), size, [chunk])
