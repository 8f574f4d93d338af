"""The formats that come with the package and are more than one module each, as objects of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..contents import Contents
from .format import Announced, Format
from .opened_source import OpenedSource
from .safetensors import CHANGING, MAX_HEADER, read_safetensors
from .torch_export import is_export
from .torch_zip import holds_pickle

if TYPE_CHECKING:
    from ..output.staging import Writer

__all__ = ["LegacyTorchFormat", "PickleFormat", "SafetensorsFormat", "TorchExportFormat", "TorchZipFormat"]

_LEGACY_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # the pickled number that opens every legacy torch file


class SafetensorsFormat(Format):
    """A header of JSON, then the tensors' bytes."""

    name = "safetensors"
    text = "a safetensors file"
    suffixes = (".safetensors",)
    writes = (".safetensors",)
    resumes = True

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether a header's length and the beginning of its JSON stand at the start."""
        return int.from_bytes(head[:8], "little") <= MAX_HEADER and head[8:].lstrip(b" \t\r\n").startswith(
            (b"{", CHANGING)
        )

    def read(self, opened: OpenedSource) -> Contents:
        """Return the header's tensors."""
        return read_safetensors(opened)

    def writer(self, announced: Announced) -> Writer:
        """Return a writer of one file."""
        from ..output.safetensors_writer import file_writer

        a = announced
        return file_writer(a.path, a.specs, a.aliases, a.metadata, a.resume, a.lies, a.durability)


class TorchExportFormat(Format):
    """Archives of `torch.export.save`."""

    name = "torch-export"
    text = "an archive of torch.export"
    suffixes = (".pt2",)

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether the names are those of an exported program."""
        return is_export(names)

    def read(self, opened: OpenedSource) -> Contents:
        """Return the parameters and persistent buffers."""
        from .torch_export import read_torch_export

        return read_torch_export(opened.archive)


class TorchZipFormat(Format):
    """Zip files of `torch.save` and TorchScript."""

    name = "zip"
    text = "a torch file"
    suffixes = (".pt", ".pth", ".bin", ".ckpt")
    writes = suffixes
    holds_extras = True
    executes = True

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether a `data.pkl` is in it."""
        return holds_pickle(names)

    def read_below(self, opened: OpenedSource, subtree: str | None) -> Contents:
        """Return the tensors of the model in it."""
        from .torch_zip import read_torch_zip

        return read_torch_zip(opened, subtree)

    def writer(self, announced: Announced) -> Writer:
        """Return a writer of a zip file as `torch.save` lays it out."""
        from ..output.torch_writer import TorchZipWriter

        a = announced
        return TorchZipWriter(
            a.path,
            a.specs,
            aliases=a.aliases,
            metadata=a.metadata,
            extras=a.extras,
            frame=a.frame,
            durability=a.durability,
        )


class LegacyTorchFormat(Format):
    """Torch's files from before version 1.6."""

    name = "legacy"
    text = "a legacy torch file"
    executes = True

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether torch's magic number is pickled at the start."""
        return _is_pickle(head) and _LEGACY_TORCH in head[:24]

    def read_below(self, opened: OpenedSource, subtree: str | None) -> Contents:
        """Return the tensors of the model in it."""
        from .torch_legacy import read_torch_legacy

        return read_torch_legacy(opened, subtree)


class PickleFormat(Format):
    """Plain pickles of arrays or tensors."""

    name = "pickle"
    text = "a plain pickle"
    suffixes = (".pdparams", ".pkl")
    executes = True

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether a pickle of protocol 2 to 5 begins here, whatever is in it."""
        return _is_pickle(head) and _LEGACY_TORCH not in head[:24]

    def read_below(self, opened: OpenedSource, subtree: str | None) -> Contents:
        """Return the arrays and tensors of the model in it."""
        from .plain_pickle import read_pickle

        return read_pickle(opened, subtree)


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
