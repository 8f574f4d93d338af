"""The ranks that do one thing together: errors that all of them raise, and boxes that one sends to others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..boxes import Box
from ..errors import CheckpointError, CkptSurgeryError, Diagnostic, LoadError, PlanError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Peers", "dealt", "peers"]

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
        """What each rank gives, by rank."""
        import torch.distributed as dist

        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.waiting():
            dist.all_gather_object(found, value)
        return found

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Surround what waits for other ranks, for as long as the timeout of the process group at most.

        Raises:
            CheckpointError: one of them is gone, or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:  # how every backend reports a connection that ended, or a wait that was too long
            self._failed = True
            lines = str(error).splitlines() or [type(error).__name__]
            text = f"a rank is gone, or did not answer in time: {lines[0]}"
            raise CheckpointError(Diagnostic("rank-lost", text, help="look at what the other ranks say")) from error

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
        found = self.shared(digest, error)
        different = [rank for rank, other in enumerate(found) if other != found[0]]
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
        told = None if error is None else (type(error).__name__, getattr(error, "diagnostics", None) or str(error))
        found = self.gathered((told, value))
        for rank, (problem, _) in enumerate(found):
            if problem is None:
                continue
            self._failed = True
            if rank == self.rank and error is not None:
                raise error
            kind, about = problem
            if isinstance(about, str):
                about = (Diagnostic("rank-failed", f"rank {rank} failed: {kind}: {about}"),)
            raise _KINDS.get(kind, CkptSurgeryError)(about)
        return [value for _, value in found]

    @cached_property
    def device(self) -> str:
        """Where tensors are sent from: NCCL has no way from the host."""
        import torch.distributed as dist

        return "cpu" if not dist.is_initialized() or "gloo" in str(dist.get_backend()) else "cuda"

    def send(self, tensor: Tensor, ranks: Iterable[int]) -> None:
        """Send a plain tensor's elements to other ranks, which call `receive` meanwhile."""
        import torch.distributed as dist

        data = _as_bytes(tensor.to(self.device))
        with self.waiting():
            for work in [dist.isend(data, rank) for rank in ranks if rank != self.rank]:
                if work is not None:
                    work.wait()

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fill a plain tensor with what a rank sends."""
        import torch
        import torch.distributed as dist

        there = tensor if tensor.is_contiguous() and tensor.device.type == self.device else None
        made = there if there is not None else torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        with self.waiting():
            dist.recv(_as_bytes(made), rank)
        if there is None:
            tensor.copy_(made)

    def tried(self, work: Callable[[], Any]) -> Any:
        """What this rank's work gives, once no rank's has failed."""
        value, error = None, None
        try:
            value = work()
        except (CkptSurgeryError, OSError) as raised:
            error = raised
        self.agree(error)
        return value

    def told(self, rank: int, work: Callable[[], Any]) -> Any:
        """What a rank's work gives, or the error that it raises, on all ranks; only that rank does it."""
        value, error = None, None
        if rank == self.rank:
            try:
                value = work()
            except CkptSurgeryError as raised:
                error = raised
        self.agree(error)
        return value


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


def _as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a plain tensor: backends do not know every dtype."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
