"""Open files, so many at once and no more: a process may hold a thousand, and a checkpoint may have 10,000 shards."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Descriptor", "Descriptors", "fair_share"]

_MOST = 512


def fair_share() -> int:
    """How many descriptors one reader or one writer may take: a quarter of what the process may have."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if limit == resource.RLIM_INFINITY else max(4, min(_MOST, limit // 4))


class Descriptor:
    """One open file: whoever retires it while it is in use leaves the closing to the last user.

    A number that was closed is given to the next file that anybody opens, and a reader must not find itself there.
    """

    __slots__ = ("_left", "_retired", "_users", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self._left = [number]
        self._users: list[None] = []
        self._retired = False

    def take(self) -> bool:
        """Whether it can be used now; then `give` must follow."""
        # Lists, since to append and to pop are one step each, and cheaper than a lock for 100,000 small reads.
        self._users.append(None)
        if not self._retired:
            return True
        self.give()
        return False

    def give(self) -> None:
        """The use is over."""
        self._users.pop()
        if self._retired:
            self.retire()

    def retire(self) -> None:
        """Close it, now or when the last user is done; a second call does nothing."""
        self._retired = True
        if not self._users:
            try:
                number = self._left.pop()
            except IndexError:
                return
            os.close(number)


class Descriptors:
    """Open files by path; where they are too many, the one that was opened first is closed, and opened again if needed.

    The very first stays: a writer's lock on it tells others that the writer lives.

    Args:
        opened: opens a path; what it raises is raised.
        leaving: hears of a file, before it is closed to make room.
    """

    def __init__(self, opened: Callable[[str], int], leaving: Callable[[str, int], None] | None = None) -> None:
        self._opened, self._leaving = opened, leaving
        self._held: dict[str, Descriptor] = {}
        self._lock = threading.RLock()  # a finalizer may come in the midst
        self._room = fair_share()
        self.closed = False
        self._finalizer = weakref.finalize(self, _retire_all, self._held)

    def take(self, path: str) -> Descriptor:
        """The open file, taken: `give` it when done."""
        while True:
            found = self._held.get(path) or self._open(path)
            if found.take():
                return found

    @contextmanager
    def using(self, path: str) -> Iterator[int]:
        """The number of the open file, which stays open meanwhile."""
        held = self.take(path)
        try:
            yield held.number
        finally:
            held.give()

    def held(self) -> set[str]:
        """The paths that are open now."""
        with self._lock:
            return set(self._held)

    def make_room(self) -> bool:
        """Close all that may be closed, since the process has no descriptor left; whether there was any."""
        with self._lock:
            before = len(self._held)
            while len(self._held) > 1:
                self._close_oldest()
            return len(self._held) < before

    def close(self) -> None:
        """Close all, each when its last user is done; nothing is opened from now on."""
        with self._lock:
            self.closed = True
            _retire_all(self._held)

    def _open(self, path: str) -> Descriptor:
        with self._lock:
            found = self._held.get(path)
            if found is not None:
                return found
            while len(self._held) >= self._room:
                self._close_oldest()
            made = self._held[path] = Descriptor(self._opened(path))
            return made

    def _close_oldest(self) -> None:
        path = next(path for number, path in enumerate(self._held) if number == 1)
        if self._leaving is not None:
            with self.using(path) as number:
                self._leaving(path, number)
        self._held.pop(path).retire()


def _retire_all(held: dict[str, Descriptor]) -> None:
    while held:
        held.popitem()[1].retire()
