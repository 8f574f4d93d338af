"""Remote byte sources: ranges that are merged where they are neighbours, several at a time, and tried again.

A file's identity is its ETag, or else its size and date: a file that changes between two ranges is an error.
"""

from __future__ import annotations

import bisect
import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ...errors import CheckpointError, Diagnostic
from .byte_source import Range

__all__ = ["FIRST", "Facts", "Interrupted", "RangeFile", "RemoteSource", "Request", "requests_of"]

FIRST = 64 << 10
"""Bytes of the first request: most headers are shorter."""

_GAP = 2 << 10
"""Bytes between two ranges that are fetched in vain: less than what the headers of a request take."""

_AT_ONCE = 8
"""Requests at a time."""

_PIECE = 4 << 20
"""Bytes of a request; a longer range is parted, so that several connections share it."""

_TRIES = 5
_WAIT = 0.1  # seconds before the second try, then twice as long each time
_LONGEST_WAIT = 60


class Interrupted(Exception):
    """A request failed in a way that may pass: the connection broke, or the server is busy.

    Args:
        wait: seconds that the server asks to wait before the next try.
    """

    def __init__(self, text: str, wait: float = 0) -> None:
        super().__init__(text)
        self.wait = min(wait, _LONGEST_WAIT)


class Facts(NamedTuple):
    """What a server reports of a file."""

    size: int
    identity: tuple[object, ...]


@dataclass(slots=True)
class Request:
    """Bytes to fetch at once, and where they go."""

    offset: int
    nbytes: int
    parts: list[Range]


def requests_of(ranges: Sequence[Range], gap: int = _GAP, piece: int = _PIECE) -> list[Request]:
    """Part long ranges, and merge those that lie close together.

    >>> buffers = [memoryview(bytearray(n)) for n in (4, 6, 3)]
    >>> [(r.offset, r.nbytes) for r in requests_of(list(zip((0, 8, 90), buffers)), gap=4, piece=16)]
    [(0, 14), (90, 3)]
    """
    parts = [(offset + at, buffer[at : at + piece]) for offset, buffer in ranges for at in range(0, len(buffer), piece)]
    made: list[Request] = []
    for offset, buffer in sorted(parts, key=lambda part: part[0]):
        last = made[-1] if made else None
        end = last.offset + last.nbytes if last else 0
        if last and offset <= end + gap and offset + len(buffer) - last.offset <= piece:
            last.nbytes = max(end, offset + len(buffer)) - last.offset
            last.parts.append((offset, buffer))
        else:
            made.append(Request(offset, len(buffer), [(offset, buffer)]))
    return made


class RemoteSource(ABC):
    """A file behind an address. Subclasses know the protocol.

    Args:
        name: the address.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.fetched = 0
        facts, self.first = self._tried(self.probe)
        self.size, self.identity = facts

    @abstractmethod
    def probe(self) -> tuple[Facts, bytes]:
        """Return what the server reports of the file, and its first bytes, up to `FIRST`.

        Raises:
            Interrupted: it may pass.
            CheckpointError: there is no such file, or no right to it.
        """

    @abstractmethod
    def stream(self, offset: int, nbytes: int) -> Iterator[bytes]:
        """Yield bytes `[offset, offset + nbytes)` as they come, and compare the file's identity before.

        Raises:
            Interrupted: it may pass.
            CheckpointError: the file changed, or is gone.
        """

    def open(self) -> BinaryIO:
        """Open the file to read its header."""
        return RangeFile(self)  # type: ignore[return-value]

    def read_into(self, ranges: Sequence[Range]) -> None:
        """Fill buffers, several requests at a time."""
        requests = requests_of(ranges)
        beyond = next((r for r in requests if r.offset + r.nbytes > self.size), None)
        if beyond is not None:
            from .byte_source import truncated

            raise truncated(self.name, self.size, beyond.offset + beyond.nbytes - self.size)
        if len(requests) == 1:
            self._fill(requests[0])
            return
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ckptsurgery") as pool:
            tasks = [pool.submit(self._fill, request) for request in requests]
            try:
                for task in tasks:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()

    def close(self) -> None:
        """Forget the header's bytes, unless they are the whole file; no connection outlives its request."""
        self.first = self.first if len(self.first) == self.size else b""

    def fetch(self, offset: int, nbytes: int) -> bytes:
        """Return bytes of the file, fewer at its end."""
        buffer = bytearray(max(0, min(nbytes, self.size - offset)))
        if buffer:
            self._fill(Request(offset, len(buffer), [(offset, memoryview(buffer))]))
        return bytes(buffer)

    def _fill(self, request: Request) -> None:
        """Fetch a request; what came before a connection broke is not fetched again."""
        if len(self.first) == self.size:  # a short file: its server may not even send parts
            for offset, buffer in request.parts:
                buffer[:] = self.first[offset : offset + len(buffer)]
            return
        whole = request.parts[0][1] if len(request.parts) == 1 else memoryview(bytearray(request.nbytes))
        done = 0

        def go_on() -> None:
            nonlocal done
            for block in self.stream(request.offset + done, request.nbytes - done):
                whole[done : done + len(block)] = block
                done += len(block)
                self.fetched += len(block)
            if done < request.nbytes:
                raise Interrupted("the connection was closed early")

        self._tried(go_on, lambda: done)
        if len(request.parts) > 1:
            for offset, buffer in request.parts:
                at = offset - request.offset
                buffer[:] = whole[at : at + len(buffer)]

    def _tried(self, call: Callable[[], Any], progress: Callable[[], int] = lambda: 0) -> Any:
        """Repeat a call that was interrupted; progress gives it all of its tries again."""
        tries, before = 0, progress()
        while True:
            try:
                return call()
            except Interrupted as error:
                tries = 0 if progress() > before else tries + 1
                before = progress()
                if tries >= _TRIES:
                    text = f"{self.name!r} could not be read: {error}"
                    help = "check the connection, then do this again"
                    raise CheckpointError(Diagnostic("download-failed", text, self.name, help=help)) from error
                time.sleep(max(error.wait, _WAIT * 2 ** max(0, tries - 1)))


class RangeFile(io.RawIOBase):
    """A remote file to read a header of: what was fetched is kept, and what is read in order is read ahead."""

    def __init__(self, source: RemoteSource) -> None:
        super().__init__()
        self._source, self._at = source, 0
        self._starts: list[int] = [0]  # of what was fetched, in order
        self._spans: dict[int, bytes] = {0: source.first}

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._source.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; return how many bytes there were."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """Return so many bytes, fewer only at the end of the file."""
        left = max(0, self._source.size - self._at)
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._held(wanted, wanted)
        self._at += len(data)
        if len(data) < wanted:
            more = self.read(wanted - len(data))
            return data + more
        return data

    def _held(self, wanted: int, most: int) -> bytes:
        """Bytes from the position on, as many as one fetch has brought: some if any are wanted and there."""
        at = self._at
        start = self._starts[bisect.bisect_right(self._starts, at) - 1]
        data = self._spans[start]
        if at < start + len(data):
            return data[at - start : at - start + most]
        goes_on = start + len(data) == at  # a header that is read in order
        wanted = min(wanted, max(0, self._source.size - at))
        if not wanted:
            return b""
        found = self._source.fetch(at, max(wanted, FIRST) if goes_on else wanted)
        self._keep(at, found)
        return found[:most]

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch parts of the file that will be read, `(offset, nbytes)` each: merged, and several at a time."""
        size, kept = self._source.size, []
        for offset, nbytes in ranges:
            start, stop = max(0, offset), min(offset + nbytes, size)
            if start < stop and not self._holds(start, stop):
                kept.append((start, bytearray(stop - start)))
        self._source.read_into([(start, memoryview(buffer)) for start, buffer in kept])
        for start, buffer in kept:
            self._keep(start, bytes(buffer))

    def _holds(self, start: int, stop: int) -> bool:
        before = self._starts[bisect.bisect_right(self._starts, start) - 1]
        return stop <= before + len(self._spans[before])

    def _keep(self, start: int, data: bytes) -> None:
        """Keep what was fetched; the longer of two that begin at one place."""
        known = self._spans.get(start)
        if known is None:
            bisect.insort(self._starts, start)
        if known is None or len(known) < len(data):
            self._spans[start] = data
