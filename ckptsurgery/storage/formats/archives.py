"""Archives around a checkpoint: compressed files, and tar archives such as NeMo's."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from typing import Any

from ...errors import CheckpointError, Diagnostic
from ...wording import shown_keys
from ..contents import Contents
from ..sources.unpacked import UNPACKED, compression_of, unpack, unpack_command
from .format import Format, OpenedSource
from .inner import open_part

__all__ = ["CompressedFormat", "TarFormat"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pdparams", ".pkl", ".joblib", ".npz", ".npy", ".h5",
            ".hdf5", ".keras", ".msgpack", ".onnx", ".gguf")  # fmt: skip
_CONFIGS = (".yaml", ".yml")
_SHORT = 1 << 20
_MEMBERS = 100_000
_OLD_TORCH = {"sys_info", "pickle", "storages", "tensors"}


class CompressedFormat(Format):
    """A file that is compressed as a whole, whatever it holds; joblib writes such files."""

    name = "compressed"
    text = "a compressed file"
    suffixes = (".gz", ".bz2", ".xz", ".lzma")

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether a stream of gzip, zlib, bzip2, xz or lzma begins."""
        return compression_of(head) is not None

    def read_below(self, opened: OpenedSource, subtree: str | None) -> Contents:
        """Unpack the file, and return the contents of the checkpoint in it.

        Raises:
            CheckpointError: the file is damaged, too large, or compressed more than once.
        """
        kind = compression_of(opened.head) or ""
        source = unpack(opened.source, kind)
        with OpenedSource(source) as inner:
            if compression_of(inner.head) is not None:
                text = f"{opened.name!r} is compressed more than once, which is not read here"
                help = f"unpack it: {unpack_command(kind, opened.name)}"
                raise CheckpointError(Diagnostic("unsupported-format", text, opened.name, help=help))
            contents = opened.nested(inner, subtree)
        contents.sources[source.name] = source
        return contents


class TarFormat(Format):
    """A tar archive with one checkpoint in it, such as a `.nemo` file."""

    name = "tar"
    text = "a tar archive"
    suffixes = (".nemo", ".tar")

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether tar's magic bytes are where they belong."""
        return head[257:262] == b"ustar"

    def read_below(self, opened: OpenedSource, subtree: str | None) -> Contents:
        """Return the contents of the one checkpoint in it; short YAML files beside it are among the extras, as text.

        Raises:
            CheckpointError: it is damaged, or holds none or several checkpoints.
        """
        members = _members(opened)
        weights = [name for name in members if name.endswith(_WEIGHTS)]
        if len(weights) != 1:
            raise CheckpointError(_problem(opened.name, list(members), weights))
        contents = open_part(opened, *members[weights[0]], lambda inner: opened.nested(inner, subtree))
        for name, (start, nbytes) in members.items():
            if name.endswith(_CONFIGS) and nbytes <= _SHORT:
                contents.extras.setdefault(name, opened.read_at(start, nbytes).decode("utf-8", "replace"))
        return contents


class _Bounded(io.RawIOBase):
    """The file for `tarfile`, which asks for as many bytes as a header announces."""

    def __init__(self, opened: OpenedSource) -> None:
        super().__init__()
        self._opened, self._at = opened, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (self._opened.size if whence == io.SEEK_END else self._at if whence else 0))
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        data = self._opened.read_at(self._at, self._opened.size if size is None or size < 0 else size)
        self._at += len(data)
        return data


def _members(opened: OpenedSource) -> dict[str, tuple[int, int]]:
    """Name of each file in it -> where its bytes begin, and how many there are."""
    found: dict[str, tuple[int, int]] = {}
    try:
        file: Any = _Bounded(opened)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isreg() and not member.issparse():
                    end = member.offset_data + member.size
                    if member.size < 0 or end > opened.size or len(found) > _MEMBERS:
                        raise tarfile.ReadError("a member reaches past its end")
                    found[member.name.removeprefix("./")] = member.offset_data, member.size
            behind = archive.offset  # of the zeros that end an archive
    except (tarfile.TarError, ArithmeticError, LookupError, ValueError, EOFError, RecursionError) as error:
        text = f"{opened.name!r} is a damaged tar archive: {str(error)[:200]}"
        help = "copy or download it again: it may be truncated"
        raise CheckpointError(Diagnostic("damaged-zip", text, opened.name, help=help)) from None
    opened.refuse_behind(behind)
    return found


def _problem(path: str, names: Sequence[str], weights: Sequence[str]) -> Diagnostic:
    packed = path.removesuffix(UNPACKED)  # tar unpacks a compressed file, too
    unpacked = f"unpack it: mkdir new_folder && tar -xf {packed!r} -C new_folder"
    if {*names} >= _OLD_TORCH:
        text = f"{path!r} is a torch file from before version 0.2, which is not read here"
        help = f"import torch; torch.save(torch.load({path!r}, weights_only=False), 'new.pt')"
        return Diagnostic("unsupported-format", text, path, help=f"if you trust the file, whose code runs: {help}")
    if any(name.endswith(".distcp") for name in names):
        text = f"{path!r} is a tar archive of a distributed checkpoint, which is not read here"
        return Diagnostic("unsupported-format", text, path, help=f"{unpacked}; then open the folder")
    if weights:
        text = f"{path!r} is a tar archive of several checkpoints"
        return Diagnostic("ambiguous-folder", text, path, shown_keys(weights, 12), help=unpacked)
    text = f"{path!r} is a tar archive without a checkpoint"
    shown = shown_keys([f"there is {name}" for name in names], 10) or ("it is empty",)
    return Diagnostic("nothing-to-read", text, path, shown, help="name another file")
