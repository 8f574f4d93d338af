"""Which rank sends which elements to which rank: computed by every rank alike, from boxes and without data.

A step relates whole tensors. Where it only moves elements, or changes each one by itself, its layout is cut to the
boxes on both sides, and each piece that is left becomes a route from a rank that holds the source box to a rank that
holds the target box. A rank that holds both copies in its own memory. Any other step runs on one rank, to which the
inputs are sent whole, and which sends the outputs on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..boxes import Box
from ..ops.base import Op
from ..planning.box_layouts import between
from ..planning.layout import Layout, Piece
from ..planning.steps import Program, Step
from ..running.executor.chunking import by_elements
from ..specs import DTYPES

__all__ = ["BoxAddress", "Holders", "Route", "Router", "Traffic", "WholeStep"]

Boxes = tuple[tuple[Box, ...], ...]


class BoxAddress(NamedTuple):
    """A part of a tensor, in the memory of the ranks that hold it.

    Args:
        side: `"source"`, `"target"`, or `"input"` and `"output"` of a step that runs on whole tensors.
        key: the tensor's name.
        box: which part of the tensor.
    """

    side: str
    key: str
    box: Box


class Route(NamedTuple):
    """Elements that go from the memory of one rank to that of another, or of the same.

    Args:
        sender, receiver: the ranks.
        source, target: where the elements are, and where they belong.
        piece: which elements; offsets and strides count within the two boxes, each dense in C order.
        dtypes: before and after the ops.
        ops: applied to each element on the way.
    """

    sender: int
    receiver: int
    source: BoxAddress
    target: BoxAddress
    piece: Piece
    dtypes: tuple[str, str]
    ops: tuple[Op, ...] = ()

    @property
    def converts_first(self) -> bool:
        """Whether the sender applies the ops, because the result is no larger than the source."""
        return DTYPES[self.dtypes[1]].itemsize <= DTYPES[self.dtypes[0]].itemsize

    @property
    def dtype(self) -> str:
        """The dtype in which the elements are sent."""
        return self.dtypes[self.converts_first]

    @property
    def nbytes(self) -> int:
        """Bytes of the elements as they are sent."""
        return self.piece.numel * DTYPES[self.dtype].itemsize

    @property
    def is_local(self) -> bool:
        """Whether the elements stay on one rank."""
        return self.sender == self.receiver


class WholeStep(NamedTuple):
    """A step that runs on whole tensors.

    Args:
        step: its sources and targets are the keys of slots of the sides `"input"` and `"output"`.
        maker: the rank that runs it.
    """

    step: Step
    maker: int


@dataclass(frozen=True)
class Traffic:
    """All that one step needs.

    Args:
        keys: the targets that are filled.
        routes: the routes to the targets.
        gathers: the routes of inputs to the rank of `making`; empty without one.
        making: the step, where it runs on whole tensors.
    """

    keys: tuple[str, ...]
    routes: tuple[Route, ...]
    gathers: tuple[Route, ...] = ()
    making: WholeStep | None = None


class Holders:
    """Which ranks hold which boxes of each tensor.

    >>> holders = Holders([{"a": Box((0,), (2,))}, {"a": Box((2,), (2,))}, {"a": Box((2,), (2,))}])
    >>> holders.boxes("a"), holders.ranks("a", Box((2,), (2,)))
    ((Box(low=(0,), extent=(2,)), Box(low=(2,), extent=(2,))), (1, 2))

    Args:
        by_rank: for each rank the box that it holds of each tensor; boxes without elements count for nothing.
    """

    def __init__(self, by_rank: Sequence[Mapping[str, Box]]) -> None:
        self._ranks: dict[str, dict[Box, list[int]]] = {}
        for rank, held in enumerate(by_rank):
            for key, box in held.items():
                if box.numel:
                    self._ranks.setdefault(key, {}).setdefault(box, []).append(rank)

    def boxes(self, key: str) -> tuple[Box, ...]:
        """Return the different boxes of a tensor."""
        return tuple(self._ranks.get(key, ()))

    def ranks(self, key: str, box: Box) -> tuple[int, ...]:
        """Return the ranks that hold a box."""
        return tuple(self._ranks[key][box])


@dataclass
class Router:
    """Finds the routes of steps. Ranks that hold the same box take turns to send it.

    Args:
        sources, targets: which ranks hold what.
        size: how many ranks there are.
    """

    sources: Holders
    targets: Holders
    size: int
    _sent: list[int] = field(default_factory=list)
    _work: list[int] = field(default_factory=list)
    _layouts: dict[tuple[int, Boxes, Boxes], Layout] = field(default_factory=dict)
    _programs: list[Program] = field(default_factory=list)  # kept, so that no other has the id of one

    def __post_init__(self) -> None:
        self._sent, self._work = [0] * self.size, [0] * self.size

    def traffic(self, steps: Iterable[Step], skipped: Iterable[str] = ()) -> Iterator[Traffic]:
        """Yield what each step needs; a step of which no rank holds a target is left out.

        Args:
            skipped: targets that are filled under another name.
        """
        left_out = set(skipped)
        for number, step in enumerate(steps):
            keys = tuple(key for key in step.targets if key not in left_out and self.targets.boxes(key))
            if keys:
                yield self._by_elements(step, keys) or self._whole(step, keys, f"{number}:")

    def _by_elements(self, step: Step, keys: Sequence[str]) -> Traffic | None:
        """The traffic of a step that handles elements one by one; None for any other."""
        found = by_elements(step.program)
        if found is None:
            return None
        layout, chains = found
        program = step.program
        dtypes = {p.target: (program.inputs[p.source].dtype, program.outputs[p.target].dtype) for p in layout.pieces}
        here = [
            (n, BoxAddress("source", key, box)) for n, key in enumerate(step.sources) for box in self.sources.boxes(key)
        ]
        wanted = [self.targets.boxes(key) if key in keys else () for key in step.targets]
        there = [(n, BoxAddress("target", key, box)) for n, key in enumerate(step.targets) for box in wanted[n]]
        routes: list[Route] = []
        sources = tuple(self.sources.boxes(key) for key in step.sources)
        for piece in self._between(program, layout, sources, tuple(wanted)).pieces:
            (_, source), (number, target) = here[piece.source], there[piece.target]
            for receiver in self.targets.ranks(target.key, target.box):
                route = Route(-1, receiver, source, target, piece, dtypes[number], tuple(chains[number]))
                routes.append(self._sent_by(route, self.sources.ranks(source.key, source.box)))
        return Traffic(tuple(keys), tuple(routes))

    def _between(self, program: Program, layout: Layout, sources: Boxes, targets: Boxes) -> Layout:
        """The layout between boxes, computed once for all steps that are cut alike."""
        known = id(program), sources, targets
        if known not in self._layouts:
            self._programs.append(program)
            self._layouts[known] = between(layout, sources, targets)
        return self._layouts[known]

    def _sent_by(self, route: Route, holders: Sequence[int]) -> Route:
        """The route from the receiver itself where it holds the box, else from the holder that has sent least."""
        if route.receiver in holders:
            return route._replace(sender=route.receiver)
        sender = min(holders, key=self._sent.__getitem__)
        self._sent[sender] += route.nbytes
        return route._replace(sender=sender)

    def _whole(self, step: Step, keys: Sequence[str], prefix: str) -> Traffic:
        """The traffic of a step that runs on whole tensors, on the rank that has had least of them."""
        maker = min(range(self.size), key=self._work.__getitem__)
        self._work[maker] += sum(spec.nbytes for spec in (*step.program.inputs, *step.program.outputs))
        gathers: list[Route] = []
        for number, (key, spec) in enumerate(zip(step.sources, step.program.inputs)):
            whole = BoxAddress("input", f"{prefix}{number}", Box.whole(spec.shape))
            gathers += self._copies(
                [BoxAddress("source", key, b) for b in self.sources.boxes(key)], [whole], spec.dtype, maker
            )
        routes: list[Route] = []
        for number, (key, spec) in enumerate(zip(step.targets, step.program.outputs)):
            if key in keys:
                made = BoxAddress("output", f"{prefix}{number}", Box.whole(spec.shape))
                wanted = [BoxAddress("target", key, box) for box in self.targets.boxes(key)]
                routes += self._copies([made], wanted, spec.dtype, maker)
        sources = tuple(f"{prefix}{number}" for number in range(len(step.sources)))
        targets = tuple(f"{prefix}{number}" for number in range(len(step.targets)))
        making = WholeStep(step._replace(sources=sources, targets=targets), maker)
        return Traffic(tuple(keys), tuple(routes), tuple(gathers), making)

    def _copies(
        self, here: Sequence[BoxAddress], there: Sequence[BoxAddress], dtype: str, maker: int
    ) -> Iterator[Route]:
        """The routes that copy a tensor from its boxes on one side to those on the other."""
        shape = (here[0] if here[0].side == "output" else there[0]).box.extent if here else ()
        layout = between(Layout.identity([shape]), [[s.box for s in here]], [[s.box for s in there]])
        for piece in layout.pieces:
            source, target = here[piece.source], there[piece.target]
            receivers = (maker,) if target.side == "input" else self.targets.ranks(target.key, target.box)
            holders = (maker,) if source.side == "output" else self.sources.ranks(source.key, source.box)
            for receiver in receivers:
                yield self._sent_by(Route(-1, receiver, source, target, piece, (dtype, dtype)), holders)
