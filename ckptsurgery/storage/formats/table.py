"""The table of formats: the package's own in the order in which they are tried, then those of installed packages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from ...errors import CheckpointError, Diagnostic
from .builtin import LegacyTorchFormat, PickleFormat, SafetensorsFormat, TorchExportFormat, TorchZipFormat
from .format import Format
from .gguf import GgufFormat
from .npz import NpyFormat, NpzFormat

__all__ = ["GROUP", "formats", "recognised", "suffixes_of_packages", "writable"]

GROUP = "ckptsurgery.formats"
"""The group of entry points by which a package offers formats of its own."""

# safetensors before the magic numbers: a header of 640 bytes makes a file begin like a pickle.
_BUILTIN: tuple[Format, ...] = (
    SafetensorsFormat(),
    TorchExportFormat(),
    TorchZipFormat(),
    NpzFormat(),
    LegacyTorchFormat(),
    PickleFormat(),
    NpyFormat(),
    GgufFormat(),
)


def formats() -> Iterator[Format]:
    """Yield all formats in the order in which they are tried; packages are asked last.

    >>> [format.name for format in formats()][:3]
    ['safetensors', 'torch-export', 'zip']
    """
    yield from _BUILTIN
    yield from _of_packages()


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
