"""The base of formats: one object that recognises its files, finds their tensors and, where it can, writes them.

It reads from an `OpenedSource`: a byte source that is open, with what was learned of it.

A format of another package is a subclass of `Format`, named by an entry point of the group `ckptsurgery.formats`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from ...errors import CheckpointError, Diagnostic
from ...specs import TensorSpec
from ..contents import Contents, Extent
from ..output.durability import SYNCED, Durability
from ..sources.byte_source import ByteSource, LocalFile, read_at
from ..sources.system_errors import os_error
from ..subtree import enter
from ..unpickling.frames import Frame

if TYPE_CHECKING:
    from ..output.staging import Writer
    from .zip_archive import ZipArchive

__all__ = ["HEAD", "Announced", "Format", "OpenedSource", "opening"]

HEAD = 1024
"""Bytes by which a file is recognised."""

_PIECE = 1 << 20
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")


NestedReader = Callable[["OpenedSource", "str | None"], Contents]


class OpenedSource:
    """A byte source whose header is being read.

    >>> from ckptsurgery.storage.sources.byte_source import MemoryBuffer
    >>> with OpenedSource(MemoryBuffer("an example", b"0123456789")) as opened:
    ...     opened.head[:4], opened.read_at(7, 10), opened.names
    (b'0123', b'789', ())

    Args:
        source: the source.
        nested: reads a file of any format that lies in this one, below a dotted path; none by default.

    Raises:
        CheckpointError: it cannot be opened.
    """

    def __init__(self, source: ByteSource, nested: NestedReader | None = None) -> None:
        self.source = source
        self.nested: NestedReader = nested or _refuse_nested
        self.name = source.name
        self.size = source.size
        raw = source.open()
        self.file: BinaryIO = io.BufferedReader(raw) if isinstance(raw, io.FileIO) else raw

    @cached_property
    def head(self) -> bytes:
        """The first kilobyte."""
        return self.read_at(0, HEAD)

    @cached_property
    def archive(self) -> ZipArchive:
        """The directory of a zip file.

        Raises:
            CheckpointError: it is not a zip file, or a damaged one.
        """
        from .zip_archive import ZipArchive  # most files are none

        return ZipArchive(self.file, self.name)

    @property
    def names(self) -> Sequence[str]:
        """The names in a zip file; none for any other."""
        return tuple(self.archive.records) if self.head.startswith(_ZIP) else ()

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Return bytes `[offset, offset + nbytes)`, fewer at the end of the file."""
        there = max(0, self.size - offset)  # a read takes memory for all that it asks for
        return read_at(self.file, offset, min(nbytes, there))

    def refuse_behind(self, end: int) -> None:
        """Refuse a file that goes on behind its end with anything but zeros, which writers pad with.

        Raises:
            CheckpointError: what is there would be left out: two files run together, or noise.
        """
        for start in range(end, self.size, _PIECE):
            piece = self.read_at(start, _PIECE)
            if piece.count(0) != len(piece):
                text = f"{self.name!r} has {self.size - end:,} bytes behind its end, which would be left out"
                help = "the file is damaged, or two files run together; get it again"
                raise CheckpointError(Diagnostic("trailing-bytes", text, self.name, help=help))

    def beside(self, name: str) -> ByteSource:
        """Return the source of a file in the same folder, or below it.

        Raises:
            CheckpointError: there is none, or this source has no folder.
        """
        found = getattr(self.source, "beside", None)
        if found is None:
            text = f"{self.name!r} needs the file {name!r} beside it, and has no folder"
            raise CheckpointError(Diagnostic("missing-file", text, self.name, help="open the file in its folder"))
        source: ByteSource = found(name)
        return source

    def __enter__(self) -> OpenedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()


def _refuse_nested(opened: OpenedSource, subtree: str | None) -> Contents:
    text = f"{opened.name!r} holds a file of its own, and only files are opened here"
    raise CheckpointError(Diagnostic("unsupported-format", text, opened.name, help="unpack it first"))


@contextmanager
def opening(source: str | os.PathLike[str] | OpenedSource) -> Iterator[OpenedSource]:
    """Open a path for the reading of its header; a source that is open already stays so.

    Raises:
        CheckpointError: it cannot be read.
    """
    if isinstance(source, OpenedSource):
        yield source
        return
    path = os.fspath(source)
    try:
        with OpenedSource(LocalFile.of(path, Path(path).stat())) as opened:
            yield opened
    except OSError as error:
        raise os_error(error, path) from error


@dataclass(frozen=True, slots=True)
class Announced:
    """The contents of an output file, before any of its data is there.

    Args:
        path: the file.
        specs: key -> shape and dtype of every tensor, in the order that a reader should see.
        aliases: other name -> key, for tied tensors that are stored once.
        metadata: string metadata to keep.
        extras: dotted path -> value for what is not a tensor of the model.
        frame: where the tensors lie among the extras, in a format that nests.
        resume: a tag of this run's inputs and rules; what a run with the same tag left is not written again.
        source_offsets: key -> offset in its source file of a tensor that is copied as it is: blocks can be shared.
        durability: whether to wait until all of it is on the disk.
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    frame: Frame | None = None
    resume: str | None = None
    source_offsets: Mapping[str, int] = field(default_factory=dict)
    durability: Durability = SYNCED

    def in_one_file(
        self, head: bytes, offsets: Mapping[str, int], size: int, between: Mapping[int, bytes] = {}
    ) -> Writer:
        """Return a writer of one file in which each tensor is one run of bytes.

        Args:
            head: the bytes at the start.
            offsets: key -> where its bytes begin, for each key of `specs`.
            size: of the file.
            between: offset -> other bytes that are known already.
        """
        from ..output.staging import Output, Writer, beside

        temporary = beside(self.path)
        places = {key: Extent(str(temporary), offsets[key], spec.nbytes) for key, spec in self.specs.items()}
        output = Output(self.path, temporary, size, head, between=between)
        return Writer([output], places, durability=self.durability)


class Format:
    """One file format. A subclass defines `name`, `recognise` and `read`; one that is written, `writes` and `writer`.

    Attributes:
        name: a short, stable name.
        text: a noun phrase for messages, such as "a torch file".
        suffixes: how names of its files usually end, for the choice among a folder's files.
        writes: how a name ends that asks for this format as output.
        holds_extras: whether a file can hold more than tensors and string metadata.
        resumes: whether an interrupted write can be resumed.
        executes: whether other readers of such files may run code that the files hold.
    """

    name: ClassVar[str] = ""
    text: ClassVar[str] = ""
    suffixes: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()
    holds_extras: ClassVar[bool] = False
    resumes: ClassVar[bool] = False
    executes: ClassVar[bool] = False

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether a file is of this format.

        Args:
            head: the file's first kilobyte.
            names: the names in a zip file; empty for any other.
        """
        raise NotImplementedError

    def read(self, opened: OpenedSource) -> Contents:
        """Return where each tensor is stored, from headers alone. No byte of the file may be executed.

        Raises:
            CheckpointError: the file is damaged, or cannot be read.
        """
        raise NotImplementedError

    def read_below(self, opened: OpenedSource, subtree: str | None) -> Contents:
        """Return the contents below a dotted path; a format that nests looks for the model if it is None."""
        contents = self.read(opened)
        return enter(contents, subtree, opened.name) if subtree else contents

    def writer(self, announced: Announced) -> Writer:
        """Return a writer of one file, which writes nothing before it is entered.

        Raises:
            CheckpointError: the format cannot hold a tensor.
        """
        raise NotImplementedError
