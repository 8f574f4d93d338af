"""A storage writer for `torch.distributed.checkpoint.save`: what a recipe makes of the state dict, as safetensors.

The coordinator plans from the shapes that all ranks announce, and creates the files under temporary names. Each rank
writes what its own parts become, at their offsets, so that no rank holds a whole tensor. When all are done, the
coordinator gives the files their names.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..boxes import Box, covers_once
from ..catalog import RecipeLike
from ..errors import CheckpointError, Diagnostic, PlanError
from ..language.dims import DimValue
from ..language.recipe import Recipe
from ..planning.box_layouts import between
from ..planning.layout import Piece
from ..planning.plan import Plan
from ..planning.steps import Step
from ..running.executor.chunking import by_elements
from ..running.runner import plan as plan_of
from ..specs import DTYPES, TensorSpec
from ..storage.contents import Extent
from ..storage.output.following import Follower, Outline
from ..storage.output.staging import Writer
from ..storage.output.writing import WriterOptions, open_writer
from ..storage.tensors import dense_bytes
from ..wording import counted, shown_keys

__all__ = ["StorageWriter"]


@dataclass(frozen=True)
class _Work:
    """The coordinator's instructions for one rank.

    Args:
        specs: key -> spec of the tensors that all ranks hold together.
        outline: the files to write into.
    """

    specs: Mapping[str, TensorSpec]
    outline: Outline


class StorageWriter(storage.StorageWriter):
    """Write what a recipe makes of a state dict as plain safetensors, under an unchanged `dcp.save`.

    >>> import tempfile, warnings, torch, torch.distributed.checkpoint as dcp, ckptsurgery as cs
    >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     writer = cs.StorageWriter(folder + "/out.safetensors", "{p:q,k,v} [o i] -> qkv [(p o) i]")
    ...     saved = dcp.save({p: torch.ones(2, 3) for p in "qkv"}, storage_writer=writer, no_dist=True)
    ...     cs.open(folder + "/out.safetensors")["qkv"].spec
    TensorSpec(shape=(6, 3), dtype='F32')

    Args:
        path: `x.safetensors`, or a folder; None where `dcp.save` gets it as its `checkpoint_id`.
        recipe: a `Recipe`, its name or path, or rules; without one, names stay as they are.
        max_shard_size: bytes, or "5GB", "5GiB"; for folders.
        overwrite: replace what is there.
        config: what `config.` means in dims.
        dims: sizes that go before the recipe's own.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        recipe: RecipeLike | None = None,
        *,
        max_shard_size: int | str | None = None,
        overwrite: bool = False,
        config: Mapping[str, Any] | None = None,
        dims: Mapping[str, DimValue] | None = None,
    ) -> None:
        self._path = path
        self._recipe = recipe if recipe is not None else Recipe(rest="keep")
        self._max_shard_size, self._overwrite = max_shard_size, overwrite
        self._config, self._dims = config, dims
        self._writer: Writer | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another checkpoint, at the path that `dcp.save` names."""
        self._abandon()
        if checkpoint_id is not None:
            self._path = checkpoint_id

    def _abandon(self) -> None:
        """Remove what an earlier save that failed has left."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: files are created when the shapes are known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Plan from the shapes that all ranks announce, and create the files.

        Raises:
            CheckpointError: the output exists, the ranks' parts leave something out, or values are not tensors.
            PlanError: the recipe does not fit, or has an op that needs whole tensors.
        """
        specs = _announced(plans)
        plan = self._planned(specs)
        path = self._path
        if path is None:
            help = "cs.StorageWriter(path, recipe), or dcp.save(…, checkpoint_id=path)"
            raise CheckpointError(Diagnostic("no-output", "the storage writer has no path", help=help))
        self._abandon()
        wanted = WriterOptions(
            aliases={alias: base for alias, base in plan.ties.items() if base in plan.specs},
            metadata={"format": "pt"},
            max_shard_size=self._max_shard_size,
            overwrite=self._overwrite,
        )
        writer = open_writer(path, plan.specs, wanted)
        writer.__enter__()
        self._writer = writer
        weakref.finalize(self, writer.abort)  # a save that fails on another rank never comes back here
        work = _Work(specs, Outline.of(writer))
        return [replace(one, storage_data=work) for one in _once(plans)]

    def _planned(self, specs: Mapping[str, TensorSpec]) -> Plan:
        """The plan over what the ranks hold together, of which each can do its part."""
        plan = plan_of(dict(specs), self._recipe, config=self._config, dims=self._dims)
        refused = [str(key) for key in plan.inits] + [b for _, b in (*plan.proofs, *plan.tie_proofs)]
        refused += [key for step in plan.steps if by_elements(step.program) is None for key in step.targets]
        if refused:
            text = f"{counted(len(refused), 'tensor', 'needs')} more than one rank has of its sources"
            help = "save without this part of the recipe, and convert afterwards: cs.plan(path, recipe).save(other)"
            raise PlanError(Diagnostic("not-by-ranks", text, notes=shown_keys(refused), help=help))
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what this rank's parts become."""
        work: _Work = plan.storage_data
        written = dict.fromkeys((item.index for item in plan.items), 0)
        with Follower(work.outline) as follower:
            for step, held in _shares(self._planned(work.specs).steps, plan.items):
                for item, nbytes in _write(step, held, planner, follower, work.outline.places):
                    written[item.index] += nbytes
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, nbytes, None) for index, nbytes in written.items()])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rename the finished files from their temporary names."""
        if self._writer is not None:
            self._writer.skip(sum(one.size_in_bytes for found in results for one in found))
            self._writer.commit()
            self._writer = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether a name is that of a place on this machine."""
        return "://" not in os.fspath(checkpoint_id) and Path(checkpoint_id).name != ""


def _announced(plans: Sequence[SavePlan]) -> dict[str, TensorSpec]:
    """The tensors that all ranks hold together.

    Raises:
        CheckpointError: values that are not tensors, or parts that leave something out.
    """
    specs: dict[str, TensorSpec] = {}
    boxes: dict[str, dict[Box, None]] = {}
    others = [item.index.fqn for plan in plans for item in plan.items if item.type is WriteItemType.BYTE_IO]
    if others:
        text = f"{counted(len(others), 'value', 'is')} not a tensor, and safetensors files hold nothing else"
        help = "save the model's state dict with this writer, and the rest with another"
        raise CheckpointError(Diagnostic("not-a-tensor", text, notes=shown_keys(others), help=help))
    for item in (item for plan in plans for item in plan.items):
        about = item.tensor_data
        if about is not None:
            specs[item.index.fqn] = TensorSpec(tuple(about.size), about.properties.dtype)
            boxes.setdefault(item.index.fqn, {})[_box(item)] = None
    torn = [key for key, spec in specs.items() if not covers_once(spec.shape, [b for b in boxes[key] if b.numel])]
    if torn:
        text = f"the ranks hold {torn[0]!r} in parts that overlap, or leave some of it out"
        help = "save on all ranks of the mesh"
        raise CheckpointError(Diagnostic("bad-shards", text, torn[0], notes=shown_keys(torn[1:]), help=help))
    return specs


def _box(item: WriteItem) -> Box:
    about = item.tensor_data
    return Box(tuple(about.chunk.offsets), tuple(about.chunk.sizes)) if about is not None else Box((), ())


def _once(plans: Sequence[SavePlan]) -> Iterator[SavePlan]:
    """The plans without parts that an earlier rank writes already."""
    seen: set[tuple[str, Box]] = set()
    for plan in plans:
        kept = []
        for item in plan.items:
            part = item.index.fqn, _box(item)
            if part not in seen:
                seen.add(part)
                kept.append(item)
        yield replace(plan, items=kept)


def _shares(steps: Sequence[Step], items: Sequence[WriteItem]) -> Iterator[tuple[Step, list[list[WriteItem]]]]:
    """Steps of which this rank has sources, and for each source the parts of it."""
    held: dict[str, list[WriteItem]] = {}
    for item in items:
        if _box(item).numel:
            held.setdefault(item.index.fqn, []).append(item)
    for step in steps:
        found = [held.get(key, []) for key in step.sources]
        if any(found):
            yield step, found


def _write(
    step: Step, held: Sequence[Sequence[WriteItem]], planner: SavePlanner, writer: Writer, places: Mapping[str, Extent]
) -> Iterator[tuple[WriteItem, int]]:
    """Write what the parts of a step's sources become; yield each part with the bytes written for it."""
    found = by_elements(step.program)
    if found is None:
        return
    layout, chains = found
    wholes = [[Box.whole(spec.shape)] for spec in step.program.outputs]
    items = [item for some in held for item in some]
    pieces: dict[int, list[Piece]] = {}
    for piece in between(layout, [[_box(item) for item in some] for some in held], wholes).pieces:
        pieces.setdefault(piece.source, []).append(piece)
    with torch.no_grad():
        for number, some in pieces.items():
            part = planner.resolve_data(items[number])
            if not isinstance(part, torch.Tensor):
                continue
            tensor = part.detach().to("cpu").contiguous()
            for piece in some:
                values = tensor.as_strided(
                    piece.shape, piece.source_strides, tensor.storage_offset() + piece.source_offset
                )
                for op in chains[piece.target]:
                    (values,) = op.run((values.contiguous(),))
                key = step.targets[piece.target]
                spec = step.program.outputs[piece.target]
                data = dense_bytes(values, key)
                for start, offset, nbytes in _runs(piece, DTYPES[spec.dtype].itemsize):
                    writer.write(places[key].file, places[key].offset + offset, data[start : start + nbytes])
                yield items[number], len(data)


def _runs(piece: Piece, itemsize: int) -> Iterator[tuple[int, int, int]]:
    """(offset in a dense copy of the piece, offset in the target, length) of each run of bytes of the target."""
    run, inner = 1, len(piece.shape)
    while inner and piece.target_strides[inner - 1] == run:
        inner -= 1
        run *= piece.shape[inner]
    for number, index in enumerate(product(*map(range, piece.shape[:inner]))):
        offset = piece.target_offset + sum(i * step for i, step in zip(index, piece.target_strides))
        yield number * run * itemsize, offset * itemsize, run * itemsize
