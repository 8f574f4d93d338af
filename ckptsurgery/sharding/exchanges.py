"""Sending boxes from rank to rank.

A rank that fails between two sends keeps its error and goes on, so that no other waits for it: others get bytes of no
meaning until all ranks compare their errors, and raise one of them. For that a rank has a buffer from the start, in
whose size everything is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from .peers import Peers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Exchange"]

_BUFFER = 4 << 20  # bytes

Made = TypeVar("Made")


@dataclass
class Exchange:
    """Sends between ranks, all of which make the same calls in the same order.

    Args:
        ranks: all of them.
        buffer: a vector of bytes, where a rank's tensors are sent from.
        reported: turns an error of this rank into the one that all ranks raise.
    """

    ranks: Peers
    buffer: Tensor
    reported: Callable[[Exception], Exception] = field(default=lambda error: error)
    _error: Exception | None = None

    @classmethod
    def begun(cls, ranks: Peers, reported: Callable[[Exception], Exception]) -> Exchange:
        """Begin an exchange, once each rank has its buffer."""
        import torch

        return cls(ranks, ranks.tried(lambda: torch.empty(_BUFFER, dtype=torch.uint8, device=ranks.device)), reported)

    def attempt(self, work: Callable[[], Made]) -> Made | None:
        """Return the result of work; None where it fails, or where something failed before."""
        if self._error is None:
            try:
                return work()
            except Exception as error:  # of any class: the others wait for this rank
                self._error = error
        return None

    def check(self) -> None:
        """Compare the errors of all ranks.

        Raises:
            CkptSurgeryError: the error of the lowest rank that has one, on all ranks.
        """
        if self.ranks.any(self._error is not None):
            self.ranks.agree(None if self._error is None else self.reported(self._error))

    def send(self, tensor: Tensor, ranks: Iterable[int]) -> None:
        """Send a plain tensor's elements to other ranks, which call `receive` meanwhile.

        Args:
            tensor: on the meta device where this rank failed to make it.
        """
        import torch.distributed as dist

        receivers = [rank for rank in ranks if rank != self.ranks.rank]
        for part in _parts(tensor, self.buffer.numel()):
            ready = None if part.is_meta else self.attempt(partial(self._ready, part))
            data = self.buffer[: part.numel() * part.element_size()] if ready is None else ready
            with self.ranks.waiting():
                for work in [dist.isend(data, rank) for rank in receivers]:
                    if work is not None:
                        work.wait()

    def receive(self, tensor: Tensor, rank: int) -> None:
        """Fill a plain tensor with the elements that a rank sends."""
        import torch.distributed as dist

        for part in _parts(tensor, self.buffer.numel()):
            there = part.is_contiguous() and part.device.type == self.buffer.device.type
            data = _as_bytes(part) if there else self.buffer[: part.numel() * part.element_size()]
            with self.ranks.waiting():
                dist.recv(data, rank)
            if not there:
                self.attempt(partial(_fill, part, data))

    def _ready(self, part: Tensor) -> Tensor:
        """The bytes of a part where they are sent from: its own memory, or the buffer."""
        if part.is_contiguous() and part.device.type == self.buffer.device.type:
            return _as_bytes(part)
        data = self.buffer[: part.numel() * part.element_size()]
        data.view(part.dtype).view(part.shape).copy_(part.detach())
        return data


def _fill(part: Tensor, data: Tensor) -> None:
    part.copy_(data.view(part.dtype).view(part.shape))


def _parts(tensor: Tensor, most: int) -> Iterator[Tensor]:
    """A tensor in parts of at most so many bytes, by its shape and dtype."""
    held = tensor.detach()
    nbytes = held.numel() * held.element_size()
    if nbytes <= most:
        yield held
        return
    rows = held.shape[0]
    at_once = most // (nbytes // rows)
    for start in range(0, rows, max(1, at_once)):
        part = held.narrow(0, start, min(max(1, at_once), rows - start))
        yield from (part,) if at_once else _parts(part[0], most)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: backends do not know every dtype."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)
