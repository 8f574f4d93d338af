"""What a file is, by its first bytes: a suffix is a hint for people only."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path

from ...errors import CheckpointError, Diagnostic, Remedy
from ..contents import Contents
from ..sources.byte_source import LocalFile
from ..sources.system_errors import os_error
from ..subtree import enter
from ..text import close_keys
from .recognising import HEADS, head_problem
from .safetensors import CHANGING, MAX_HEADER, read_safetensors
from .sharded import read_index

__all__ = ["kind_of", "read_file"]

_HEAD = 1024
_LEGACY_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # the pickled number that opens every legacy torch file
_LFS = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")


def read_file(
    path: str, subtree: str | None = None, *, shard: bool = False, places: Mapping[str, str] = {}
) -> Contents:
    """What one file holds, whatever its suffix says.

    Args:
        path: the file.
        subtree: a dotted path to what should be read.
        shard: an index names it.
        places: path -> where its file lies as yet, after a save that was interrupted (see `transactions`).

    Raises:
        CheckpointError: the file is missing, empty, damaged, no checkpoint, or of a format that is not read here.
    """
    path = places.get(path, path)
    with _opened(path) as file:
        # Taken before anything is read: whatever changes from here on is noticed when the data is read.
        before = LocalFile.of(path, os.fstat(file.fileno()))
        try:
            contents = _read_opened(path, subtree, file, shard, places)
        except _UNFORESEEN as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(_unforeseen(path, error)) from error
    contents.sources[path] = before
    return contents


def _read_opened(path: str, subtree: str | None, file: FileIO, shard: bool, places: Mapping[str, str]) -> Contents:
    def entered(contents: Contents) -> Contents:
        return enter(contents, subtree, path) if subtree else contents

    head = file.read(_HEAD)
    kind = kind_of(head, os.fstat(file.fileno()).st_size)
    if kind == "safetensors" or (kind == "unknown" and path.endswith(".safetensors")):
        return read_safetensors(path, subtree, file)
    if kind == "zip":
        from .zip_files import read_zip

        return read_zip(path, subtree)
    if kind == "legacy":
        from .torch_legacy import read_torch_legacy

        return read_torch_legacy(path, subtree)
    if kind == "pickle":
        from .plain_pickle import read_pickle

        return read_pickle(path, subtree)
    if kind == "npy":
        from .npz import read_npy

        return entered(read_npy(path))
    if kind == "json" and _names_shards(path):
        if shard:
            text = f"{path!r}, which an index names as a shard, is an index itself"
            raise CheckpointError(Diagnostic("nested-index", text, path, help="an index names files that hold tensors"))
        contents = read_index(path, partial(read_file, shard=True, places=places), places)
        return entered(contents)
    raise CheckpointError(_refusal(path, kind, head))


def kind_of(head: bytes, size: int) -> str:
    """The kind of a file from its first kilobyte.

    >>> kind_of(b"PK\\x03\\x04archive/data.pkl", 1000), kind_of(b"\\x10" + bytes(7) + b'{"w":{"dtype"', 1000)
    ('zip', 'safetensors')
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if size == 0:
        return "empty"
    # Before the magic numbers: a header of 640 bytes makes a safetensors file begin like a pickle.
    if int.from_bytes(head[:8], "little") <= MAX_HEADER and head[8:].lstrip(b" \t\r\n").startswith((b"{", CHANGING)):
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "legacy" if _LEGACY_TORCH in head[:24] else "pickle"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(_LFS):
        return "lfs"
    if HEADS["openvino"][0](head):
        return "openvino"
    if text[:9].lower().startswith(_HTML):
        return "html"
    if text.startswith((b"{", b"[")):
        return "json"
    if head[257:262] == b"ustar":
        return "tar"
    for kind, (recognised, _) in HEADS.items():
        if recognised(head):
            return kind
    return "text" if size >= 8 and text.isascii() and all(byte >= 9 for byte in text) else "unknown"


# What a reader does not answer for itself is a fault in it: the fuzzers take this answer for a broken promise.
_UNFORESEEN = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


def _unforeseen(path: str, error: Exception) -> Diagnostic:
    return Diagnostic(
        "unforeseen",
        f"{path!r} is damaged in a way that its reader did not foresee: {type(error).__name__}: {error}",
        path,
        help="copy or download it again; if it is sound elsewhere, please report it with the file",
    )


@contextmanager
def _opened(path: str) -> Iterator[FileIO]:
    """The file, opened once for all that its header needs."""
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
    try:
        with Path(path).open("rb", buffering=0) as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(_missing(path)) from None
    except OSError as error:
        raise os_error(error, path) from error


def _missing(path: str) -> Diagnostic:
    folder, name = str(Path(path).parent), Path(path).name
    help, right = "check the path", None
    if Path(path).is_symlink():
        return Diagnostic(
            "missing-file",
            f"{path!r} is a link to a file that does not exist",
            path,
            help="download or copy the file itself",
        )
    if Path(folder).is_dir():
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


def _names_shards(path: str) -> bool:
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return b'"weight_map"' in file.read(min(size, MAX_HEADER))
    except OSError as error:
        raise os_error(error, path) from error


def _refusal(path: str, kind: str, head: bytes) -> Diagnostic:
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
    if kind == "tar":
        text = f"{path!r} is a tar archive, which is not read here"
        return Diagnostic(
            "unsupported-format",
            text,
            path,
            help="unpack it: tar -xf; a torch 0.1 checkpoint: torch.load and torch.save it",
        )
    if kind == "text":
        text = f"{path!r} is a text file, not a checkpoint"
        return Diagnostic("text-file", text, path, (f"begins {shown!r}",), help="check what was downloaded")
    text = f"{path!r} is of no format known here; it begins with the bytes {head[:8].hex(' ')}"
    return Diagnostic(
        "unknown-format", text, path, help="safetensors files, torch files and indices of shards are read"
    )
