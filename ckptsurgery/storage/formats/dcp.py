"""Checkpoints of `torch.distributed.checkpoint`: a folder with `.metadata` and files of chunks.

`.metadata` is a pickle. It gives each tensor's shape, dtype and chunks, and for each chunk a file, an offset and a
length. There are either an archive of `torch.save` for each chunk, or one safetensors blob for all chunks of a file.
Values that are not tensors are archives too. `planner_data` holds the path of each key in the tree that was saved.

The pickle is read by the restricted unpickler, and torch is not imported. Chunks are checked to cover each tensor once,
and to lie within their files. Megatron's `torch_dist` is this format with `common.pt` beside it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...boxes import Box, Shape, covers_once
from ...errors import CheckpointError, Diagnostic
from ...specs import DTYPES, TensorSpec, dtype_name, shape_problem
from ...wording import shown_keys
from ..chunked_tensors import Chunk, Chunked, unaligned
from ..contents import Contents, Entry
from ..sources.byte_source import ByteSource, LocalFile
from ..sources.files import os_error, read_regular
from ..unpickling.inert import Opaque, Storage, Tensor
from ..unpickling.nesting import find_model, settle
from ..unpickling.pickle_machine import Unpickler
from .archived import Archive, Archived
from .safetensors import read_safetensors_at
from .storages import place_tensor
from .torch_zip import persistent_storages

__all__ = ["METADATA_FILE", "read_dcp"]

METADATA_FILE = ".metadata"

_COMMON = "common.pt"  # what Megatron saves beside its tensors
_VALUE = 64 << 20  # bytes; a longer value that is not a tensor is not read
_ROOT = "torch.distributed.checkpoint.metadata.Metadata"
_AGAIN = "copy or download the folder again"
_SINGULAR = {"have": "has", "are": "is", "reach": "reaches"}


def read_dcp(folder: str, subtree: str | None = None) -> Contents:
    """What a distributed checkpoint holds, from its metadata.

    Args:
        folder: its folder.
        subtree: dotted path of the part to take; None finds the model's (see `nesting`).

    Raises:
        CheckpointError: it is damaged, a file is missing or shorter than the metadata says, or the chunks of a tensor
            overlap or leave some of it out; all tensors of a kind are named.
    """
    path = str(Path(folder, METADATA_FILE))
    try:
        data = read_regular(path)
        source = LocalFile.of(path, Path(path).stat())
    except OSError as error:
        raise os_error(error, path) from error
    reader = _DcpReader(folder, _fields(Unpickler(io.BytesIO(data), len(data), path).load(), path))
    reader.sources[path] = source
    leaves = reader.tensors()
    reader.refuse()
    megatron = "mcore_data" in reader.fields or Path(folder, _COMMON).is_file()
    tree = _nested(leaves | reader.values(), reader.paths, megatron)
    found = find_model(tree, subtree, folder)
    entries = {key: reader.entry(leaf) for key, leaf in found.leaves.items()}
    extras = settle(found.extras, reader.entry)
    extras.update(_common(folder, extras))
    return Contents(entries, extras=extras, sources=reader.sources, frame=found.frame)


def _fields(metadata: Any, path: str) -> Mapping[str, Any]:
    """The fields of the metadata object."""
    if type(metadata) is not Opaque or metadata.path != _ROOT or not isinstance(metadata.state, dict):
        text = f"{path!r} is not the metadata of a checkpoint of torch.distributed.checkpoint"
        raise CheckpointError(Diagnostic("bad-metadata", text, path, help=_AGAIN))
    fields = metadata.state
    if not isinstance(fields.get("state_dict_metadata"), dict) or not isinstance(fields.get("storage_data"), dict):
        text = f"{path!r} lists no tensors or no places of them"
        raise CheckpointError(Diagnostic("bad-metadata", text, path, help=_AGAIN))
    return fields


class _ChunkRun(NamedTuple):
    """Where the metadata says that something is stored."""

    file: str
    offset: int
    nbytes: int


@dataclass
class _DcpReader:
    """Turns the metadata's records into entries, and collects what is wrong with them."""

    folder: str
    fields: Mapping[str, Any]
    sources: dict[str, ByteSource] = field(default_factory=dict)
    placed: list[Entry] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    _runs: dict[tuple[str, Shape | None], _ChunkRun] = field(default_factory=dict)
    _archives: dict[str, bool] = field(default_factory=dict)
    _blobs: dict[tuple[str, int], Mapping[str, Entry]] = field(default_factory=dict)
    _cuts: dict[tuple[object, ...], list[Box] | None] = field(default_factory=dict)
    _specs: dict[tuple[Shape, str], TensorSpec] = field(default_factory=dict)
    _descriptors: dict[str, int] = field(default_factory=dict)

    @property
    def paths(self) -> Mapping[str, Any]:
        """The path of each key in the tree that was saved, where the metadata has it."""
        paths = self.fields.get("planner_data")
        return paths if isinstance(paths, dict) else {}

    def refuse(self) -> None:
        """Raise one error a kind of problem."""
        if self.problems:
            raise CheckpointError(self._refusal(why, keys) for why, keys in self.problems.items())

    def _refusal(self, why: str, keys: list[str]) -> Diagnostic:
        verb, _, rest = why.partition(" ")
        text = f"{len(keys):,} tensors or values of {self.folder!r} {why}: {keys[0]!r}"
        if len(keys) == 1:
            text = f"{keys[0]!r} of {self.folder!r} {_SINGULAR[verb]} {rest}"
        return Diagnostic("bad-chunks", text, self.folder, notes=shown_keys(keys[1:]), help=_AGAIN)

    def tensors(self) -> dict[str, Any]:
        """Key -> the record of each tensor; keys of other values are left out."""
        self._runs = dict(self._stored())
        leaves: dict[str, Any] = {}
        for key, about in self.fields["state_dict_metadata"].items():
            if _is(about, "TensorStorageMetadata") and type(key) is str:
                try:
                    leaves[key] = self._leaf(key, about.state)
                except (LookupError, TypeError, AttributeError):
                    self._problem(key, "have metadata that makes no sense")
        return leaves

    def _problem(self, key: str, why: str) -> None:
        self.problems.setdefault(why, []).append(key)

    def _stored(self) -> Iterator[tuple[tuple[str, Shape | None], _ChunkRun]]:
        """(key, index of the first element) -> where it is stored."""
        sizes: dict[str, int] = {}
        paths: dict[str, str] = {}  # of very many chunks there are few files
        for index, place in self.fields["storage_data"].items():
            try:
                key, low = index.state["fqn"], index.state.get("offset")
                state = place.state
                name, offset, nbytes = state["relative_path"], state["offset"], state["length"]
                ways = ", ".join(map(str, state.get("transform_descriptors") or ()))
                hash((low, name))
            except (AttributeError, KeyError, TypeError):
                key = None
            if type(key) is not str:
                text = f"the places in {self.folder!r} make no sense"
                raise CheckpointError(Diagnostic("bad-metadata", text, self.folder, help=_AGAIN))
            if ways:
                self._problem(key, f"are stored in a transformed way ({ways})")
                continue
            if name not in sizes:
                sizes[name], paths[name] = self._size(name), str(Path(self.folder, name))
            if type(offset) is not int or type(nbytes) is not int or offset < 0 or nbytes < 0:
                self._problem(key, "have a place that makes no sense")
            elif sizes[name] < 0:
                self._problem(key, f"are in {name!r}, which is not there")
            else:
                yield (key, low), _ChunkRun(paths[name], offset, nbytes)

    def _size(self, name: Any) -> int:
        """Bytes of a file of the folder; -1 where there is none."""
        if type(name) is not str or name.startswith(("/", "\\")) or ".." in Path(name).parts or "\0" in name:
            text = f"the metadata names {name!r}, which is outside of {self.folder!r}"
            raise CheckpointError(Diagnostic("outside-folder", text, self.folder, help="do not trust this checkpoint"))
        path = Path(self.folder, name)
        try:
            status = path.stat()
        except OSError:
            return -1
        self.sources[str(path)] = LocalFile.of(str(path), status)
        return status.st_size

    def _leaf(self, key: str, about: Mapping[str, Any]) -> Any:
        """The record of one tensor."""
        dtype, shape = _dtype(about["properties"]), tuple(about["size"])
        if dtype is None:
            return Opaque("torch", "Tensor", (), "its dtype is unknown here")
        if not all(type(n) is int and n >= 0 for n in shape) or shape_problem(shape, DTYPES[dtype].bits):
            raise TypeError
        spec = TensorSpec(shape, dtype)
        states = [chunk.state for chunk in about["chunks"]]
        full = self._cut(shape, tuple([(tuple(state["offsets"]), tuple(state["sizes"])) for state in states]))
        if full is None:
            self._problem(key, "have chunks that overlap, or that leave some of it out")
            return None
        chunks = [self._chunk(key, box, dtype) for box in full]
        if None in chunks:
            return None
        return self._noted(_entry(spec, [chunk for chunk in chunks if chunk], self.folder))

    def _cut(self, shape: Shape, parts: tuple[tuple[Shape, Shape], ...]) -> list[Box] | None:
        """The boxes with elements; None unless they cover a tensor once. Many tensors are cut alike.

        Args:
            parts: low end and extent of each.
        """
        if (shape, parts) not in self._cuts:
            boxes = [box for box in (Box(*part) for part in dict.fromkeys(parts)) if box.numel]
            self._cuts[shape, parts] = boxes if covers_once(shape, boxes) else None
        return self._cuts[shape, parts]

    def _chunk(self, key: str, box: Box, dtype: str) -> Chunk | None:
        run = self._runs.get((key, box.low))
        if run is None:
            self._problem(key, "have chunks without a place")
            return None
        spec = self._specs.get((box.extent, dtype))
        if spec is None:
            spec = self._specs[box.extent, dtype] = TensorSpec(box.extent, dtype)
        size = self.sources[run.file].size
        blob = self._blob(run) if run.offset <= size else None
        if blob is not None:
            entry = blob.get(key)
            if entry is None or entry.spec != spec:
                self._problem(key, f"are not in {Path(run.file).name!r} as the metadata says")
                return None
            return Chunk(box.low, entry)
        if run.offset + run.nbytes > size:
            self._problem(key, f"reach past the end of {Path(run.file).name!r}")
            return None
        return Chunk(box.low, Archived(spec, run.file, run.offset, run.nbytes))

    def _blob(self, run: _ChunkRun) -> Mapping[str, Entry] | None:
        """The tensors of a safetensors blob; None where an archive begins there.

        All archives of a file are of one kind, so that only the first of each is looked at.
        """
        if run.file not in self._archives:
            head = os.pread(self._descriptor(run.file), 16, run.offset)
            self._archives[run.file] = head.startswith(b"PK\3\4")
        if self._archives[run.file]:
            return None
        place = (run.file, run.offset)
        if place not in self._blobs:
            self._blobs[place], _ = read_safetensors_at(run.file, run.offset)
        return self._blobs[place]

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[file]

    def _noted(self, entry: Entry) -> Tensor:
        """The record that stands for an entry while the model is looked for."""
        self.placed.append(entry)
        spec = entry.spec
        return Tensor(Storage(str(len(self.placed) - 1), spec.dtype, spec.numel), 0, spec.shape, (), spec.dtype)

    def entry(self, leaf: Tensor) -> Entry:
        """The entry that a record stands for."""
        return self.placed[int(leaf.storage.key)]

    def values(self) -> dict[str, Any]:
        """Key -> each value that is not a tensor."""
        found = {}
        try:
            for key, about in self.fields["state_dict_metadata"].items():
                if _is(about, "BytesStorageMetadata") and type(key) is str:
                    run = self._runs.get((key, None))
                    found[key] = self._value(run) if run else Opaque("torch", "object", (), "it has no place")
        finally:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
        return found

    def _value(self, run: _ChunkRun) -> Any:
        if run.nbytes > _VALUE:
            return Opaque("torch", "object", (), f"a value of {run.nbytes:,} bytes, which is not read")
        try:
            archive = Archive(run.file, run.offset, run.nbytes, self._read)
            data = archive.bytes_of("data.pkl")
            tree = Unpickler(io.BytesIO(data), len(data), run.file, persistent_storages(run.file)).load()
        except CheckpointError as error:
            return Opaque("torch", "object", (), error.diagnostics[0].headline)
        return settle({"": tree}, partial(self._inner, archive))[""]

    def _inner(self, archive: Archive, tensor: Any) -> Any:
        """The record of a tensor within a value."""
        if type(tensor) is not Tensor:
            return Opaque("numpy", "ndarray", (), "an array within a value")
        try:
            return self._noted(place_tensor(tensor, archive.region(tensor.storage)))
        except ValueError as error:
            return Opaque("torch", "Tensor", (), str(error))

    def _read(self, file: str, offset: int, buffer: memoryview) -> None:
        ends = offset + len(buffer) > self.sources[file].size
        if ends or os.preadv(self._descriptor(file), [buffer], offset) != len(buffer):
            text = f"{file!r} ends early"
            raise CheckpointError(Diagnostic("truncated-file", text, file, help=_AGAIN))


def _is(value: Any, name: str) -> bool:
    return type(value) is Opaque and value.name == name


def _dtype(properties: Any) -> str | None:
    """The dtype in the properties of a tensor: the first of them, whether they are a tuple or named."""
    state = properties.state
    dtype = state["dtype"] if isinstance(state, dict) else state[0]
    try:
        return dtype_name(dtype.name) if type(dtype) is Opaque else None
    except CheckpointError:
        return None


def _entry(spec: TensorSpec, chunks: list[Chunk], folder: str) -> Entry:
    """The entry of a tensor; one that is a run of bytes by itself is one."""
    if not spec.numel:
        return Entry(spec, str(Path(folder, METADATA_FILE)))
    if len(chunks) == 1 and isinstance(chunks[0].place, Entry) and chunks[0].place.spec == spec:
        return chunks[0].place
    if DTYPES[spec.dtype].bits % 8:
        raise unaligned(spec, folder)
    return Entry(spec, tensor=Chunked(spec, tuple(chunks)))


def _nested(leaves: dict[str, Any], paths: Mapping[str, Any], megatron: bool) -> dict[str, Any]:
    """The tree that was saved; keys without a path stay at the top, those of an optimizer's below it.

    Args:
        megatron: whether Megatron saved it, which has the optimizer's state beside the model's at the top.
    """
    tree: dict[str, Any] = {}
    for key, leaf in leaves.items():
        path: Any = paths.get(key)
        known = type(path) is tuple and path and all(type(part) in (str, int) for part in path)
        if not known or (megatron and path == (key,)):
            first, dot, rest = key.partition(".")
            path = (first, rest) if dot and "optim" in first.lower() else (key,)
        node = tree
        for part in path[:-1]:
            inner = node.setdefault(part, {})
            node = inner if type(inner) is dict else {}
        node[path[-1]] = leaf
    return {name: _with_lists(part) for name, part in tree.items()}


def _with_lists(node: Any) -> Any:
    """The same tree with lists for mappings whose keys count from 0."""
    if type(node) is not dict:
        return node
    inner = {name: _with_lists(part) for name, part in node.items()}
    return list(inner.values()) if inner and [*inner] == [*range(len(inner))] else inner


def _common(folder: str, extras: Mapping[str, Any]) -> Mapping[str, Any]:
    """What Megatron saves beside its tensors: arguments, the scheduler, the iteration."""
    path = Path(folder, _COMMON)
    if "common" in extras or not path.is_file():
        return {}
    from .zip_archive import ZipArchive

    try:
        with path.open("rb") as file:
            archive = ZipArchive(file, str(path))
            name = next(name for name in archive.records if name.endswith("data.pkl"))
            data = archive.bytes_of(name, at_most=_VALUE)
        tree = Unpickler(io.BytesIO(data), len(data), str(path), persistent_storages(str(path))).load()
    except (CheckpointError, OSError, StopIteration):
        return {"common": Opaque("torch", "object", (), f"{_COMMON} cannot be read")}
    return settle({"common": tree}, lambda leaf: Opaque("torch", "Tensor", (), f"a tensor of {_COMMON}"))
