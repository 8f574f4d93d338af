"""`Checkpoint`: a mapping from keys to tensors that are read when asked for, whatever the format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from functools import cached_property
from itertools import chain
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..boxes import Box
from ..errors import CheckpointError, Diagnostic, Remedy
from ..narrowing import present
from ..specs import DTYPES, TensorSpec, Tie
from ..wording import brief, close_keys, counted, shown_bytes
from .chunked_tensors import Chunked, files_of, read_box, read_range
from .contents import Contents, Entry, Extent, all_apart, place_of_entry
from .metadata_records import METADATA, VERSIONS, told_versions
from .sources.byte_source import ByteSource, Range
from .sources.files import OpenFiles
from .unpickling.frames import Frame
from .unpickling.nodes import is_lost
from .unpickling.unreadable import unreadable_tensors

if TYPE_CHECKING:
    import torch

    from ..tables.trees import KeyTree

__all__ = ["MAP_FROM", "Checkpoint", "LazyTensor", "MissingKeyError"]

# Below this a plain read is cheaper than a mapping, and a process may hold only some 65,000 mappings.
MAP_FROM = 1 << 20
"""Bytes of a tensor from which on it is mapped when it is loaded."""

_FILE = attrgetter("file")
_WAY = attrgetter("strides", "big_endian")


class MissingKeyError(CheckpointError, KeyError):
    """The checkpoint has no such key; also a `KeyError`, as a mapping's lookup must raise."""

    def __str__(self) -> str:
        return str(self.args[0])


class Checkpoint(Mapping[str, "LazyTensor"]):
    """A checkpoint's tensors by key; headers are known at once, data is read when a tensor is loaded.

    >>> from ckptsurgery.storage.contents import Contents, Entry
    >>> ckpt = Checkpoint(Contents({"w": Entry(TensorSpec([2, 3], "F32"), "/dev/null")}), "an example")
    >>> ckpt["w"], len(ckpt), ckpt.nbytes
    (LazyTensor('w', F32 [2, 3]), 1, 24)

    Raises:
        CheckpointError: a tensor without a name; on reading, a file that changed; `MissingKeyError`: no such key.
    """

    def __init__(self, contents: Contents, source: str) -> None:
        contents.require_names(source)
        self.entries: dict[str, Entry] = contents.entries
        self.aliases: dict[str, str] = contents.aliases
        self.metadata: dict[str, str] = contents.metadata
        self.extras: dict[str, Any] = contents.extras
        if VERSIONS in contents.metadata:
            self.extras = {METADATA: told_versions(self.extras, self.metadata, self.entries), **self.extras}
            self.metadata = {name: text for name, text in self.metadata.items() if name != VERSIONS}
        self.config: Mapping[str, Any] | None = contents.config
        self.source = source
        files = dict.fromkeys(map(_FILE, contents.entries.values()))
        if None in files:
            files = dict.fromkeys(chain.from_iterable(map(files_of, contents.entries.values())))
        self.files: tuple[str, ...] = tuple(file for file in files if file is not None)
        self.sources: dict[str, ByteSource] = contents.sources
        self.frame: Frame | None = contents.frame
        self.disputed: tuple[str, ...] = contents.disputed
        self._open_files = OpenFiles({*self.files, *self.sources}, self.sources)
        self._dense: tuple[str, memoryview] | None = None

    @property
    def contents(self) -> Contents:
        """Return the contents of this checkpoint. A checkpoint made from them has a tree of its own."""
        facts = (self.metadata, self.extras, self.config, self.sources, (), self.disputed)
        return Contents(self.entries, self.aliases, *facts)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of each key, in order."""
        return dict(zip(self.entries, map(attrgetter("spec"), self.entries.values())))

    @cached_property
    def is_contiguous(self) -> bool:
        """Whether every tensor is one run of bytes in a file."""
        entries = self.entries.values()
        return all(map(_FILE, entries)) and set(map(_WAY, entries)) <= {(None, False)}

    @cached_property
    def ties(self) -> tuple[Tie, ...]:
        """Groups of names that mean one tensor; disjoint or unequal views of one storage are none."""
        if all_apart(self.entries.values()):
            return ()  # mostly that is all there is
        full = {key: entry for key, entry in self.entries.items() if entry.spec.numel}
        groups: dict[tuple[object, ...], list[str]] = {}
        for key, entry in full.items():
            groups.setdefault(place_of_entry(entry), []).append(key)
        return tuple(
            Tie(tuple(names), "alias" if any(name in self.aliases for name in names) else "storage")
            for names in groups.values()
            if len(names) > 1
        )

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones counted once."""
        repeated = sum(self.specs[name].nbytes for tie in self.ties for name in tie.names[1:])
        return sum(spec.nbytes for spec in self.specs.values()) - repeated

    def extent(self, key: str) -> Extent | None:
        """Return the run of bytes in a file that is this tensor, or None when it must go through memory."""
        return self._entry(key).extent

    def load(self, key: str) -> torch.Tensor:
        """Return the tensor on the CPU, mapped privately or read. Writing into it never reaches the file.

        A tensor in memory is returned itself, or resolved where it is a conjugate or a negative view.
        """
        return self.tensor_at(self._entry(key), key)

    def tensor_at(self, entry: Entry, key: str = "the tensor") -> torch.Tensor:
        """Return the tensor of an entry, such as one of the extras; messages call it `key`."""
        if entry.tensor is None:
            return self._load(key, entry)
        from .tensors import refuse_meta

        if type(entry.tensor) is Chunked:
            return self._joined(entry.tensor, entry.tensor.box, key)

        # Tensors that a file holds in pieces, or not as plain bytes, are built when they are asked for.
        tensor: torch.Tensor = entry.tensor() if callable(entry.tensor) else entry.tensor
        refuse_meta(tensor, key)
        return tensor.resolve_conj().resolve_neg()

    def refuse_without_data(self, keys: Iterable[str]) -> None:
        """Check that values are known for these keys, before anything is written.

        Raises:
            CheckpointError: tensors on the meta device, or headers alone; each of them is named.
        """
        if self.is_contiguous:
            return
        from .header_sources import NoData

        problems: list[Diagnostic] = []
        for key in dict.fromkeys(keys):
            tensor = self.entries[key].tensor
            if isinstance(tensor, NoData) or (tensor is not None and not callable(tensor) and tensor.is_meta):
                try:
                    self.load(key)
                except CheckpointError as error:
                    problems += error.diagnostics
        if problems:
            raise CheckpointError(problems)

    def _joined(self, chunked: Chunked, box: Box, key: str) -> torch.Tensor:
        """A part of a tensor that is held in chunks; one chunk that is all of it comes as it would by itself."""
        if len(chunked.chunks) == 1 and box == chunked.chunks[0].box:
            return self.tensor_at(chunked.chunks[0].entry(self.read_file_into), key)
        from .tensors import tensor_from

        return tensor_from(
            read_box(chunked, box, self.read_file_into), 0, TensorSpec(box.extent, chunked.spec.dtype), key
        )

    def with_entries(self, entries: dict[str, Entry]) -> Checkpoint:
        """Return a checkpoint of other entries over the same open files."""
        found = copy(self)
        found.entries = entries
        for cached in ("specs", "is_contiguous", "ties", "nbytes"):
            found.__dict__.pop(cached, None)
        return found

    def _load(self, key: str, entry: Entry) -> torch.Tensor:
        from .tensors import span, swap_bytes, tensor_from, torch_shape

        spec, files = entry.spec, self._open_files
        file = present(entry.file, "the file of a tensor that lies in one")
        itemsize = DTYPES[spec.dtype].itemsize
        nbytes = spec.nbytes if entry.strides is None else span(torch_shape(spec, key), entry.strides) * itemsize
        if nbytes >= MAP_FROM and not entry.big_endian and entry.offset % itemsize == 0:
            mapped = files.map(file, entry.offset, nbytes)
            if mapped is not None:
                return tensor_from(*mapped, spec, key, entry.strides)
        buffer = files.read(file, entry.offset, nbytes)
        if entry.big_endian:
            buffer = swap_bytes(buffer, spec.dtype)
        return tensor_from(buffer, 0, spec, key, entry.strides)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytearray | memoryview:
        """Return bytes `[start, stop)` of the tensor laid out densely in C order; only these are read."""
        entry = self._entry(key)
        stop = entry.spec.nbytes if stop is None else stop
        if not 0 <= start <= stop <= entry.spec.nbytes:
            raise CheckpointError(
                Diagnostic("bad-range", f"bytes {start} to {stop} are not within the tensor's {entry.spec.nbytes}", key)
            )
        extent = entry.extent
        if extent is not None:
            return self._open_files.read(extent.file, extent.offset + start, stop - start)
        if type(entry.tensor) is Chunked:
            return read_range(entry.tensor, start, stop, self.read_file_into)
        return self._dense_view(key, entry)[start:stop]

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's dense bytes from `start` on."""
        entry = self._entry(key)
        if entry.extent is None or start + len(buffer) > entry.spec.nbytes:
            buffer[:] = self.read(key, start, start + len(buffer))
        else:
            self._open_files.read_into(entry.extent.file, entry.extent.offset + start, buffer)

    def read_file_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of one of `files` from `offset` on, for runs that cover neighbouring tensors."""
        self._open_files.read_into(file, offset, buffer)

    def read_ranges(self, file: str, ranges: Sequence[Range]) -> None:
        """Fill many buffers from one of `files`, several at once where its source does that."""
        self._open_files.read_ranges(file, ranges)

    def is_remote(self, file: str) -> bool:
        """Return whether one of `files` is read faster by many ranges at once than one after another."""
        return self._open_files.is_remote(file)

    def view(self, file: str, offset: int, nbytes: int) -> memoryview | None:
        """Return bytes of a source in memory without a copy; None for any other source."""
        return self._open_files.view(file, offset, nbytes)

    def using(self, file: str) -> AbstractContextManager[int | None]:
        """Return the descriptor of one of `files`, which stays open within the block, or None without one."""
        return self._open_files.using(file)

    def placed(self) -> Checkpoint:
        """Return the same checkpoint, in which plain contiguous tensors in memory are runs of bytes as well.

        Their addresses are valid as long as their owners leave the storages alone, so this is asked for just before the
        bytes are read.
        """
        if all(map(_FILE, self.entries.values())):
            return self
        from .memory import placed_entry

        entries = {key: e if e.file is not None else placed_entry(e) for key, e in self.entries.items()}
        return self.with_entries(entries)

    def read_in_order(self, files: Iterable[str]) -> None:
        """Tell the system that files will be read from front to back, so that it reads further ahead."""
        self._open_files.read_in_order(files)

    def _dense_view(self, key: str, entry: Entry) -> memoryview:
        # A strided tensor is gathered as a whole; the last one is kept, since ranges come one after another.
        from .tensors import dense_bytes

        kept = self._dense
        if kept is None or kept[0] != key:
            kept = self._dense = key, dense_bytes(self.load(key), key)
        return kept[1]

    def state_dict(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """Return all tensors, contiguous, in order, on the CPU or on `device`; tied names share one tensor.

        Raises:
            CheckpointError: a read failed, or there are tensors that cannot be read.
        """
        self.refuse_unreadable("{key: ckpt.load(key) for key in ckpt} gives the others")
        first = {name: tie.names[0] for tie in self.ties for name in tie.names[1:]}
        kept = [key for key in self.entries if key not in first]
        if device is None:
            made = {key: self.load(key).contiguous() for key in kept}
        else:
            made = self._sent(kept, device)
        return {key: made[first.get(key, key)] for key in self.entries}

    def _sent(self, keys: Sequence[str], device: torch.device | str) -> dict[str, torch.Tensor]:
        """Tensors on a device: those that are runs of bytes go through the ring, the others one by one."""
        from .sending import TensorRun, send
        from .sources.links import as_device, empty_on, link_to, moved_to
        from .tensors import torch_dtype, torch_shape

        there = as_device(device)
        link = link_to(there)
        straight = [(key, lies) for key in keys if (lies := self.extent(key)) is not None] if link else []
        made = {}
        for key, _ in straight:
            spec = self.specs[key]
            made[key] = empty_on(there, torch_shape(spec, key), torch_dtype(spec.dtype, key))
        if link is not None:
            runs = [TensorRun(*lies, number) for number, (_, lies) in enumerate(straight)]
            self.read_in_order({run.file for run in runs})
            send(runs, list(made.values()), self.read_file_into, link, begun=_nothing, arrived=_nothing)
        return {key: made[key] if key in made else moved_to(there, self.load(key)).contiguous() for key in keys}

    def check_unchanged(self) -> None:
        """Check that the files have not changed since their headers were read.

        Raises:
            CheckpointError: something wrote to one of them, so what was read may be of two minds.
        """
        self._open_files.check_unchanged()

    def close(self) -> None:
        """Close the files; tensors that were loaded stay valid."""
        self._dense = None
        self._open_files.close()

    def _entry(self, key: str) -> Entry:
        try:
            return self.entries[key]
        except KeyError:
            if key in self.unreadable:
                raise MissingKeyError(unreadable_tensors({key: self.unreadable[key]}, place=self.source)) from None
            near = close_keys(str(key), self.entries)
            meant = (Remedy("key", {str(key): near}, kind="instead"),) if near else ()
            text = f"{self.source} has no key {key!r}"
            advice = None if near else "list(ckpt) has all keys"
            raise MissingKeyError(Diagnostic("missing-key", text, remedies=meant, advice=advice)) from None

    def __getitem__(self, key: str) -> LazyTensor:
        self._entry(key)
        return LazyTensor(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def get(self, key: str, default: Any = None) -> Any:
        """Return the tensor of a key, or `default`."""
        return LazyTensor(self, key) if key in self.entries else default

    __hash__ = object.__hash__

    @cached_property
    def unreadable(self) -> dict[str, str]:
        """What was saved as a tensor and cannot be read (sparse, quantised, a `DTensor`): path -> why."""
        return {path: value.note or "" for path, value in self.extras.items() if is_lost(value)}

    def refuse_unreadable(self, help: str | None = None) -> None:
        """Check that the tensors which can be read are all that there are.

        Args:
            help: how to go on without them.

        Raises:
            CheckpointError: some cannot be read; each is named, with its kind.
        """
        if self.unreadable:
            raise CheckpointError(unreadable_tensors(self.unreadable, place=self.source, help=help))

    def __eq__(self, other: object) -> bool:
        return self is other  # a mapping's == would compare lazy tensors, which says nothing of their values

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def tree(self, depth: int | None = None, width: int = 100) -> KeyTree:
        """Draw the keys as a tree of modules with totals; no data is read.

        Args:
            depth: levels that are shown; all without it.
            width: columns of the text.
        """
        from ..tables.trees import key_tree

        return key_tree(self.specs, depth, width)

    def __repr__(self) -> str:
        parts = [counted(len(self), "tensor"), shown_bytes(self.nbytes)]
        if self.ties:
            parts.append(f"{len(self.ties)} tied")
        if len(self.files) > 1:
            parts.append(f"{len(self.files)} files")
        if self.extras:
            parts.append(counted(len(self.extras), "extra"))
        return brief("Checkpoint", self.source, *parts)


class LazyTensor:
    """One tensor of a checkpoint: its spec now, its data on `load()` or by rows on indexing."""

    __slots__ = ("_checkpoint", "key", "spec")

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        self._checkpoint = checkpoint
        self.key = key
        self.spec = checkpoint.entries[key].spec

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, as the header has it."""
        return self.spec.shape

    @property
    def dtype(self) -> str:
        """safetensors' name of the dtype."""
        return self.spec.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.spec.nbytes

    def load(self) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        return self._checkpoint.load(self.key)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The part that `load()[index]` would give; only the rows of dimension 0 that it touches are read."""
        from .slicing import rows_in

        within = rows_in(self._checkpoint.entries[self.key], index)
        if within is None:
            return self.load()[index]
        entry, rest = within
        return self._checkpoint.tensor_at(entry, self.key)[rest]

    def __len__(self) -> int:
        if not self.spec.shape:
            raise TypeError("len() of a tensor without dimensions")
        return self.spec.shape[0]

    def __repr__(self) -> str:
        return f"LazyTensor({self.key!r}, {self.spec})"


def _nothing(number: int) -> None:
    """Nobody asks when a tensor begins to arrive, or has arrived."""
