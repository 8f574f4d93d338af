"""Buckets: how much of the traffic is under way at once.

A bucket is a run of steps that takes at most a given number of bytes on any rank, or a single larger step. Its routes
are carried in rounds, each of which is one exchange between all ranks of at most that many bytes a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..planning.layout import Piece
from ..specs import DTYPES
from .routes import Route, Traffic, WholeStep

__all__ = ["Bucket", "buckets_of", "parts_of", "rounds_of"]

Round = tuple[Route, ...]


@dataclass(frozen=True)
class Bucket:
    """Steps that are carried together: first the gathers, then the makings, then the rounds.

    Args:
        keys: the targets that are whole afterwards.
        rounds: the routes to the targets, by round.
        gathers: the routes to the inputs of the makings, by round.
        makings: steps that run on whole tensors.
    """

    keys: tuple[str, ...]
    rounds: tuple[Round, ...]
    gathers: tuple[Round, ...] = ()
    makings: tuple[WholeStep, ...] = ()


def buckets_of(traffic: Iterable[Traffic], size: int, limit: int) -> Iterator[Bucket]:
    """Yield the buckets of all traffic: steps on whole tensors apart, since they take two exchanges.

    Args:
        size: how many ranks there are.
        limit: bytes that a rank may send, and receive, in a bucket of more than one step.
    """
    found = list(traffic)
    direct = [one for one in found if one.making is None]
    whole = [one for one in found if one.making is not None]
    for group in (*_grouped(direct, size, limit, _moved), *_grouped(whole, size, limit, _made)):
        yield Bucket(
            tuple(key for one in group for key in one.keys),
            tuple(rounds_of([route for one in group for route in one.routes], size, limit)),
            tuple(rounds_of([route for one in group for route in one.gathers], size, limit)),
            tuple(one.making for one in group if one.making is not None),
        )


def _grouped(
    traffic: Sequence[Traffic], size: int, limit: int, weigh: Callable[[Traffic, _Volume], None]
) -> Iterator[list[Traffic]]:
    """Runs of traffic that stay within the limit."""
    held: list[Traffic] = []
    load = _Volume(size)
    for one in traffic:
        weigh(one, load)
        if held and load.largest > limit:
            yield held
            held, load = [], _Volume(size)
            weigh(one, load)
        held.append(one)
    if held:
        yield held


@dataclass
class _Volume:
    """Bytes by rank, sent and received apart."""

    size: int
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent, self.received = [0] * self.size, [0] * self.size

    @property
    def largest(self) -> int:
        return max(*self.sent, *self.received)


def _moved(traffic: Traffic, load: _Volume) -> None:
    """Add the routes of a step; copies within a rank count as well, since a stream makes new tensors of them."""
    for route in traffic.routes:
        load.received[route.receiver] += route.piece.numel * DTYPES[route.dtypes[1]].itemsize
        if not route.is_local:
            load.sent[route.sender] += route.nbytes


def _made(traffic: Traffic, load: _Volume) -> None:
    """Add the whole tensors of a step that runs on one rank."""
    _moved(traffic, load)
    if traffic.making is not None:
        step, maker = traffic.making
        load.received[maker] += sum(spec.nbytes for spec in (*step.program.inputs, *step.program.outputs))


def rounds_of(routes: Sequence[Route], size: int, limit: int) -> Iterator[Round]:
    """Yield the rounds of routes; a route of more than the limit is parted.

    Args:
        limit: bytes that a rank sends, and receives, in a round.
    """
    held: list[Route] = []
    load = _Volume(size)
    for route in routes:
        if route.is_local:
            held.append(route)
            continue
        itemsize = DTYPES[route.dtype].itemsize
        for piece in parts_of(route.piece, max(1, limit // itemsize)):
            nbytes = piece.numel * itemsize
            if held and max(load.sent[route.sender], load.received[route.receiver]) + nbytes > limit:
                yield tuple(held)
                held, load = [], _Volume(size)
            held.append(route._replace(piece=piece))
            load.sent[route.sender] += nbytes
            load.received[route.receiver] += nbytes
    if held:
        yield tuple(held)


def parts_of(piece: Piece, limit: int) -> Iterator[Piece]:
    """Yield the parts of a piece, along its outermost axes, of at most `limit` elements.

    >>> piece = Piece(0, 0, (3, 4), 0, (4, 1), 10, (8, 2))
    >>> [(part.shape, part.source_offset, part.target_offset) for part in parts_of(piece, 8)]
    [((2, 4), 0, 10), ((1, 4), 8, 26)]
    """
    if piece.numel <= limit:
        yield piece
        return
    inner = math.prod(piece.shape[1:])
    count = max(1, limit // inner)
    for start in range(0, piece.shape[0], count):
        rows = min(count, piece.shape[0] - start)
        part = replace(
            piece,
            shape=(rows, *piece.shape[1:]),
            source_offset=piece.source_offset + start * piece.source_strides[0],
            target_offset=piece.target_offset + start * piece.target_strides[0],
        )
        yield from parts_of(_without_first(part), limit) if rows == 1 and inner > limit else (part,)


def _without_first(piece: Piece) -> Piece:
    """A piece whose outermost axis has one element, without this axis."""
    return replace(
        piece,
        shape=piece.shape[1:],
        source_strides=piece.source_strides[1:],
        target_strides=piece.target_strides[1:],
    )
