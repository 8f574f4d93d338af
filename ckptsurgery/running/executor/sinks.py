"""Where what a plan makes can go: the one interface between `execute` and files, tensors or a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ...planning.steps import Step
from ...storage.checkpoint import Checkpoint
from ...storage.contents import Extent
from ...storage.output.staging import Writer
from .copying import ByteRun, Move, copy_runs
from .tasks import Moved

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FileSink", "Sink"]


class Sink(Protocol):
    """Takes what a plan makes, in any order and from any thread. It knows nothing of rules.

    A sink names a place for each key that it wants: a run of bytes in a file, or in memory that a name stands for.
    What moves as it is comes by `take_runs`, what is gathered or computed by `write`, whole tensors by `put`.
    """

    @property
    def places(self) -> Mapping[str, Extent]:
        """Key -> where its bytes go. A key without a place is not wanted."""
        ...

    @property
    def keeps_tensors(self) -> bool:
        """Whether unchanged tensors of a source in memory are passed to `put`, instead of as runs of bytes."""
        ...

    def wants_runs(self, steps: Sequence[Step], moves: Mapping[int, Sequence[Move] | None]) -> Iterable[bool]:
        """Return, for each step, whether its runs of bytes are passed to `take_runs`.

        Args:
            moves: the runs of each program, by its `id`; None for a program that does more than moving runs.
        """
        ...

    def take_runs(self, runs: Sequence[ByteRun], checkpoint: Checkpoint, moved: Moved) -> None:
        """Take runs of bytes of the source's files, which are sorted by their targets."""
        ...

    def has(self, file: str, offset: int, nbytes: int) -> bool:
        """Return whether a run of bytes need not be made."""
        ...

    def skip(self, nbytes: int) -> None:
        """Count bytes that need not be made."""
        ...

    def room(self, file: str, offset: int, nbytes: int) -> memoryview | None:
        """Return the memory to make a run of bytes in, before it is written; None where it may be made anywhere."""
        ...

    def write(self, file: str, offset: int, data: Any) -> None:
        """Take a run of bytes."""
        ...

    def put(self, key: str, tensor: Tensor, borrowed: bool) -> None:
        """Take a whole tensor; one that is borrowed belongs to the caller and must not be kept."""
        ...


@dataclass(frozen=True, slots=True)
class FileSink:
    """The files that a writer writes."""

    writer: Writer
    keeps_tensors: ClassVar[bool] = False

    @property
    def places(self) -> Mapping[str, Extent]:
        """Key -> where its bytes go."""
        return self.writer.places

    def wants_runs(self, steps: Sequence[Step], moves: Mapping[int, Sequence[Move] | None]) -> Iterable[bool]:
        """Return True for each: what comes from files goes to files without passing through tensors."""
        return repeat(True, len(steps))

    def take_runs(self, runs: Sequence[ByteRun], checkpoint: Checkpoint, moved: Moved) -> None:
        """Copy runs of bytes, in the kernel where it can."""
        copy_runs(runs, checkpoint, self.writer, moved)

    def has(self, file: str, offset: int, nbytes: int) -> bool:
        """Return whether an interrupted run has left these bytes."""
        return self.writer.has(file, offset, nbytes)

    def skip(self, nbytes: int) -> None:
        """Count bytes that an interrupted run has left."""
        self.writer.skip(nbytes)

    def room(self, file: str, offset: int, nbytes: int) -> None:
        """Return None: a file has no memory to make bytes in."""

    def write(self, file: str, offset: int, data: Any) -> None:
        """Write a run of bytes."""
        self.writer.write(file, offset, data)

    def put(self, key: str, tensor: Tensor, borrowed: bool) -> None:
        """Write a tensor."""
        from ...storage.tensors import dense_bytes

        place = self.writer.places[key]
        self.writer.write(place.file, place.offset, dense_bytes(tensor, key))
