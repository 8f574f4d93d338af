"""A sink that compares: what a plan makes, made again, with what was written."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, repeat, takewhile
from threading import Lock
from typing import TYPE_CHECKING, Any

from ...planning.costing import CHUNK
from ...planning.steps import Step
from ...storage.checkpoint import Checkpoint
from ...storage.contents import Extent
from ..executor.copying import ByteRun, Move
from ..executor.tasks import Moved

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ComparingSink", "WrittenSink"]


class ComparingSink:
    """Compares what comes with what exists; keys that differ are collected in `wrong`.

    Args:
        places: key -> the bytes that are compared.
    """

    def __init__(self, places: dict[str, Extent]) -> None:
        self.places = places
        self.wrong: set[str] = set()
        self._lock = Lock()

    def wants_runs(self, steps: Sequence[Step], moves: Mapping[int, Sequence[Move] | None]) -> Iterable[bool]:
        """Return True for each: bytes are compared without becoming tensors."""
        return repeat(True, len(steps))

    def has(self, file: str, offset: int, nbytes: int) -> bool:
        """Return False: everything is to be compared."""
        return False

    def skip(self, nbytes: int) -> None:
        """Do nothing: no bytes are owed."""

    def room(self, file: str, offset: int, nbytes: int) -> None:
        """Return None: bytes may be made anywhere."""


class WrittenSink(ComparingSink):
    """Compares what comes with a checkpoint.

    Args:
        written: what should hold the same, in files as plain runs of bytes.
        keys: those to compare.
    """

    keeps_tensors = False

    def __init__(self, written: Checkpoint, keys: Iterable[str]) -> None:
        found = {key: written.extent(key) for key in keys}
        super().__init__({key: extent for key, extent in found.items() if extent is not None})
        self._written = written
        self._order = sorted((place.file, place.offset, key) for key, place in self.places.items() if place.nbytes)

    def take_runs(self, runs: Sequence[ByteRun], checkpoint: Checkpoint, moved: Moved) -> None:
        """Compare runs of the source's files with those that were written."""
        checkpoint.read_in_order({run.source_file for run in runs})
        for run in runs:
            for start in range(0, run.nbytes, CHUNK):
                buffer = bytearray(min(CHUNK, run.nbytes - start))
                checkpoint.read_file_into(run.source_file, run.source_offset + start, memoryview(buffer))
                self.write(run.target_file, run.target_offset + start, buffer)
                moved(len(buffer))

    def put(self, key: str, tensor: Tensor, borrowed: bool) -> None:
        """Compare a whole tensor."""
        from ...storage.tensors import dense_bytes

        place = self.places[key]
        self.write(place.file, place.offset, dense_bytes(tensor, key))

    def write(self, file: str, offset: int, data: Any) -> None:
        """Compare a run of bytes, of one tensor or of neighbours."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        if self._equal(file, offset, view):
            return
        at = max(0, bisect.bisect_right(self._order, (file, offset, "\U0010ffff")) - 1)
        for _, start, key in takewhile(lambda one: one[:2] < (file, offset + len(view)), islice(self._order, at, None)):
            stop = start + self.places[key].nbytes
            if not self._equal(file, max(start, offset), view[max(0, start - offset) : max(0, stop - offset)]):
                with self._lock:
                    self.wrong.add(key)

    def _equal(self, file: str, offset: int, view: memoryview) -> bool:
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            found = bytearray(len(part))
            self._written.read_file_into(file, offset + start, memoryview(found))
            if found != part:
                return False
        return True
