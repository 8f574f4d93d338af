"""Folders of DeepSpeed ZeRO, stages 1, 2 and 3: the fp32 model, from the partitions of the optimizer.

Stages 1 and 2 keep each group of parameters as one flat vector, whose partitions follow each other by rank. Stage 3
cuts each parameter into as many equal runs as there are ranks. Names and shapes are in the first rank's model file.
A run of a flat vector becomes boxes of the tensor, so that it is read as any other tensor in chunks.

Source of the format: `zero_to_fp32.py`, which DeepSpeed puts beside each checkpoint (read at version 0.19.8).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...boxes import Box
from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES, TensorSpec
from ..chunked_tensors import Chunk, Chunked
from ..contents import Contents, Entry
from ..unpickling.inert import Tensor
from .storages import place_tensor
from .torch_zip import TorchTree, read_torch_tree

__all__ = ["boxes_of_run", "read_zero", "zero_files"]

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_EXPERTS = re.compile(r"(?:layer_-?\d+_)?expert_\d+_.*|expp_rank_\d+_.*")
_AGAIN = "copy the whole folder again, with the files of all ranks"


class _Run(NamedTuple):
    """Elements of a flat vector, one after another in a file: how many, and the entry of the first."""

    numel: int
    entry: Entry


def zero_files(names: Iterable[str]) -> list[str]:
    """The optimizer's files of such a folder, by rank.

    >>> zero_files(["zero_pp_rank_10_mp_rank_00_optim_states.pt", "zero_pp_rank_2_mp_rank_00_optim_states.pt", "x.pt"])
    ['zero_pp_rank_2_mp_rank_00_optim_states.pt', 'zero_pp_rank_10_mp_rank_00_optim_states.pt']
    """
    found = [match for match in map(_OPTIMIZER.fullmatch, names) if match]
    return [match[0] for match in sorted(found, key=lambda match: (int(match[2]), int(match[1])))]


def read_zero(folder: str, names: Sequence[str]) -> Contents:
    """The fp32 model of a folder, lazily; buffers come as they were saved.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is parted in a way that is not covered: experts,
            tensor parallel.
    """
    files = zero_files(names)
    _refuse_parallel(folder, names)
    models = sorted(filter(_MODEL.fullmatch, names), key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    if not models:
        raise _damaged(folder, "it has no file of the model's names and shapes")
    head = _File(folder, models[0])
    optimizers = [_File(folder, name) for name in files]
    states = [_mapping(one.tree.value, "optimizer_state_dict", one) for one in optimizers]
    stage, count = states[0].get("zero_stage"), states[0].get("partition_count")
    count = max(count) if isinstance(count, list) and count else count
    if count != len(files):
        raise _damaged(folder, f"{len(files)} ranks have an optimizer file, and {count!r} ranks saved it")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    ranks = [_flat(state.get(key), one) for state, one in zip(states, optimizers)]
    entries = dict(_buffers(head))
    if stage == 3:
        others = [head, *(_File(folder, name) for name in models[1:])]
        entries |= dict(_of_stage_three(_shapes(head), ranks, folder))
        entries |= dict(_frozen_parts(others, folder))
    else:
        paddings = states[0].get("param_alignment_paddings")
        entries |= dict(_of_stage_two(_groups(head), ranks, paddings, folder))
        entries |= dict(_frozen(head))
    shared = head.tree.value.get("shared_params") or {}
    aliases = {alias: kept for alias, kept in shared.items() if kept in entries}
    entries |= {alias: entries[kept] for alias, kept in aliases.items()}
    read = [head, *optimizers]
    sources = {one.path: one.tree.source for one in read}
    extras = {name: value for name, value in head.tree.value.items() if type(value) in (int, float, str)}
    return Contents(_in_order(entries, head), aliases, extras=extras, sources=sources, frame=None)


def _refuse_parallel(folder: str, names: Sequence[str]) -> None:
    """Refuse what is parted along more than the ranks of data parallelism."""
    experts = sorted(filter(_EXPERTS.fullmatch, names))
    parallel = {match[2] for match in map(_OPTIMIZER.fullmatch, names) if match} - {"00"}
    layers = [name for name in names if re.fullmatch(r"layer_\d+-model_\d+-model_states\.pt", name)]
    for found, what in ((experts, "experts, in files of their own"), (parallel, "tensor parallel parts"),
                        (layers, "pipeline stages, in files by layer")):  # fmt: skip
        if found:
            text = f"{folder!r} is a checkpoint of DeepSpeed with {what}, which is not covered"
            help = "convert it by DeepSpeed's own deepspeed.checkpoint.ds_to_universal, which knows how it was parted"
            raise CheckpointError(Diagnostic("sharded-otherwise", text, folder, help=help))


class _File:
    """One file of the folder, whose value is a mapping."""

    def __init__(self, folder: str, name: str) -> None:
        self.path = str(Path(folder, name))
        self.tree: TorchTree = read_torch_tree(self.path)
        if not isinstance(self.tree.value, dict):
            raise _damaged(self.path, "it is not a mapping")

    def entry(self, leaf: Any, what: str) -> Entry:
        """The place of a tensor."""
        if not isinstance(leaf, Tensor):
            raise _damaged(self.path, f"{what} is not a tensor")
        try:
            return place_tensor(leaf, self.tree.region(leaf.storage))
        except ValueError as error:
            raise _damaged(self.path, f"{what}: {error}") from None


def _damaged(place: str, why: str) -> CheckpointError:
    text = f"{place!r} is not a checkpoint of DeepSpeed as it was saved: {why}"
    return CheckpointError(Diagnostic("bad-chunks", text, place, help=_AGAIN))


def _mapping(value: Any, name: str, file: _File) -> Mapping[str, Any]:
    found = value.get(name)
    if not isinstance(found, dict):
        raise _damaged(file.path, f"{name} is not a mapping")
    return found


def _flat(value: Any, file: _File) -> list[_Run]:
    """The flat vectors of one rank, of which each is a run."""
    vectors = [value] if isinstance(value, Tensor) else value
    if not isinstance(vectors, list | tuple):
        raise _damaged(file.path, "it has no flat fp32 vectors")
    runs = []
    for number, vector in enumerate(vectors):
        entry = file.entry(vector, f"flat vector {number}")
        if not entry.is_contiguous and entry.spec.numel:
            raise _damaged(file.path, f"flat vector {number} is not contiguous")
        runs.append(_Run(entry.spec.numel, entry))
    return runs


def _groups(head: _File) -> list[dict[str, tuple[int, ...]]]:
    """The names and shapes of the parameters, by group."""
    groups = head.tree.value.get("param_shapes")
    groups = [groups] if isinstance(groups, dict) else groups
    if not isinstance(groups, list | tuple):
        raise _damaged(head.path, "it has no param_shapes, as files of old versions")
    return [{name: _shape(shape, head) for name, shape in group.items()} for group in groups]


def _shapes(head: _File) -> dict[str, tuple[int, ...]]:
    return {name: shape for group in _groups(head) for name, shape in group.items()}


def _shape(shape: Any, file: _File) -> tuple[int, ...]:
    found = tuple(shape) if isinstance(shape, list | tuple) else (-1,)
    if not all(type(n) is int and n >= 0 for n in found):
        raise _damaged(file.path, "a shape in it makes no sense")
    return found


def _buffers(head: _File) -> Iterator[tuple[str, Entry]]:
    module, named = head.tree.value.get("module"), head.tree.value.get("buffer_names")
    for name in named if isinstance(named, list | tuple) else ():
        if isinstance(module, dict) and name in module:
            yield name, head.entry(module[name], name)


def _frozen(head: _File) -> Iterator[tuple[str, Entry]]:
    fragments = head.tree.value.get("frozen_param_fragments") or {}
    for name in head.tree.value.get("frozen_param_shapes") or {}:
        yield name, head.entry(fragments.get(name), name)


def _frozen_parts(files: Sequence[_File], folder: str) -> Iterator[tuple[str, Entry]]:
    for name, shape in (files[0].tree.value.get("frozen_param_shapes") or {}).items():
        runs = []
        for file in files:
            entry = file.entry((file.tree.value.get("frozen_param_fragments") or {}).get(name), name)
            runs.append(_Run(entry.spec.numel, entry))
        yield name, _joined(name, _shape(shape, files[0]), _Vector(runs), 0, folder)


def _of_stage_two(
    groups: Sequence[Mapping[str, tuple[int, ...]]], ranks: Sequence[Sequence[_Run]], paddings: Any, folder: str
) -> Iterator[tuple[str, Entry]]:
    """The parameters of each group, which follow each other in the vector that the partitions make together."""
    if any(len(vectors) != len(groups) for vectors in ranks):
        raise _damaged(folder, "the optimizer's groups are not those of the model's file")
    for number, group in enumerate(groups):
        vector, offset = _Vector([vectors[number] for vectors in ranks]), 0
        padded = paddings[number] if isinstance(paddings, list | tuple) and number < len(paddings) else [0] * len(group)
        if len(padded) != len(group):
            raise _damaged(folder, f"group {number} has {len(group)} parameters and {len(padded)} paddings")
        for (name, shape), padding in zip(group.items(), padded):
            yield name, _joined(name, shape, vector, offset, folder)
            offset += math.prod(shape) + padding
        if vector.numel - offset > 4 * len(ranks) * len(ranks):  # partitions are aligned to twice the ranks
            raise _damaged(folder, f"group {number} has {vector.numel:,} elements, and its parameters {offset:,}")


def _of_stage_three(
    shapes: Mapping[str, tuple[int, ...]], ranks: Sequence[Sequence[_Run]], folder: str
) -> Iterator[tuple[str, Entry]]:
    """The parameters, each in as many equal runs as there are ranks, at the same place of every rank's vector."""
    vectors, offset = [_Vector(runs) for runs in ranks], 0
    for name, shape in shapes.items():
        part = -(-math.prod(shape) // len(ranks))
        runs = [run for vector in vectors for run in vector.between(offset, offset + part)]
        if sum(run.numel for run in runs) != part * len(ranks):
            raise _damaged(folder, f"{name!r} reaches past the end of the partitions")
        yield name, _joined(name, shape, _Vector(runs), 0, folder)
        offset += part
    if any(vector.numel != offset for vector in vectors):
        raise _damaged(folder, f"the partitions have {vectors[0].numel:,} elements, and the parameters {offset:,}")


@dataclass(frozen=True)
class _Vector:
    """A flat vector in several runs."""

    runs: Sequence[_Run]

    @property
    def numel(self) -> int:
        return sum(run.numel for run in self.runs)

    def between(self, start: int, stop: int) -> Iterator[_Run]:
        """The runs of the elements `[start, stop)`."""
        begin = 0
        for run in self.runs:
            low, high = max(start, begin), min(stop, begin + run.numel)
            if low < high:
                entry = run.entry
                offset = entry.offset + (low - begin) * DTYPES[entry.spec.dtype].itemsize
                yield _Run(high - low, entry._replace(spec=TensorSpec((high - low,), entry.spec.dtype), offset=offset))
            begin += run.numel


def _joined(name: str, shape: tuple[int, ...], vector: _Vector, offset: int, folder: str) -> Entry:
    """The entry of a tensor whose elements are a part of a flat vector."""
    numel = math.prod(shape)
    runs = list(vector.between(offset, offset + numel))
    if sum(run.numel for run in runs) < numel:
        raise _damaged(folder, f"{name!r} reaches past the end of the partitions")
    dtype = vector.runs[0].entry.spec.dtype if vector.runs else "F32"
    spec = TensorSpec(shape, dtype)
    if len(runs) == 1:
        return runs[0].entry._replace(spec=spec)
    if not runs:
        return vector.runs[0].entry._replace(spec=spec) if vector.runs else Entry(spec, folder)
    chunks, begin = [], 0
    for run in runs:
        inside = 0
        for box in boxes_of_run(shape, begin, begin + run.numel):
            place = run.entry._replace(
                spec=TensorSpec(box.extent, dtype), offset=run.entry.offset + inside * DTYPES[dtype].itemsize
            )
            chunks.append(Chunk(box.low, place))
            inside += box.numel
        begin += run.numel
    return Entry(spec, tensor=Chunked(spec, tuple(chunks)))


def boxes_of_run(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The boxes that elements `[start, stop)` of a dense tensor make, in order: part of a row, whole rows, part of one.

    >>> list(boxes_of_run((4, 3), 2, 10))
    [Box(low=(0, 2), extent=(1, 1)), Box(low=(1, 0), extent=(2, 3)), Box(low=(3, 0), extent=(1, 1))]
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last or (first == last and start // row == (stop - 1) // row):  # within one row
        for box in boxes_of_run(shape[1:], start % row, start % row + stop - start):
            yield Box((start // row, *box.low), (1, *box.extent))
        return
    if start < first * row:
        for box in boxes_of_run(shape[1:], start % row, row):
            yield Box((first - 1, *box.low), (1, *box.extent))
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * row < stop:
        for box in boxes_of_run(shape[1:], 0, stop - last * row):
            yield Box((last, *box.low), (1, *box.extent))


def _in_order(entries: dict[str, Entry], head: _File) -> dict[str, Entry]:
    """The entries in the order of the module's state dict, as far as it has them."""
    module = head.tree.value.get("module")
    order = [name for name in module if name in entries] if isinstance(module, dict) else []
    return {name: entries[name] for name in dict.fromkeys([*order, *entries])}
