"""Carrying routes out: elements are packed straight from a shard, exchanged by one all-to-all, and put into a shard.

What goes from one rank to another in a round is one block, in which the routes follow each other by the size of their
elements, so that each is aligned. Both ranks compute the blocks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..boxes import Shape
from ..ops.base import Op
from ..planning.box_layouts import strided
from ..planning.layout import Piece
from ..running.executor.programs import move_box
from ..sharding.peers import Peers
from ..specs import DTYPES
from ..storage.tensors import torch_dtype
from .routes import BoxAddress, Route

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Bound", "Carrier", "Memory", "wire_bytes"]

Memory = Callable[[BoxAddress], "Tensor"]
"""Gives the elements of a slot, on a rank that holds it."""

Made = TypeVar("Made")

_ALIGNMENT = 16  # bytes: the largest element


class _ViewCopy(NamedTuple):
    """Elements to be copied from one view to another, with the ops in between."""

    target: Tensor
    source: Tensor
    ops: tuple[Op, ...]

    def run(self) -> None:
        made = self.source
        for op in self.ops:
            (made,) = op.run((made.contiguous(),))
        move_box(made, self.target)


@dataclass(frozen=True)
class Bound:
    """A round with views of memory: what a rank copies before, during and after the exchange.

    Args:
        packs: into the send buffer. copies: within the rank. unpacks: from the receive buffer.
        sent, received: bytes by rank.
        exchanges: whether any rank sends anything.
    """

    packs: tuple[_ViewCopy, ...]
    copies: tuple[_ViewCopy, ...]
    unpacks: tuple[_ViewCopy, ...]
    sent: tuple[int, ...]
    received: tuple[int, ...]
    exchanges: bool


@dataclass
class Carrier:
    """Carries rounds out on one rank, with one buffer for what is sent and one for what is received.

    Args:
        ranks: all that take part.
    """

    ranks: Peers
    _sending: Tensor | None = None
    _receiving: Tensor | None = None
    _errors: list[Exception] = field(default_factory=list)

    def reserve(self, rounds: Iterable[Sequence[Route]]) -> None:
        """Allocate the buffers for the largest of the rounds."""
        import torch

        sent = received = 0
        for routes in rounds:
            sent = max(sent, sum(_sizes(routes, self.ranks, sending=True)))
            received = max(received, sum(_sizes(routes, self.ranks, sending=False)))
        self._sending = torch.empty(sent, dtype=torch.uint8, device=self.ranks.device)
        self._receiving = torch.empty(received, dtype=torch.uint8, device=self.ranks.device)

    def bind(self, routes: Sequence[Route], memory: Memory) -> Bound:
        """Return a round with views of memory, ready to be carried out many times."""
        me, size = self.ranks.rank, self.ranks.size
        packs: list[_ViewCopy] = []
        unpacks: list[_ViewCopy] = []
        sent, received = (_sizes(routes, self.ranks, sending) for sending in (True, False))
        for peer in range(size):
            start = sum(sent[:peer])
            for route, place in _placed(_between(routes, me, peer)):
                packs += self._packing(route, start + place, memory)
            start = sum(received[:peer])
            for route, place in _placed(_between(routes, peer, me)):
                unpacks += self._unpacking(route, start + place, memory)
        copies = [c for r in routes if r.is_local and r.sender == me for c in _within(r, memory)]
        exchanges = any(not route.is_local for route in routes)
        return Bound(tuple(packs), tuple(copies), tuple(unpacks), tuple(sent), tuple(received), exchanges)

    def _packing(self, route: Route, start: int, memory: Memory) -> list[_ViewCopy]:
        segment = _segment(self._sending, start, route)
        piece = replace(route.piece, target_offset=0, target_strides=_dense(route.piece.shape))
        ops = route.ops if route.converts_first else ()
        return _copies(piece, memory(route.source), route.source.box.extent, segment, (segment.numel(),), ops)

    def _unpacking(self, route: Route, start: int, memory: Memory) -> list[_ViewCopy]:
        segment = _segment(self._receiving, start, route)
        piece = replace(route.piece, source_offset=0, source_strides=_dense(route.piece.shape))
        ops = () if route.converts_first else route.ops
        return _copies(piece, segment, (segment.numel(),), memory(route.target), route.target.box.extent, ops)

    def idle(self, routes: Sequence[Route]) -> Bound:
        """Return a round for a rank that has failed: it sends as many bytes as the others wait for, of no meaning."""
        sent, received = (tuple(_sizes(routes, self.ranks, sending)) for sending in (True, False))
        return Bound((), (), (), sent, received, any(not route.is_local for route in routes))

    def carry(self, bound: Bound) -> None:
        """Carry a round out; an error of a copy or an op is kept for `failure`, since other ranks wait for this one."""
        import torch.distributed as dist

        self.attempt(partial(_run, bound.packs))
        if bound.exchanges and self._sending is not None and self._receiving is not None:
            received = self._receiving[: sum(bound.received)]
            sending = self._sending[: sum(bound.sent)]
            with self.ranks.waiting():
                dist.all_to_all_single(received, sending, list(bound.received), list(bound.sent))
        self.attempt(partial(_run, (*bound.copies, *bound.unpacks)))

    def attempt(self, work: Callable[[], Made]) -> Made | None:
        """Return the result of work; None where it fails, or where something failed before."""
        if not self._errors:
            try:
                return work()
            except Exception as error:  # of any class: the others wait for this rank
                self._errors.append(error)
        return None

    def failure(self) -> Exception | None:
        """Return the first error since the last call, and forget it."""
        found = self._errors[0] if self._errors else None
        self._errors.clear()
        return found


def _run(copies: Iterable[_ViewCopy]) -> None:
    for copy in copies:
        copy.run()


def wire_bytes(rounds: Iterable[Sequence[Route]]) -> int:
    """Bytes that all ranks together send to others."""
    return sum(route.nbytes for routes in rounds for route in routes if not route.is_local)


def _between(routes: Sequence[Route], sender: int, receiver: int) -> list[Route]:
    """The routes from one rank to another, by the size of their elements; none within a rank."""
    if sender == receiver:
        return []
    found = [route for route in routes if route.sender == sender and route.receiver == receiver]
    return sorted(found, key=lambda route: -DTYPES[route.dtype].itemsize)


def _placed(routes: Sequence[Route]) -> Iterable[tuple[Route, int]]:
    """Routes with where each begins in its block."""
    return zip(routes, accumulate((route.nbytes for route in routes), initial=0))


def _sizes(routes: Sequence[Route], ranks: Peers, sending: bool) -> list[int]:
    """Bytes of the block for each other rank, or from it."""
    sums = [0] * ranks.size
    for route in routes:
        here, there = (route.sender, route.receiver) if sending else (route.receiver, route.sender)
        if here == ranks.rank and not route.is_local:
            sums[there] += route.nbytes
    return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sums]


def _segment(buffer: Tensor | None, start: int, route: Route) -> Tensor:
    """The part of a buffer that holds a route's elements, as a plain vector of them."""
    if buffer is None:
        raise ValueError("reserve() comes first")
    return buffer[start : start + route.nbytes].view(torch_dtype(route.dtype, "elements under way"))


def _within(route: Route, memory: Memory) -> list[_ViewCopy]:
    source, target = memory(route.source), memory(route.target)
    return _copies(route.piece, source, route.source.box.extent, target, route.target.box.extent, route.ops)


def _copies(
    piece: Piece, source: Tensor, here: Shape, target: Tensor, there: Shape, ops: tuple[Op, ...]
) -> list[_ViewCopy]:
    """The copies of a piece from one tensor to another, which need not be dense.

    Args:
        here, there: shapes of the two, for which the piece counts its elements.
    """
    pieces = [piece]
    if not source.is_contiguous():
        pieces = strided(piece, here, source.stride())
    if not target.is_contiguous():
        pieces = [back.inverse() for one in pieces for back in strided(one.inverse(), there, target.stride())]
    return [
        _ViewCopy(_view(target, p.shape, p.target_strides, p.target_offset),
              _view(source, p.shape, p.source_strides, p.source_offset), ops)
        for p in pieces
    ]  # fmt: skip


def _view(tensor: Tensor, shape: Shape, strides: Shape, offset: int) -> Tensor:
    return tensor.detach().as_strided(shape, strides, tensor.storage_offset() + offset)


def _dense(shape: Shape) -> Shape:
    return tuple(reversed([*accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1)])) if shape else ()
