"""What a format's reader returns: where each tensor lies, and what else the file holds.

A format is a function from a path to `Contents`; everything after that (mounts, subtrees, ties, slices, streaming) is
the same for all formats and knows `Entry` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby, repeat
from operator import attrgetter, lt
from typing import Any, NamedTuple

from ..errors import CheckpointError, Diagnostic
from ..specs import TensorSpec
from .sources.byte_source import ByteSource
from .unpickling.frames import Frame

__all__ = ["Contents", "Entry", "Extent", "all_apart", "entries_in", "place_of_entry"]


class Extent(NamedTuple):
    """A run of bytes in a file that is one tensor, C-contiguous and little-endian."""

    file: str
    offset: int
    nbytes: int


class Entry(NamedTuple):
    """Where one tensor lies: in a file, or in memory.

    Args:
        spec: shape and dtype.
        file: name of the byte source that holds the elements, such as a path; None for a tensor in memory.
        offset: byte offset of the first element in `file`.
        strides: in elements; None where the tensor is C-contiguous.
        big_endian: whether the bytes have to be swapped when read.
        tensor: the tensor itself when it lives in memory.
    """

    spec: TensorSpec
    file: str | None = None
    offset: int = 0
    strides: tuple[int, ...] | None = None
    big_endian: bool = False
    tensor: Any = None

    @property
    def is_contiguous(self) -> bool:
        """Whether the tensor is one run of bytes in a file, to be copied verbatim."""
        return self.file is not None and self.strides is None and not self.big_endian

    @property
    def extent(self) -> Extent | None:
        """The bytes to copy verbatim, or None when the tensor must go through memory."""
        if self.file is None or not self.is_contiguous:
            return None
        return Extent(self.file, self.offset, self.spec.nbytes)


def entries_in(file: str, specs: Iterable[TensorSpec], offsets: Iterable[int]) -> Iterator[Entry]:
    """Entries of C-contiguous tensors in one file, very many of them: without a call of Python for each."""
    rows = zip(specs, repeat(file), offsets, repeat(None), repeat(False), repeat(None))
    return map(tuple.__new__, repeat(Entry), rows)


@dataclass(slots=True)
class Contents:
    """All that a checkpoint holds.

    Args:
        entries: key -> place, in the checkpoint's own order; names of one tied tensor map to equal places.
        aliases: alias -> kept name, as the file's metadata declares them; both are keys of `entries`.
        metadata: string metadata of the format.
        extras: dotted path -> value for what is no tensor of the model (epoch, arguments, optimizer, `_metadata`).
        config: the model's configuration where one lies beside or inside, else None.
        sources: file -> its byte source, as it was when its header was read, so that another one is noticed.
        frame: the way from the root of the file's tree to the model; None where several trees were joined.
        disputed: names of metadata and paths of extras to which several files give different values; the last counts.
    """

    entries: dict[str, Entry]
    aliases: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    sources: dict[str, ByteSource] = field(default_factory=dict)
    frame: Frame | None = ()
    disputed: tuple[str, ...] = ()

    def require_names(self, source: str) -> None:
        """Raise where a tensor has no name; `source` is what was opened."""
        if "" in self.entries:
            help = "a rule, a pattern and other programs need a name to take it by: write it again under one"
            place = self.entries[""].file or source
            raise CheckpointError(Diagnostic("bad-name", "a tensor has an empty name", place, help=help))

    def join_facts(self, parts: Collection[Contents]) -> None:
        """Take over the metadata and extras of several files of one checkpoint, and remember where they differ.

        >>> whole = Contents({})
        >>> whole.join_facts([Contents({}, metadata={"step": "1"}), Contents({}, metadata={"step": "2"})])
        >>> whole.metadata, whole.disputed
        ({'step': '2'}, ('step',))
        """
        differing = dict.fromkeys(self.disputed)
        for part in parts:
            for own, its in ((self.metadata, part.metadata), (self.extras, part.extras)):
                differing |= {name: None for name in own.keys() & its.keys() if not _is_same(own[name], its[name])}
                own |= its
            differing |= dict.fromkeys(part.disputed)
        self.disputed = tuple(sorted(differing))


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal as they are written: arrays and foreign objects have no `==` that answers."""
    return one is other or (type(one) is type(other) and repr(one) == repr(other))


def all_apart(entries: Collection[Entry]) -> bool:
    """Whether all tensors start at different places of files, so that no two of them are one."""
    runs = [(file, list(map(attrgetter("offset"), run))) for file, run in groupby(entries, attrgetter("file"))]
    if len({file for file, _ in runs}) == len(runs) and all(all(map(lt, at, at[1:])) for _, at in runs):
        return True  # file by file, each from front to back
    return len(set(map(attrgetter("file", "offset"), entries))) == len(entries)


def place_of_entry(entry: Entry) -> tuple[object, ...]:
    """Equal for two entries exactly when they are one tensor."""
    spec = entry.spec
    if entry.file is not None:
        return entry.file, entry.offset, spec.dtype, spec.shape, entry.strides, entry.big_endian
    if callable(entry.tensor):
        return (id(entry.tensor),)
    from .tensors import memory_place

    return memory_place(entry.tensor), spec
