"""Sharing blocks between files where the file system can (XFS, btrfs): a copy that moves no bytes."""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterable

__all__ = ["BLOCK", "clone_range", "padding"]

BLOCK = 4096
_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range), see ioctl_ficlonerange(2)


def clone_range(target: int, offset: int, source: int, source_offset: int, nbytes: int) -> bool:
    """Let a run of whole blocks of one open file be a run of another; whether the file system did it."""
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, source_offset, nbytes, offset))
    except OSError:
        return False
    return True


def padding(runs: Iterable[tuple[int, int, int]]) -> int:
    """By how many bytes to shift targets so that most bytes keep their place within a block; a multiple of 8.

    >>> padding([(1000, 4096 + 1096, 10), (0, 8, 15), (10, 18, 5)]), padding([(0, 3, 100)])
    (8, 0)

    Args:
        runs: (target offset, source offset, bytes).
    """
    weights: dict[int, int] = {}
    for offset, source_offset, nbytes in runs:
        shift = (source_offset - offset) % BLOCK
        weights[shift] = weights.get(shift, 0) + nbytes
    fitting = [shift for shift in weights if shift % 8 == 0]
    return max(fitting, key=lambda shift: (weights[shift], -shift), default=0)
