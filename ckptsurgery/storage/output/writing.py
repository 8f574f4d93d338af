"""`open_writer`: which format an output path asks for, and what must not be overwritten."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, Diagnostic, Remedy
from ...narrowing import present
from ...specs import TensorSpec
from ...wording import shown_keys
from ..checkpoint import Checkpoint
from ..formats.format import Announced, Format
from ..formats.sniffing import FileReader
from ..formats.table import writable, writable_suffixes
from ..sources.system_errors import os_error
from ..unpickling.frames import Frame
from .durability import Durability
from .safetensors_writer import folder_writer
from .staging import Writer
from .uploading import is_address

__all__ = [
    "PLAIN",
    "Writer",
    "WriterOptions",
    "holds_extras",
    "names_folder",
    "open_staged",
    "open_writer",
    "others_in",
    "parse_size",
]

_UNWRITTEN = (
    ".h5",
    ".hdf5",
    ".keras",
    ".npy",
    ".onnx",
    ".pdparams",
    ".pkl",
    ".tar",
    ".zip",
    ".json",
)
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".ckpt", ".bin.index.json")


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """What an output holds beside its tensors, and how it takes its place.

    Args:
        aliases: other name -> key, for tied tensors that are stored once.
        metadata: string metadata to keep.
        extras: what is no tensor; a torch file holds it, safetensors cannot.
        frame: where in a torch file the tensors lie among the extras.
        max_shard_size: bytes of tensors in a shard, as a number or like `"5GB"`, `"5GiB"`; for folders.
        overwrite: replace what is there. Files that are being read may be it: their readers keep them.
        resume: a tag that tells this run's inputs and rules from all others; what an interrupted run with the same tag
            left is not written again, and this one leaves its own when it is interrupted. For safetensors.
        source_offsets: key -> offset in its source file of a tensor that is copied as it is: blocks can be shared.
        companions: small files that go along into a folder, name -> content.
        sync: wait until all of it is on the disk; whoever resumes always does.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, Any] = field(default_factory=dict)
    frame: Frame | None = None
    max_shard_size: int | str | None = None
    overwrite: bool = False
    resume: str | None = None
    source_offsets: Mapping[str, int] = field(default_factory=dict)
    companions: Mapping[str, bytes] = field(default_factory=dict)
    sync: bool = True


PLAIN = WriterOptions()
"""Tensors alone, into a place that is free."""


def open_writer(
    path: str | os.PathLike[str], specs: Mapping[str, TensorSpec], options: WriterOptions = PLAIN
) -> Writer:
    """A writer for the tensors announced by `specs`, in the format that the path asks for.

    `x.safetensors` is one file; `x.pt`, `x.pth`, `x.bin`, `x.ckpt` a torch zip; any other name is a folder with
    `model.safetensors`, or with shards and their index. Nothing is written before the writer is entered.

    Args:
        specs: key -> spec of every tensor, in the order that a reader should see.
        options: what goes along, and how the output takes its place.

    Raises:
        CheckpointError: the output exists, the format cannot hold a tensor, or a size is none.
    """
    o, target = options, Path(path).expanduser()
    announced = Announced(
        target, specs, o.aliases, o.metadata, o.extras, o.frame, o.resume, o.source_offsets, Durability(o.sync)
    )
    limit = None if o.max_shard_size is None else parse_size(o.max_shard_size)
    if names_folder(os.fspath(path), target):
        _check_folder(target, o.overwrite)
        return folder_writer(announced, limit, o.companions)
    format = present(writable(target.suffix.lower()), "the format of a name that is not a folder's")
    _check_file(target, format, o)
    return format.writer(announced)


def holds_extras(path: str | os.PathLike[str]) -> bool:
    """Whether an output of this name can hold more than tensors.

    >>> holds_extras("x.pt"), holds_extras("x.safetensors"), holds_extras("folder/")
    (True, False, False)

    Raises:
        CheckpointError: no output can have this name.
    """
    target = Path(path).expanduser()
    format = None if names_folder(os.fspath(path), target) else writable(target.suffix.lower())
    return format is not None and format.holds_extras


def names_folder(path: str, target: Path) -> bool:
    """Whether an output is to be a folder."""
    if not path:
        # Path("") is the current folder, which an unset variable in a shell does not mean
        raise CheckpointError(Diagnostic("no-output", "the output has no name", help="name a file or a folder"))
    if is_address(path):
        text, meant = (
            f"{path!r} is an address, and this writes local files",
            Remedy("path", "out/", "is a local folder"),
        )
        raise CheckpointError(Diagnostic("unsupported-output", text, path, remedies=(meant,)))
    try:
        if "\0" in path:
            raise OSError(errno.EINVAL, "a NUL character")
        if path.endswith("/") or target.is_dir():
            return True
    except OSError as error:
        raise os_error(error, str(target), "write") from error
    suffix = target.suffix.lower()
    if writable(suffix) is not None:
        return False
    if suffix in _UNWRITTEN:
        text = f"{suffix} files are not written here"
        meant = Remedy("path", str(target.with_suffix(".safetensors")), "can be written")
        raise CheckpointError(Diagnostic("unsupported-output", text, str(target), remedies=(meant,)))
    near = get_close_matches(suffix, writable_suffixes(), 1, cutoff=0.8)
    if near:
        text = f"{suffix!r} is not the suffix of a format, and a folder of this name is hardly meant"
        meant = Remedy("path", str(target.with_suffix(near[0])), "is a file")
        folder = Remedy("path", f"{path}/", "is a folder")
        raise CheckpointError(Diagnostic("unsupported-output", text, str(target), remedies=(meant, folder)))
    return True


def _check_file(target: Path, format: Format, options: WriterOptions) -> None:
    """Refuse what one file cannot be, and one that is there already."""
    folder = (Remedy("path", f"{target.with_suffix('')}/", "names a folder"),)
    if options.companions:
        text = "config and tokenizer files go along into a folder, and the output is one file"
        raise CheckpointError(Diagnostic("companions-need-a-folder", text, str(target), remedies=folder))
    if options.max_shard_size is not None:
        text = "max_shard_size makes several files, and a file was named"
        raise CheckpointError(Diagnostic("shards-need-a-folder", text, str(target), remedies=folder))
    if os.path.lexists(target) and not options.overwrite:  # a link that leads nowhere would be replaced as well
        raise _exists(target, ())
    if options.resume is not None and not format.resumes:
        text = f"writing a {target.suffix.lower()} file cannot be resumed"
        meant = Remedy("path", str(target.with_suffix(".safetensors")), "can be resumed")
        advice = "or do without resume"
        raise CheckpointError(Diagnostic("not-resumable", text, str(target), remedies=(meant,), advice=advice))


def open_staged(writer: Writer, subtree: str | None = None) -> Checkpoint:
    """What a writer has finished and not committed, read from the files under their temporary names.

    Args:
        subtree: where in the file the tensors lie; None finds them.

    Raises:
        CheckpointError: what was written is no checkpoint.
    """
    path, places = writer.staged
    return Checkpoint(FileReader(places).read(path, subtree), writer.files[-1])


def _check_folder(target: Path, overwrite: bool) -> None:
    try:
        if target.exists() and not target.is_dir():
            text = f"{str(target)!r} is a file, and a folder of that name should be written"
            meant = Remedy("path", f"{target}.safetensors", "is a file beside it")
            advice = "or name another folder"
            raise CheckpointError(Diagnostic("output-exists", text, str(target), remedies=(meant,), advice=advice))
        found = (
            sorted(file.name for file in target.iterdir() if file.name.endswith(_WEIGHTS)) if target.exists() else []
        )
    except OSError as error:
        raise os_error(error, str(target), "write") from error
    if found and not overwrite:
        raise _exists(target, found)


def others_in(folder: Path, written: Collection[str]) -> list[str]:
    """Return the files of weights in a folder that a finished save did not write."""
    own = {os.path.realpath(file) for file in written}
    found = sorted(file for file in folder.iterdir() if file.name.endswith(_WEIGHTS)) if folder.is_dir() else []
    return [file.name for file in found if os.path.realpath(file) not in own and not file.name.startswith(".")]


def _exists(target: Path, found: Iterable[str]) -> CheckpointError:
    text = f"{str(target)!r} exists already" if not found else f"the folder {str(target)!r} holds a checkpoint already"
    replaced, advice = Remedy("overwrite", True, "replaces it"), "or choose another name"
    notes = shown_keys(found)
    return CheckpointError(Diagnostic("output-exists", text, str(target), notes, remedies=(replaced,), advice=advice))


def parse_size(size: int | str) -> int:
    """Bytes, from a number or from text with a decimal or a binary unit.

    >>> parse_size("5GB"), parse_size("5GiB"), parse_size("500 MB"), parse_size("1.5kB"), parse_size(4096)
    (5000000000, 5368709120, 500000000, 1500, 4096)

    Raises:
        CheckpointError: no size, or one below a byte.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
        known = match is not None and bool(match[2] or not match[3])
        power = "KMGT".index(match[2].upper()) + 1 if match and match[2] else 0
        found = int(float(match[1]) * (1024 if match[3] else 1000) ** power) if match and known else 0
    if found < 1:
        raise CheckpointError(
            Diagnostic(
                "bad-size",
                f"{size!r} is no size",
                help='such as "5GB" (decimal), "5GiB" (binary), or a number of bytes',
            )
        )
    return found
