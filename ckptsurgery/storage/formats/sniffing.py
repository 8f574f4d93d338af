"""What a file is, by its first bytes: a suffix is a hint for people only."""

from __future__ import annotations

import os.path
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import CheckpointError, Diagnostic, Remedy
from ...wording import close_keys
from ..contents import Contents
from ..sources.byte_source import LocalFile
from ..sources.system_errors import os_error
from ..subtree import enter
from .format import OpenedSource
from .recognising import HEADS, head_problem, tensorflow_problem, zip_problem
from .safetensors import MAX_HEADER
from .sharded import read_index
from .table import SafetensorsFormat, recognised

__all__ = ["FileReader", "is_index", "kind_of", "read_opened"]

_LFS = b"version https://git-lfs.github.com/spec/"
_ONE_SLASH = re.compile(r"((?:https?|hf|s3|gs|gcs|abfs|az):)/([^/].*)", re.DOTALL)
_HTML = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")


@dataclass(frozen=True, slots=True)
class FileReader:
    """Reads files by their content; whatever their suffixes say.

    Args:
        places: path -> where its file lies as yet, after a save that was interrupted (see `transactions`).
    """

    places: Mapping[str, str] = field(default_factory=dict)

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        return path in self.places or Path(path).exists()

    def read_shard(self, path: str) -> Contents:
        """Read a file that an index names."""
        return self.read(path, shard=True)

    def read(self, path: str, subtree: str | None = None, *, shard: bool = False) -> Contents:
        """Read what one file holds.

        Args:
            path: the file.
            subtree: a dotted path to what should be read.
            shard: an index names it.

        Raises:
            CheckpointError: the file is missing, empty, damaged, no checkpoint, or of a format that is not read here.
        """
        path = self.places.get(path, path)
        source = _local(path)
        try:
            with OpenedSource(source) as opened, _foreseen(path):
                if opened.size and is_index(opened):
                    if shard:
                        raise CheckpointError(_nested(path))
                    contents = read_index(path, self)
                    contents = enter(contents, subtree, path) if subtree else contents
                else:
                    contents = read_opened(opened, subtree)
        except OSError as error:
            raise os_error(error, path) from error
        contents.sources[path] = source  # as it was before anything was read, so that a later change is noticed
        return contents


def read_opened(opened: OpenedSource, subtree: str | None = None) -> Contents:
    """Return the contents of a source by the table of formats.

    Raises:
        CheckpointError: it is empty, damaged, or of no format that is read here.
    """
    path, head = opened.name, opened.head
    with _foreseen(path):
        format = recognised(head, opened.names) if opened.size else None
        if format is None and path.endswith(".safetensors") and kind_of(head, opened.size) == "unknown":
            format = SafetensorsFormat()  # its reader says what is wrong with the header
        if format is None:
            raise zip_problem(opened.names, path) if opened.names else CheckpointError(_refusal(path, opened))
        opened.nested = read_opened
        contents = format.read_below(opened, subtree)
    contents.sources[path] = opened.source
    return contents


def kind_of(head: bytes, size: int) -> str:
    """The kind of a file that is of no format here, from its first kilobyte.

    >>> kind_of(b"<!DOCTYPE html><html>", 1000), kind_of(bytes(range(9)), 1000)
    ('html', 'unknown')
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if size == 0:
        return "empty"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(_LFS):
        return "lfs"
    if HEADS["openvino"][0](head):
        return "openvino"
    if text[:9].lower().startswith(_HTML):
        return "html"
    if text.startswith((b"{", b"[")):
        return "json"
    for kind, (foreign, _) in HEADS.items():
        if foreign(head):
            return kind
    return "text" if size >= 8 and text.isascii() and all(byte >= 9 for byte in text) else "unknown"


# What a reader does not answer for itself is a fault in it: the fuzzers take this answer for a broken promise.
_UNFORESEEN = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


@contextmanager
def _foreseen(path: str) -> Iterator[None]:
    try:
        yield
    except _UNFORESEEN as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_unforeseen(path, error)) from error


def _unforeseen(path: str, error: Exception) -> Diagnostic:
    return Diagnostic(
        "unforeseen",
        f"{path!r} is damaged in a way that its reader did not foresee: {type(error).__name__}: {error}",
        path,
        help="copy or download it again; if it is sound elsewhere, please report it with the file",
    )


def _local(path: str) -> LocalFile:
    """The file as it is now.

    Raises:
        CheckpointError: there is none, or it is not a regular one.
    """
    try:
        status = Path(path).stat()
    except ValueError as error:
        raise CheckpointError(
            Diagnostic("bad-path", f"{path!r} is no path: {error}", repr(path), help="check the path")
        ) from None
    except FileNotFoundError:
        raise CheckpointError(_missing(path)) from None
    except OSError as error:
        raise os_error(error, path) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(
            Diagnostic("not-a-file", f"{path!r} is neither a file nor a folder", path, help="copy it into a file first")
        )
    return LocalFile.of(path, status)


def _nested(path: str) -> Diagnostic:
    text = f"{path!r}, which an index names as a shard, is an index itself"
    return Diagnostic("nested-index", text, path, help="an index names files that hold tensors")


def _missing(path: str) -> Diagnostic:
    folder, name = str(Path(path).parent), Path(path).name
    variables = tensorflow_problem(path, os.path.isfile)
    if variables is not None:
        return variables
    help, right = "check the path", None
    if Path(path).is_symlink():
        return Diagnostic(
            "missing-file",
            f"{path!r} is a link to a file that does not exist",
            path,
            help="download or copy the file itself",
        )
    address = _ONE_SLASH.fullmatch(path)
    if address is not None:
        right = f"{address[1]}//{address[2]}"
        help = f"an address has two slashes, of which pathlib.Path keeps one: give the text {right!r}"
    elif Path(folder).is_dir():
        near = close_keys(name, sorted(file.name for file in Path(folder).iterdir()))
        if near:
            right = str(Path(folder, near[0]))
            help = f"did you mean {right!r}?"
        elif path.count("/") == 1 and not path.startswith((".", "~")):
            right = f"hf://{path}"
            help = f"for a repository of the hub write {right!r}"
    elif path.count("/") == 1 and not path.startswith((".", "~")):
        right = f"hf://{path}"
        help = f"for a repository of the hub write {right!r}"
    else:
        help = f"the folder {folder!r} does not exist either"
    meant = (Remedy("source", {path: right}, kind="instead"),) if right else ()
    return Diagnostic("missing-file", f"no such file or folder: {path!r}", path, help=help, remedies=meant)


def is_index(opened: OpenedSource) -> bool:
    """Whether it is the index of a checkpoint in shards."""
    if int.from_bytes(opened.head[:8], "little") <= MAX_HEADER:
        return False  # the length of a safetensors header may be the number of a brace
    return kind_of(opened.head, opened.size) == "json" and b'"weight_map"' in opened.read_at(0, MAX_HEADER)


def _refusal(path: str, opened: OpenedSource) -> Diagnostic:
    head = opened.head
    kind = kind_of(head, opened.size)
    foreign = head_problem(kind, path)
    if foreign is not None:
        return foreign
    shown = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:80].decode("utf-8", "replace").replace("\n", " ")
    if kind == "empty":
        return Diagnostic("empty-file", f"{path!r} is empty", path, help="download or write the file again")
    if kind == "lfs":
        return Diagnostic(
            "lfs-pointer", f"{path!r} is a Git LFS pointer, not the file itself", path, help="git lfs pull"
        )
    if kind == "html":
        text = f"{path!r} is an HTML page, not a checkpoint"
        return Diagnostic(
            "html-page",
            text,
            path,
            (f"begins {shown!r}",),
            help="download the file itself: its link has /resolve/, not /blob/",
        )
    if kind == "json":
        text = f"{path!r} is JSON text, not a checkpoint"
        help = "an error page was saved in its place? download the file again, signed in if need be"
        return Diagnostic("json-page", text, path, (f"begins {shown!r}",), help=help)
    if kind == "text":
        text = f"{path!r} is a text file, not a checkpoint"
        return Diagnostic("text-file", text, path, (f"begins {shown!r}",), help="check what was downloaded")
    variables = tensorflow_problem(path, os.path.isfile)
    if variables is not None:
        return variables
    text = f"{path!r} is of no format known here; it begins with the bytes {head[:8].hex(' ')}"
    return Diagnostic(
        "unknown-format", text, path, help="safetensors files, torch files and indices of shards are read"
    )
