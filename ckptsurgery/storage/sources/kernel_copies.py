"""Copying between open files inside the kernel: no byte passes through this process.

A file system that can (XFS, btrfs) shares whole blocks instead of copying them; `padding` keeps data at the same place
within a block, which is what sharing needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

__all__ = ["BLOCK", "KERNEL_PIECE", "copy_range", "padding"]

BLOCK = 4096

KERNEL_PIECE = 64 << 20
"""Bytes that one call copies: larger ones gain nothing, and a signal waits until the call returns."""


def copy_range(source: int, offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Copy bytes between two open files in the kernel; return how many were copied.

    Fewer than asked for means that the kernel refused or that a file failed or ended. The cause is not reported,
    because the kernel's error does not say which of the two files it is about: the caller copies the rest through
    memory, and meets the same error there, at the file that has it.

    Args:
        source, offset: descriptor, and the first byte to read.
        target, target_offset: descriptor open for writing, and the first byte to write. Its position may change.
        nbytes: how many bytes.
    """
    done = 0
    for step in (_by_range, _by_sendfile):
        try:
            while done < nbytes:
                count = step(source, offset + done, target, target_offset + done, nbytes - done)
                if not count:
                    break
                done += count
        except OSError:
            continue
    return done


def _by_range(source: int, offset: int, target: int, target_offset: int, nbytes: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return _again(lambda: os.copy_file_range(source, target, nbytes, offset, target_offset))


def _by_sendfile(source: int, offset: int, target: int, target_offset: int, nbytes: int) -> int:
    """Copy between two file systems, which `copy_file_range` refuses since Linux 5.19."""
    os.lseek(target, target_offset, os.SEEK_SET)
    return _again(lambda: os.sendfile(target, source, offset, nbytes))


def _again(call: Callable[[], int]) -> int:
    """Repeat a call that a signal interrupted; Python has run the signal's handler by then."""
    while True:
        try:
            return call()
        except InterruptedError:
            continue


def padding(runs: Iterable[tuple[int, int, int]]) -> int:
    """Return by how many bytes to shift targets so that most bytes keep their place within a block; a multiple of 8.

    >>> padding([(1000, 4096 + 1096, 10), (0, 8, 15), (10, 18, 5)]), padding([(0, 3, 100)])
    (8, 0)
    >>> padding([(0, 16, 1), (0, 8, 1)])
    8

    Args:
        runs: (target offset, source offset, bytes).
    """
    weights: dict[int, int] = {}
    for offset, source_offset, nbytes in runs:
        shift = (source_offset - offset) % BLOCK
        weights[shift] = weights.get(shift, 0) + nbytes
    fitting = [shift for shift in weights if shift % 8 == 0]
    return max(fitting, key=lambda shift: (weights[shift], -shift), default=0)
