"""Writing into files that another process creates and commits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from ..contents import Extent
from .staging import Output, Writer

__all__ = ["Follower", "Outline"]

_THERE = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class Outline(NamedTuple):
    """What other processes must know of a writer to write into its files.

    Args:
        outputs: its files, without the bytes that it has written already.
        places: key -> where its bytes go.
    """

    outputs: tuple[Output, ...]
    places: Mapping[str, Extent]

    @classmethod
    def of(cls, writer: Writer) -> Outline:
        """The outline of a writer that has been entered."""
        return cls(tuple(replace(output, head=b"") for output in writer._outputs), writer.places)


class Follower(Writer):
    """Writes into the files of a writer in another process, under their temporary names, and never names them."""

    def __init__(self, outline: Outline) -> None:
        super().__init__(outline.outputs, dict(outline.places))

    def _create(self) -> None:
        """Do nothing: the files are there."""

    def _begin(self, output: Output) -> int:
        return os.open(output.temporary, _THERE)

    def commit(self) -> None:
        """Make durable what was written here."""
        with self._undone():
            for name in self._identities.keys() - self._synced:
                with self._descriptors.using(name) as descriptor:
                    self._durability.keep(descriptor)
            self._close()

    def abort(self) -> None:
        """Close the files; the process that made them removes them."""
        self._close()
