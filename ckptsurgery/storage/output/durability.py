"""Whether what is written is on the disk when it takes its name, or some time later, as the system sees fit."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SYNCED", "Durability"]


@dataclass(frozen=True, slots=True)
class Durability:
    """How files and names are made to last.

    Args:
        sync: wait for the disk; else a power failure may take what was written, or a part of it.
    """

    sync: bool = True

    def begin(self, descriptor: int, start: int, nbytes: int) -> None:
        """Have the system begin with a part of a file now, so that little is left to wait for at the end."""
        # "Not needed" makes a file system start on what is dirty; what is not on the disk yet stays in memory.
        if self.sync and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_DONTNEED)

    def keep(self, descriptor: int) -> None:
        """Wait until all that was written to a file is on the disk."""
        if self.sync:
            os.fsync(descriptor)

    def keep_names(self, folder: Path) -> None:
        """Wait until the names in a folder are."""
        if not self.sync:
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


SYNCED = Durability()
