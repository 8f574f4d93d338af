"""The ranks that do one thing together: values that they give each other, and errors that all of them raise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from ..boxes import Box
from ..errors import CheckpointError, CkptSurgeryError, Diagnostic, LoadError, PlanError, RecipeError
from .lost_ranks import left, waiting_for_ranks

__all__ = ["Peers", "dealt", "peers"]

Made = TypeVar("Made")

_KINDS: dict[str, type[CkptSurgeryError]] = {
    kind.__name__: kind for kind in (CheckpointError, PlanError, RecipeError, LoadError, CkptSurgeryError)
}


def peers() -> Peers | None:
    """The ranks of the default process group; None where there is none."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    return Peers(dist.get_rank(), dist.get_world_size())


@dataclass
class Peers:
    """All ranks of the default process group. Every method is called by all of them, in one order.

    Args:
        rank: of this process.
        size: how many there are.
    """

    rank: int
    size: int
    _failed: bool = False

    def fail(self, error: Exception) -> None:
        """Raise an error on all ranks, unless it is one that they have agreed on already."""
        if not self._failed:
            self.agree(error)

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank; an error of any rank is raised instead."""
        return self.shared(value)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Surround what waits for other ranks, for as long as the timeout of the process group at most.

        Raises:
            CheckpointError: one of them is gone, or did not answer in time.
        """
        try:
            with waiting_for_ranks(self.rank, self.size):
                yield
        except CheckpointError:
            self._failed = True
            raise

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Surround an exchange, in which no rank asks the others for errors.

        Raises:
            CkptSurgeryError: any error, the same on all ranks, whose connections are closed unless they agreed on it.
        """
        try:
            yield
        except Exception as error:
            if self._failed or self.size == 1:
                raise
            self._failed = True
            raise left(self.rank, self.size, _diagnostics(error, self.rank)[0].headline) from error

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank; much cheaper than `gathered`."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return flag
        found = torch.tensor([int(flag)], device=self.device)
        with self.waiting():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def agree(self, error: Exception | None, digest: object = None) -> None:
        """Raise the error of the lowest rank that has one, on all ranks.

        Args:
            error: this rank's.
            digest: what must be equal on all ranks, where none has an error.

        Raises:
            CkptSurgeryError: the error, of its own class.
        """
        self._compare(self.shared((digest, None), error))

    def agreed(self, digest: object, value: Made) -> list[Made]:
        """Return the values of all ranks, by rank, once a digest is equal on all of them.

        Raises:
            CkptSurgeryError: the error of the lowest rank that has one; PlanError: the digests differ.
        """
        found = self.shared((digest, value))
        self._compare(found)
        return [theirs for _, theirs in found]

    def _compare(self, found: Sequence[tuple[object, object]]) -> None:
        """Check that all ranks gave the same digest."""
        different = [rank for rank, (digest, _) in enumerate(found) if digest != found[0][0]]
        if different:
            self._failed = True
            text = f"rank {different[0]} was given other arguments, or sees other files, than rank 0"
            raise PlanError(Diagnostic("ranks-differ", text, help="call it on all ranks with the same arguments"))

    def shared(self, value: Any, error: Exception | None = None) -> list[Any]:
        """Return the values of all ranks, by rank, once none has failed.

        Args:
            value: this rank's. error: why it has none.

        Raises:
            CkptSurgeryError: the error of the lowest rank that has one, of its own class.
        """
        told = None if error is None else (type(error).__name__, _diagnostics(error, self.rank))
        found = self._all((told, value))
        for rank, (problem, _) in enumerate(found):
            if problem is None:
                continue
            self._failed = True
            if error is not None and (self.size == 1 or (rank == self.rank and isinstance(error, CkptSurgeryError))):
                raise error
            kind, diagnostics = problem
            raise _KINDS.get(kind, CkptSurgeryError)(diagnostics) from error
        return [value for _, value in found]

    def _all(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.waiting():
            dist.all_gather_object(found, value)
        return found

    @cached_property
    def device(self) -> str:
        """Where tensors are sent from: NCCL has no way from the host."""
        import torch.distributed as dist

        return "cpu" if not dist.is_initialized() or "gloo" in str(dist.get_backend()) else "cuda"

    def tried(self, work: Callable[[], Made]) -> Made:
        """What this rank's work gives, once no rank's has failed."""
        made: list[Made] = []
        error = None
        try:
            made.append(work())
        except Exception as raised:
            error = raised
        self.agree(error)
        return made[0]

    def told(self, rank: int, work: Callable[[], Any]) -> Any:
        """What a rank's work gives, or the error that it raises, on all ranks; only that rank does it."""
        return self.tried(work if rank == self.rank else lambda: None)


def dealt(boxes: Sequence[Mapping[str, Box]]) -> dict[tuple[str, Box], list[int]]:
    """The ranks that hold each box, the one that works on it first; equal on all ranks.

    >>> whole, half = Box((0,), (4,)), Box((0,), (2,))
    >>> dealt([{"a": whole, "b": half}, {"a": whole}])
    {('b', Box(low=(0,), extent=(2,))): [0], ('a', Box(low=(0,), extent=(4,))): [1, 0]}

    Args:
        boxes: by rank, what it holds of each tensor.
    """
    holders: dict[tuple[str, Box], list[int]] = {}
    for rank, held in enumerate(boxes):
        for key, box in held.items():
            holders.setdefault((key, box), []).append(rank)
    load = [0] * len(boxes)
    made = {}
    for (key, box), ranks in sorted(holders.items(), key=lambda one: len(one[1])):
        worker = min(ranks, key=load.__getitem__)
        load[worker] += box.numel
        made[key, box] = [worker, *(rank for rank in ranks if rank != worker)]
    return made


def _diagnostics(error: Exception, rank: int) -> tuple[Diagnostic, ...]:
    """An error as all ranks raise it."""
    if isinstance(error, CkptSurgeryError):
        return tuple(error.diagnostics)
    about = f": {error}" if str(error) else ""
    text = f"rank {rank} failed: {type(error).__name__}{about}"
    return (Diagnostic("rank-failed", text, help="look at the traceback of this rank"),)
