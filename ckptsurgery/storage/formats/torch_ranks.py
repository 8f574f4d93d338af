"""State dicts that each rank saved by `torch.save`, with its part of every sharded tensor.

The files have the rank in their names (`model_world_size_2_rank_0.pt`). A `DTensor` in them records its mesh, its
placements and the rank's coordinate, and a `ShardedTensor` where each part begins. Nothing of them is executed. It was
tried on files of torch 2.13 alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...boxes import Box, covers_once
from ...errors import CheckpointError, Diagnostic
from ...specs import TensorSpec, dtype_name
from ...wording import shown_keys
from ..chunked_tensors import Chunk, Chunked
from ..contents import Contents, Entry
from ..unpickling.inert import Opaque, Ordered, Storage, Tensor
from ..unpickling.nesting import Located, find_model, settle
from .storages import place_all, place_tensor
from .torch_zip import TorchTree, read_torch_tree

__all__ = ["read_torch_ranks", "series_by_rank"]

_RANKED = re.compile(r"(?P<before>.*?)(?:^|[_.-])rank[_-]?(?P<rank>\d+)(?P<suffix>\.(?:pt|pth|bin|ckpt))")
_ASIDE = re.compile(r"(?:optim|extra|rng|random|sched|data)", re.IGNORECASE)
_SAVED = "open it where it was saved, and save it by torch.distributed.checkpoint or after full_tensor()"
_SHARDED = ("DTensor", "ShardedTensor")
_DEPTH = 32


def series_by_rank(names: Iterable[str]) -> dict[int, str]:
    """The files of one series that differ in the rank alone, by rank; none where there are several series or a gap.

    >>> series_by_rank(["m_rank_1.pt", "m_rank_0.pt", "optim_rank_0.pt", "config.json"])
    {0: 'm_rank_0.pt', 1: 'm_rank_1.pt'}
    """
    found: dict[str, dict[int, str]] = {}
    for match in filter(None, map(_RANKED.fullmatch, names)):
        if not _ASIDE.match(match["before"]):
            found.setdefault(match["before"], {})[int(match["rank"])] = match[0]
    if len(found) != 1:
        return {}
    (series,) = found.values()
    return {rank: series[rank] for rank in sorted(series)}


class _Part(NamedTuple):
    """One rank's part of a tensor.

    Args:
        spec: of the whole.
        chunks: the parts; None for a tensor that is not sharded.
        entry: where a tensor lies that is not sharded.
    """

    spec: TensorSpec
    chunks: tuple[Chunk, ...] | None
    entry: Entry | None = None


def read_torch_ranks(folder: str, files: Mapping[int, str], subtree: str | None = None) -> Contents | None:
    """What the ranks saved together; None where the first of them saved nothing sharded.

    Raises:
        CheckpointError: a rank's file is missing, parts overlap or leave something out, or a placement is not covered.
    """
    first = _RankFile(folder, files[min(files)])
    if not first.shards:
        return None
    missing = sorted(set(range(max(files) + 1)) - files.keys())
    if missing:
        text = f"{folder!r} holds no file of rank {missing[0]}"
        raise CheckpointError(Diagnostic("missing-shard", text, folder, help="copy the missing file too"))
    readers = [first, *(_RankFile(folder, name) for rank, name in files.items() if rank != min(files))]
    located = [reader.located(subtree) for reader in readers]
    joined = Contents({}, extras=first.extras(located[0].extras), frame=located[0].frame)
    parts: dict[str, list[_Part]] = {}
    for reader, found in zip(readers, located):
        joined.sources[reader.path] = reader.tree.source
        for key, leaf in found.leaves.items():
            parts.setdefault(key, []).append(reader.part(leaf))
    joined.entries = dict(_joined(parts, folder))
    return joined


def _joined(parts: Mapping[str, list[_Part]], folder: str) -> Iterator[tuple[str, Entry]]:
    """The entry of each tensor, of the parts of all ranks."""
    torn: list[str] = []
    for key, some in parts.items():
        spec = some[0].spec
        chunks = {chunk.low: chunk for part in some for chunk in part.chunks or () if chunk.box.numel}
        if any(part.spec != spec or (part.chunks is None) != (some[0].chunks is None) for part in some):
            torn.append(key)
        elif some[0].entry is not None:
            yield key, some[0].entry
        elif not covers_once(spec.shape, [chunk.box for chunk in chunks.values()]):
            torn.append(key)
        else:
            yield key, Entry(spec, tensor=Chunked(spec, tuple(chunks.values())))
    if torn:
        text = f"the parts of {torn[0]!r} in {folder!r} overlap, or leave some of it out"
        help = "copy the files of all ranks of one save"
        raise CheckpointError(Diagnostic("bad-chunks", text, folder, notes=shown_keys(torn[1:]), help=help))


class _RankFile:
    """One rank's file; a record of a plain tensor stands for each sharded one while the model is looked for."""

    def __init__(self, folder: str, name: str) -> None:
        self.path = str(Path(folder, name))
        self.tree: TorchTree = read_torch_tree(self.path)
        self.shards: list[_Part] = []
        self._problems: list[Diagnostic] = []
        self._plain = self._without_shards(self.tree.value, "", 0)
        if self._problems:
            raise CheckpointError(self._problems)

    def _without_shards(self, value: Any, key: str, depth: int) -> Any:
        if depth > _DEPTH:
            return value
        if type(value) is Opaque and value.name == "_rebuild_from_type_v2" and len(value.args or ()) == 3:
            made, state, kind = value.args
            return self._shard(made, state, kind, key) if kind in _SHARDED else value
        if isinstance(value, dict):
            copy: dict[Any, Any] = Ordered() if isinstance(value, Ordered) else {}
            copy.update((name, self._without_shards(part, str(name), depth + 1)) for name, part in value.items())
            if isinstance(value, Ordered) and isinstance(copy, Ordered):
                copy.attributes = value.attributes
            return copy
        if type(value) in (list, tuple):
            return type(value)(self._without_shards(part, key, depth + 1) for part in value)
        return value

    def _shard(self, made: Any, state: Any, kind: str, key: str) -> Any:
        try:
            spec = TensorSpec(tuple(made.args[2]), dtype_name(made.args[1].name))
            parts = _dtensor(spec.shape, state) if kind == "DTensor" else _sharded_tensor(state)
            chunks = [Chunk(low, place_tensor(part, self.tree.region(part.storage))) for low, part in parts]
            if any(chunk.place.spec.dtype != spec.dtype for chunk in chunks):
                raise TypeError
        except _NotCoveredError as error:
            text = f"{key!r} of {Path(self.path).name!r} is a {kind} that is not covered: {error}"
            self._problems.append(Diagnostic("sharded-otherwise", text, self.path, help=_SAVED))
            return made
        except (AttributeError, KeyError, TypeError, ValueError, IndexError):
            text = f"{key!r} of {Path(self.path).name!r} is a {kind} whose record makes no sense"
            self._problems.append(Diagnostic("bad-metadata", text, self.path, help="save the checkpoint again"))
            return made
        self.shards.append(_Part(spec, tuple(chunks)))
        storage = Storage(f"shard {len(self.shards) - 1}", spec.dtype, spec.numel)
        return Tensor(storage, 0, spec.shape, (), spec.dtype)

    def located(self, subtree: str | None) -> Located:
        """The model in the file."""
        return find_model(self._plain, subtree, self.path)

    def extras(self, extras: dict[str, Any]) -> dict[str, Any]:
        """What is beside the model; of sharded tensors there a record is left."""
        return settle(extras, self._beside)

    def _beside(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.storage.key.startswith("shard "):
            return Opaque("torch", "Tensor", (), "a part of a sharded tensor beside the model")
        return place_all({"": leaf}, self.tree.region, self.path)[""]

    def part(self, leaf: Any) -> _Part:
        """What the file holds of a tensor.

        Raises:
            CheckpointError: an array, which such files do not have.
        """
        if not isinstance(leaf, Tensor):
            text = f"{self.path!r} has a numpy array in its state dict"
            raise CheckpointError(Diagnostic("sharded-otherwise", text, self.path, help=_SAVED))
        if leaf.storage.key.startswith("shard "):
            return self.shards[int(leaf.storage.key.removeprefix("shard "))]
        entry = place_tensor(leaf, self.tree.region(leaf.storage))
        return _Part(entry.spec, None, entry)


class _NotCoveredError(Exception):
    """A placement whose boxes are not computed here; the text says which."""


def _state(record: Any) -> dict[str, Any]:
    """The fields of an object."""
    return _named(record.state)


def _named(state: Any) -> dict[str, Any]:
    """The fields in a state, which pickles keep as a mapping, or as a pair with the slots second."""
    if isinstance(state, tuple):
        return {name: value for part in state if isinstance(part, dict) for name, value in part.items()}
    return dict(state)


def _dtensor(shape: tuple[int, ...], state: Any) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Where the part of a DTensor begins, and the part."""
    held = _named(state)
    about = _state(held["_spec"])
    mesh = _state(about["mesh"])
    sizes, coordinate = _mesh_shape(mesh), mesh.get("_coordinate_on_dim")
    if coordinate is None:
        raise _NotCoveredError("its mesh does not say which rank it is")
    low, extent = [0] * len(shape), list(shape)
    for placement, size, index in zip(about["placements"], sizes, coordinate, strict=True):
        if placement.name == "Replicate":
            continue
        if placement.name != "Shard":
            raise _NotCoveredError(f"its placement is {placement.name.lstrip('_')}")
        dim = _state(placement)["dim"]
        chunk = -(-extent[dim] // size)
        start = min(index * chunk, extent[dim])
        low[dim] += start
        extent[dim] = min(chunk, extent[dim] - start)
    local = held["_local_tensor"]
    if not isinstance(local, Tensor) or tuple(local.shape) != tuple(extent):
        raise _NotCoveredError("its part has another shape than its placements say")
    yield tuple(low), local


def _mesh_shape(mesh: Mapping[str, Any]) -> list[int]:
    """How many ranks there are along each dimension of a mesh, as torch 2.13 or an older one records it."""
    if "_layout" in mesh:
        layout = _state(mesh["_layout"])
        axes = layout.get("axes")
        if axes is not None:
            return [_product(_state(axis)["shape"]) for axis in axes]
        return [_product(size) for size in layout["shape"]] if isinstance(layout["shape"], tuple) else [layout["shape"]]
    return list(mesh["mesh"].shape)


def _product(shape: Any) -> int:
    if type(shape) is int:
        return shape
    product = 1
    for size in shape:
        product *= _product(size)
    return product


def _sharded_tensor(state: Any) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Where each part of a ShardedTensor begins that a rank holds, and the part."""
    for shard in state[0]:
        fields = _state(shard)
        offsets = tuple(_state(fields["metadata"])["shard_offsets"])
        if not isinstance(fields["tensor"], Tensor) or Box(offsets, fields["tensor"].shape).numel < 0:
            raise _NotCoveredError("a part of it is not a plain tensor")
        yield offsets, fields["tensor"]
