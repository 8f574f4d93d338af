"""Saving what several ranks hold together: each writes its boxes at their offsets, and none gathers a tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..boxes import Box, covers_once
from ..errors import CheckpointError, Diagnostic
from ..planning.box_layouts import between
from ..planning.layout import Layout
from ..planning.plan import Plan
from ..planning.report import Report
from ..planning.sharing import output_aliases
from ..sharding.peers import Peers, dealt
from ..sharding.pipeline_stages import tie_groups
from ..sharding.shards import LocalShard, is_on_mesh, mesh_of, shard_of
from ..sharding.stand_ins import StandIns
from ..specs import TensorSpec
from ..storage.checkpoint import Checkpoint
from ..storage.memory import read_mapping
from ..storage.output.staging import Writer
from ..storage.output.writing import WriterOptions, holds_extras, open_writer
from ..storage.tensors import torch_dtype
from ..wording import counted, shown_keys
from .executor.copying import moves_of
from .progress import ByteBar
from .saving import ledger
from .writing_together import write_together

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Shards", "save_shards"]


class _SavedPart(NamedTuple):
    """A rank's part of a tensor.

    Args:
        spec: of the whole.
        first: the first key of the same tensor.
        box: which part; None where the rank is not in the tensor's mesh.
        mesh: the ranks that hold the tensor together.
    """

    spec: TensorSpec
    first: str
    box: Box | None
    mesh: tuple[int, ...]


@dataclass(frozen=True)
class Shards:
    """What this rank holds of a state dict, and the whole as a checkpoint of shapes.

    Args:
        checkpoint: every tensor by its key, on the meta device.
        tensors: key -> the tensor itself.
        state: what is saved, as a state dict or a tree of them.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]
    state: Any = None

    @classmethod
    def of(cls, source: Any) -> Shards:
        """The shards of a model or a state dict."""
        stand_ins = StandIns(source)
        contents = read_mapping(stand_ins.tree)
        tensors = {key: stand_ins.original(entry.tensor) for key, entry in contents.entries.items()}
        state = source.state_dict() if hasattr(source, "named_parameters") else source
        return cls(Checkpoint(contents, type(source).__name__), tensors, state)

    def held(self) -> dict[str, LocalShard]:
        """The parts that this rank holds, by key."""
        return {key: shard_of(tensor, key) for key, tensor in self.tensors.items() if is_on_mesh(tensor)}

    def joined(self, ranks: Peers, stages: bool) -> Shards:
        """Return the shards with the keys of all ranks, which hold different ones as stages of a pipeline.

        Args:
            stages: whether the ranks hold parts by keys, where no key shows it.

        Raises:
            CheckpointError: a key means tensors of another shape, dtype or other values on another rank.
        """
        held, first = self.held(), {name: tie.names[0] for tie in self.checkpoint.ties for name in tie.names}
        told = ranks.shared({
            key: _SavedPart(spec, first.get(key, key), held[key].box if key in held else None,
                       mesh_of(self.tensors[key], ranks.rank))
            for key, spec in self.checkpoint.specs.items()
        })  # fmt: skip
        known: dict[str, _SavedPart] = {}
        for rank, parts in enumerate(told):
            for key, part in parts.items():
                if known.setdefault(key, part).spec != part.spec:
                    raise _differ(f"{key!r} is {part.spec} on rank {rank}, and {known[key].spec} on another")
        alike = all(parts.keys() == known.keys() for parts in told)
        if not alike or stages:
            _refuse_other_values(told, held, ranks)
        return (
            self if alike else self._with(known, tie_groups((k, p.first) for parts in told for k, p in parts.items()))
        )

    def _with(self, known: Mapping[str, _SavedPart], groups: Mapping[str, str]) -> Shards:
        """The same with all keys; those of a group are one tensor."""
        import torch

        made = {
            root: torch.empty(known[root].spec.shape, dtype=torch_dtype(known[root].spec.dtype, root), device="meta")
            for root in dict.fromkeys(groups.values())
        }
        contents = read_mapping({key: made[groups[key]] for key in known})
        return replace(self, checkpoint=Checkpoint(contents, self.checkpoint.source))

    def save_as_dcp(self, plan: Plan, path: str | os.PathLike[str], ranks: Peers, format: str, others: bool) -> Report:
        """Save as a distributed checkpoint; called by all ranks.

        Args:
            others: whether options were given that this format does not have.
        """
        from .dcp_saving import save_shards_as_dcp

        if format != "dcp" or others:
            text = f"format={format!r} is written without overwrite and max_shard_size" if others else f"no {format!r}"
            raise CheckpointError(Diagnostic("not-by-ranks", text, str(path), help='format="dcp" and a new folder'))
        files = save_shards_as_dcp(self.state, path, ranks)
        nbytes = sum(spec.nbytes for spec in plan.specs.values())
        entries = ledger(plan, {}, lambda rule: plan.uses[rule].text)
        notes = (f"written by {counted(ranks.size, 'rank')}",)
        return Report(
            entries, self.checkpoint.source, str(path), notes, plan.warnings, files, bytes_read=0, bytes_written=nbytes
        )


def save_shards(
    plan: Plan,
    shards: Shards,
    path: str | os.PathLike[str],
    ranks: Peers,
    *,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
    sync: bool = True,
    progress: bool | None = None,
) -> Report:
    """Write what the ranks hold together as a plain checkpoint; called by all of them.

    Args:
        plan: copies every tensor under its key.
        path: `x.safetensors`, or a folder.

    Raises:
        CheckpointError: the same on all ranks: the output exists or cannot be written, or the ranks together do not
            hold each element of each tensor.
    """
    checkpoint = shards.checkpoint
    aliases = output_aliases(plan, checkpoint)
    specs = {key: spec for key, spec in plan.specs.items() if key not in aliases}
    if holds_extras(path):
        text = "several ranks write safetensors, and a torch file was named"
        raise CheckpointError(Diagnostic("not-by-ranks", text, str(path), help="name x.safetensors, or a folder"))
    held = {key: shard for key, shard in shards.held().items() if key in specs}
    boxes = ranks.gathered({key: shard.box for key, shard in held.items()})
    _refuse_holes(specs, boxes)
    mine = {key for (key, _), holders in dealt(boxes).items() if holders[0] == ranks.rank}

    def make() -> Writer:
        wanted = WriterOptions(
            aliases, checkpoint.metadata, max_shard_size=max_shard_size, overwrite=overwrite, sync=sync
        )
        return open_writer(path, specs, wanted)

    def work(writer: Writer) -> int:
        with ByteBar(sum(_nbytes(held[key]) for key in mine), f"writing {path}", progress) as bar:
            for key in specs:
                if key in mine and held[key].box.numel:
                    _write(key, held[key], specs[key], writer, bar)
            return bar.done

    files, written = write_together(make, ranks, work)
    extras = [key for key in checkpoint.extras if key != "_metadata"]
    left = (f"left out, as the format cannot hold it: {', '.join(extras)}",) if extras else ()
    return Report(
        ledger(plan, aliases, lambda rule: plan.uses[rule].text),
        source=checkpoint.source,
        target=str(path),
        notes=(f"written by {counted(ranks.size, 'rank')}", *left),
        warnings=plan.warnings,
        files=files,
        bytes_read=0,
        bytes_written=written,
    )


def _refuse_other_values(told: list[Mapping[str, _SavedPart]], held: Mapping[str, LocalShard], ranks: Peers) -> None:
    """Check that keys which ranks hold apart from each other mean equal values: numbers of layers may repeat."""
    meshes: dict[str, set[tuple[int, ...]]] = {}
    for parts in told:
        for key, part in parts.items():
            meshes.setdefault(key, set()).add(part.mesh)
    apart = [key for key, found in meshes.items() if len(found) > 1]
    mine = {key: (held[key].box, _digest(key, held[key])) for key in apart if key in held}
    seen: dict[tuple[str, Box], bytes] = {}
    other = [
        key for sums in ranks.shared(mine) for key, (box, digest) in sums.items()
        if seen.setdefault((key, box), digest) != digest
    ]  # fmt: skip
    if other:
        names = [*dict.fromkeys(other)]
        raise _differ(f"{counted(len(names), 'key', 'means')} other values on another rank", shown_keys(names))


def _differ(text: str, notes: Sequence[str] = ()) -> CheckpointError:
    help = "number the layers of all stages through, or save each rank in a folder of its own"
    return CheckpointError(Diagnostic("stages-differ", text, notes=tuple(notes), help=help))


def _digest(key: str, shard: LocalShard) -> bytes:
    from ..storage.tensors import dense_bytes

    return hashlib.sha256(dense_bytes(shard.memory, key)).digest()


def _refuse_holes(specs: Mapping[str, TensorSpec], boxes: list[Mapping[str, Box]]) -> None:
    """Check that the ranks together hold each element of each tensor, once but for copies."""
    torn = []
    for key, spec in specs.items():
        found = {held[key] for held in boxes if key in held}
        if not covers_once(spec.shape, [box for box in found if box.numel]):
            torn.append(key)
    if torn:
        text = f"the ranks hold {torn[0]!r} in parts that overlap, or leave some of it out"
        raise CheckpointError(Diagnostic("bad-shards", text, torn[0], notes=shown_keys(torn[1:])))


def _nbytes(shard: LocalShard) -> int:
    return shard.memory.numel() * shard.memory.element_size()


def _write(key: str, shard: LocalShard, spec: TensorSpec, writer: Writer, moved: Callable[[int], object]) -> None:
    """Write a box at its offsets in the whole tensor."""
    from ..storage.tensors import dense_bytes

    place = writer.places[key]
    data = dense_bytes(shard.memory, key)
    layout = between(Layout.identity([spec.shape]), [[shard.box]], [[Box.whole(spec.shape)]])
    for _, _, start, offset, nbytes in moves_of(layout, (spec,)):
        writer.write(place.file, place.offset + offset, data[start : start + nbytes])
        moved(nbytes)
