"""The table of formats: the package's own in the order in which they are tried, then those of installed packages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

from ...errors import CheckpointError, Diagnostic
from ..contents import Contents
from .format import Announced, Format, OpenedSource
from .safetensors import CHANGING, MAX_HEADER, read_safetensors

if TYPE_CHECKING:
    from ..output.staging import Writer

__all__ = [
    "GROUP",
    "LegacyTorchFormat",
    "PickleFormat",
    "SafetensorsFormat",
    "TorchExportFormat",
    "TorchZipFormat",
    "formats",
    "recognised",
    "suffixes_of_packages",
    "writable",
    "writable_suffixes",
]

# A dictionary or a list, or a class and its arguments, as protocols 0 and 1 begin: they have no number in front.
_OLD_PICKLE = re.compile(
    rb"(?:[}\]]q[\0\1]|\([dl]p\d+\n|c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n(?:p\d+\n|q.)?[()])", re.DOTALL
)
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

        return file_writer(announced)


class TorchExportFormat(Format):
    """Archives of `torch.export.save`."""

    name = "torch-export"
    text = "an archive of torch.export"
    suffixes = (".pt2",)

    def recognise(self, head: bytes, names: Sequence[str]) -> bool:
        """Return whether the names are those of an exported program, of any version."""
        last = {name.rpartition("/")[2] for name in names}
        return "archive_format" in last or "serialized_exported_program.json" in last

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
        """Return whether a `data.pkl` is at the top or one folder down."""
        return any(name.endswith("data.pkl") and name.count("/") <= 1 for name in names)

    def read_below(self, opened: OpenedSource, subtree: str | None) -> Contents:
        """Return the tensors of the model in it."""
        from .torch_zip import read_torch_zip

        return read_torch_zip(opened, subtree)

    def writer(self, announced: Announced) -> Writer:
        """Return a writer of a zip file as `torch.save` lays it out."""
        from ..output.torch_writer import TorchZipWriter

        return TorchZipWriter(announced)


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
        """Return whether a pickle begins here, whatever is in it."""
        return (_is_pickle(head) and _LEGACY_TORCH not in head[:24]) or _OLD_PICKLE.match(head) is not None

    def read_below(self, opened: OpenedSource, subtree: str | None) -> Contents:
        """Return the arrays and tensors of the model in it."""
        from .plain_pickle import read_pickle

        return read_pickle(opened, subtree)


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


GROUP = "ckptsurgery.formats"
"""The group of entry points by which a package offers formats of its own."""

# safetensors before the magic numbers: a header of 640 bytes makes a file begin like a pickle.
_BUILTIN = (
    "table:SafetensorsFormat",
    "table:TorchExportFormat",
    "table:TorchZipFormat",
    "npz:NpzFormat",
    "table:LegacyTorchFormat",
    "table:PickleFormat",
    "npz:NpyFormat",
    "gguf:GgufFormat",
    "hdf5:Hdf5Format",
    "keras_zip:KerasFormat",
    "archives:CompressedFormat",
    "archives:TarFormat",
    "flax_msgpack:FlaxFormat",
    "onnx:OnnxFormat",
)
"""Module and class of each format: what is recognised early needs none of the modules behind it."""


def formats() -> Iterator[Format]:
    """Yield all formats in the order in which they are tried; packages are asked last.

    >>> [format.name for format in formats()][:3]
    ['safetensors', 'torch-export', 'zip']
    """
    yield from map(_builtin, _BUILTIN)
    yield from _of_packages()


@cache
def _builtin(place: str) -> Format:
    module, _, kind = place.partition(":")
    made: Format = getattr(import_module(f".{module}", __package__), kind)()
    return made


def recognised(head: bytes, names: Sequence[str] = ()) -> Format | None:
    """Return the format of a file, or None.

    >>> recognised(b"\\x93NUMPY\\x01\\x00").name, recognised(b"what is this")
    ('npy', None)

    Args:
        head: its first kilobyte.
        names: the names in it, where it is a zip file.
    """
    return next((format for format in formats() if format.recognise(head, names)), None)


def writable(suffix: str) -> Format | None:
    """Return the format that a name with this suffix asks for as output, or None."""
    return next((format for format in formats() if suffix in format.writes), None) if suffix else None


def writable_suffixes() -> tuple[str, ...]:
    """Return the suffixes that ask for a format as output."""
    return tuple(suffix for format in formats() for suffix in format.writes)


def suffixes_of_packages() -> tuple[str, ...]:
    """Return how the files of installed packages' formats end."""
    return tuple(suffix for format in _of_packages() for suffix in format.suffixes)


@lru_cache(maxsize=1)
def _of_packages() -> tuple[Format, ...]:
    from importlib.metadata import entry_points

    found: list[Format] = []
    for point in entry_points(group=GROUP):
        try:
            made = point.load()
            found.append(made() if isinstance(made, type) else made)
            if not isinstance(found[-1], Format):
                raise TypeError(f"it is a {type(found[-1]).__name__}, not a Format")
        except Exception as error:  # a package's own fault, whatever it is, is told with its name
            text = f"the format {point.name} = {point.value!r} of an installed package cannot be loaded: {error}"
            help = "update or uninstall the package"
            raise CheckpointError(Diagnostic("bad-format", text, point.value, help=help)) from error
    return tuple(found)
