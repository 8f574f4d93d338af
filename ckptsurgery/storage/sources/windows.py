"""Mappings of files that many tensors share: each holds a descriptor as long as one of its tensors lives."""

from __future__ import annotations

import mmap
import threading
import weakref

from .descriptors import fair_share

__all__ = ["Windows"]

_ALONE = 64
_FIRST = 64 << 20


class Windows:
    """Private, writable mappings of parts of files.

    While few are alive, each is as large as what was asked for, so that what nobody uses is given back at once. A
    process that holds on to thousands of tensors gets larger ones, twice as large each time that many are alive.
    """

    def __init__(self) -> None:
        self._alive: dict[str, list[tuple[int, int, weakref.ref[mmap.mmap]]]] = {}
        self._lock = threading.Lock()
        self._most = fair_share()

    def over(self, path: str, descriptor: int, offset: int, nbytes: int, size: int) -> tuple[mmap.mmap, int] | None:
        """A mapping that holds the range, and where the range starts in it; None if there is none, or they are many.

        Args:
            size: of the file, which no mapping exceeds.
        """
        start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self._lock:
            count = self._count()
            for first, end, ref in self._alive.get(path, ()) if count > _ALONE else ():
                if first <= offset and offset + nbytes <= end and (found := ref()) is not None:
                    return found, offset - first
            if count >= self._most:
                return None
            wide = 0 if count < _ALONE else _FIRST << (count // _ALONE - 1)
            stop = min(size, max(offset + nbytes, start + wide))
            try:
                made = mmap.mmap(descriptor, stop - start, access=mmap.ACCESS_COPY, offset=start)
            except (OSError, ValueError):
                return None
            self._alive.setdefault(path, []).append((start, stop, weakref.ref(made)))
            return made, offset - start

    def _count(self) -> int:
        for path, some in list(self._alive.items()):
            kept = [window for window in some if window[2]() is not None]
            if kept:
                self._alive[path] = kept
            else:
                del self._alive[path]
        return sum(map(len, self._alive.values()))
