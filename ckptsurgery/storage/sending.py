"""Bytes of files into the memory of accelerators: through a ring of page-locked buffers, and no other memory.

Threads fill buffers from the files, in disk order. As soon as one is full, the device fetches it, on a stream of its
own, and when that is done the buffer is filled again: reading and copying go on side by side, and what the host holds
of a checkpoint of any size is the ring.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from .sources.links import Link
from .tensors import dense_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BUFFER", "BufferChunk", "BufferPart", "TensorRun", "chunks_of", "ring_size", "send"]

BUFFER = 8 << 20
"""Bytes of one buffer: so many that starting a copy costs nothing beside it."""

_COPYING = 2
"""Buffers that the device fetches from, or has fetched, while others are filled."""

_GAP = 1 << 10
"""Bytes between neighbours in a file that are read in vain, which costs less than another read."""

Read = Callable[[str, int, memoryview], object]


class TensorRun(NamedTuple):
    """Bytes of a file that are bytes of a tensor.

    Args:
        tensor: its number among those that are filled.
        start: the first of its bytes.
    """

    file: str
    offset: int
    nbytes: int
    tensor: int
    start: int = 0


class BufferPart(NamedTuple):
    """Bytes of a buffer that are bytes of a tensor."""

    tensor: int
    start: int
    at: int
    nbytes: int


class BufferChunk(NamedTuple):
    """What is read at once: bytes of a file, and where they go."""

    file: str
    offset: int
    nbytes: int
    parts: list[BufferPart]


def ring_size(readers: int, size: int = BUFFER) -> int:
    """Bytes of the host that a ring takes at most."""
    return (readers + 1 + _COPYING) * size


def chunks_of(runs: Iterable[TensorRun], size: int) -> Iterator[BufferChunk]:
    """The runs in the order of the files, neighbours together and large ones cut, so that buffers are filled.

    >>> runs = [TensorRun("f", 8, 20, 0), TensorRun("f", 28, 4, 1), TensorRun("f", 9999, 4, 2)]
    >>> [(c.offset, c.nbytes) for c in chunks_of(runs, 16)]
    [(8, 16), (24, 8), (9999, 4)]
    """
    together: list[TensorRun] = []
    end = 0
    for run in sorted(run for run in runs if run.nbytes):
        if together and (run.file != together[0].file or run.offset > end + _GAP):
            yield from _cut(together, end, size)
            together = []
        end = max(end, run.offset + run.nbytes) if together else run.offset + run.nbytes
        together.append(run)
    if together:
        yield from _cut(together, end, size)


def _cut(runs: Sequence[TensorRun], end: int, size: int) -> Iterator[BufferChunk]:
    """Windows of `size` bytes over neighbours, each with the parts of them that it shows."""
    file, first = runs[0].file, runs[0].offset
    windows: deque[list[BufferPart]] = deque()
    opened = 0  # windows that went out already
    for _, offset, nbytes, tensor, start in runs:
        low, high = (offset - first) // size, (offset + nbytes - 1 - first) // size
        while opened < low:  # runs come in order, so nothing more is seen through it
            yield from _window(file, first + opened * size, end, size, windows.popleft() if windows else [])
            opened += 1
        while opened + len(windows) <= high:
            windows.append([])
        for number in range(low, high + 1):
            at = first + number * size
            begin, stop = max(offset, at), min(offset + nbytes, at + size)
            windows[number - opened].append(BufferPart(tensor, start + begin - offset, begin - at, stop - begin))
    for number, parts in enumerate(windows, opened):
        yield from _window(file, first + number * size, end, size, parts)


def _window(file: str, offset: int, end: int, size: int, parts: list[BufferPart]) -> Iterator[BufferChunk]:
    if parts:  # one over a gap alone shows nothing
        yield BufferChunk(file, offset, min(size, end - offset), parts)


def send(
    runs: Sequence[TensorRun],
    tensors: Sequence[Tensor],
    read: Read,
    link: Link,
    *,
    begun: Callable[[int], object],
    arrived: Callable[[int], object],
    readers: int | None = None,
    size: int = BUFFER,
) -> None:
    """Fill tensors of accelerators, each of them contiguous, all of whose bytes the runs bring once.

    Args:
        read: fills a buffer from bytes of a file; called from several threads.
        begun: hears the number of a tensor before the first of its bytes changes. arrived: when all of them are there.
        readers: how many threads read; one a core, at most eight.
        size: bytes of a buffer.

    Raises:
        CheckpointError: a read failed or the device did; nothing is read and nothing is copied any more by then.
    """
    left = [tensor.numel() * tensor.element_size() for tensor in tensors]
    for number in [number for number, nbytes in enumerate(left) if not nbytes]:
        begun(number)
        arrived(number)
    most = readers if readers is not None else min(os.cpu_count() or 1, 8)
    size = max(1, min(size, sum(left)))
    with ThreadPoolExecutor(most, thread_name_prefix="ckptsurgery") as pool:
        ring = _Ring(tensors, left, pool, most, read, link, size, begun, arrived)
        try:
            for chunk in chunks_of(runs, size):
                ring.take(chunk)
            ring.finish()
        finally:
            ring.stop()


class _Slot(NamedTuple):
    """One buffer, as a tensor and as memory."""

    buffer: Tensor
    memory: memoryview


@dataclass
class _Ring:
    """Buffers that are free, being filled or being fetched; one thread moves them on, in order."""

    tensors: Sequence[Tensor]
    left: list[int]
    pool: ThreadPoolExecutor
    readers: int
    read: Read
    link: Link
    size: int
    begun: Callable[[int], object]
    arrived: Callable[[int], object]
    free: list[_Slot] = field(default_factory=list)
    reading: deque[tuple[BufferChunk, _Slot, Future[object]]] = field(default_factory=deque)
    copying: deque[tuple[BufferChunk, _Slot, Callable[[], object]]] = field(default_factory=deque)

    def take(self, chunk: BufferChunk) -> None:
        """Have a chunk read, as soon as there is room."""
        while len(self.reading) > self.readers:  # one more than there are threads, so that none of them waits
            self.hand_over()
        slot = self.slot()
        reading = self.pool.submit(self.read, chunk.file, chunk.offset, slot.memory[: chunk.nbytes])
        self.reading.append((chunk, slot, reading))

    def slot(self) -> _Slot:
        """A buffer that nobody uses: a new one as long as there are few."""
        if len(self.copying) > _COPYING:
            self.settle()
        if self.free:
            return self.free.pop()
        buffer = self.link.buffer(self.size)
        return _Slot(buffer, dense_bytes(buffer, "buffer"))

    def hand_over(self) -> None:
        """Have the device fetch what was read first."""
        chunk, slot, reading = self.reading.popleft()
        reading.result()
        for part in chunk.parts:
            self.begun(part.tensor)
        pairs = [(self.bytes_of(p), slot.buffer[p.at : p.at + p.nbytes]) for p in chunk.parts]
        self.copying.append((chunk, slot, self.link.copy(pairs)))

    def bytes_of(self, part: BufferPart) -> Tensor:
        """The part of a tensor that is filled, as bytes."""
        import torch

        whole = self.tensors[part.tensor].detach().view(-1).view(torch.uint8)
        return whole[part.start : part.start + part.nbytes] if part.nbytes < whole.numel() else whole

    def settle(self) -> None:
        """Wait for the copy that was started first; its buffer is free then."""
        chunk, slot, wait = self.copying.popleft()
        wait()
        self.free.append(slot)
        for part in chunk.parts:
            self.left[part.tensor] -= part.nbytes
            if not self.left[part.tensor]:
                self.arrived(part.tensor)

    def finish(self) -> None:
        """Bring what is on its way to its end."""
        while self.reading:
            self.hand_over()

    def stop(self) -> None:
        """Begin nothing more, and wait for what was begun."""
        for _, _, reading in self.reading:
            reading.cancel()
        while self.copying:
            self.settle()
