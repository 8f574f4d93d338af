"""Boxes: cutting pieces to them is what indexing does, and the boxes of a partition give the whole."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.boxes import Box, covers_once
from ckptsurgery.planning.box_layouts import between, restrict
from ckptsurgery.planning.layout import Layout, Piece

Array = np.ndarray


def carried_out(layout: Layout, sources: list[Array]) -> list[Array]:
    """What a layout makes of dense arrays, element by element; -1 where nothing came."""
    made = [np.full(shape, -1, np.int64) for shape in layout.targets]
    for piece in layout.pieces:
        for index in np.ndindex(*piece.shape):
            a = piece.source_offset + sum(i * s for i, s in zip(index, piece.source_strides))
            b = piece.target_offset + sum(i * s for i, s in zip(index, piece.target_strides))
            assert made[piece.target].reshape(-1)[b] == -1, "an element is written twice"
            made[piece.target].reshape(-1)[b] = sources[piece.source].reshape(-1)[a]
    return made


def numbered(shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
    counts = np.cumsum([0, *map(math.prod, shapes)])
    return [np.arange(a, b).reshape(shape) for a, b, shape in zip(counts, counts[1:], shapes)]


def taken(array: Array, box: Box) -> Array:
    return array[slices(box)]


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(low, low + n) for low, n in zip(box.low, box.extent))


def partition(shape: tuple[int, ...], draw: random.Random) -> list[Box]:
    """A random partition: boxes cut in two along random dimensions, not in a grid."""
    boxes = [Box.whole(shape)]
    for _ in range(draw.randrange(6)):
        box = boxes.pop(draw.randrange(len(boxes)))
        axes = [n for n, size in enumerate(box.extent) if size > 1]
        if not axes:
            boxes.append(box)
            continue
        axis = draw.choice(axes)
        at = draw.randrange(1, box.extent[axis])
        low = tuple(start + at * (n == axis) for n, start in enumerate(box.low))
        first = tuple(at if n == axis else size for n, size in enumerate(box.extent))
        second = tuple(size - at if n == axis else size for n, size in enumerate(box.extent))
        boxes += [Box(box.low, first), Box(low, second)]
    draw.shuffle(boxes)
    return boxes


RULES = {
    "a [x y] -> b [y x]": ([("a", (5, 7))], {}),
    "a [(p x) y] -> {p:q,k,v} [x y]": ([("a", (9, 4))], {}),
    "{p:q,k,v} [x y] -> a [(p x) y]": ([("q", (3, 5)), ("k", (3, 5)), ("v", (3, 5))], {}),
    "{p:q,k,v} [rows:p y] -> a [(p rows:p) y]": ([("q", (6, 5)), ("k", (2, 5)), ("v", (3, 5))], {}),
    "{p:q,k,v} [(g rows:p) d] -> a [(g p rows:p) d]": ([("q", (8, 3)), ("k", (2, 3)), ("v", (2, 3))], {"g": 2}),
    "a [(h half two) d] -> b [(h two half) d]": ([("a", (12, 5))], {"h": 3, "two": 2}),
    "e.{e}.{p:w,u} [f d] -> x [e (p f) d]": ([(f"e.{e}.{p}", (3, 4)) for e in range(3) for p in "wu"], {}),
    "e.{e}.{p:w,u} [f d] -> x [e d (f p)]": ([(f"e.{e}.{p}", (3, 4)) for e in range(3) for p in "wu"], {}),
    "a [x y z] -> b [z x y]": ([("a", (3, 4, 5))], {}),
    "a [o (a b c)] -> b [o (c b a)]": ([("a", (3, 24))], {"a": 2, "b": 3}),
    "a [(x y)] -> b [x y]": ([("a", (24,))], {"x": 4}),
    "a [x (y z)] -> b [(x y) z]": ([("a", (3, 10))], {"y": 5}),
    "a [1 n d] -> b [n d]": ([("a", (1, 7, 3))], {}),
    "a [] -> b []": ([("a", ())], {}),
}  # fmt: skip


def layout_of(rule: str) -> Layout:
    tensors, dims = RULES[rule]
    plan = cs.plan({key: cs.TensorSpec(shape, "F32") for key, shape in tensors}, cs.Recipe([rule], dims=dims))
    (step,) = plan.steps
    assert step.program.moves is not None
    return step.program.moves


@pytest.mark.parametrize("rule", RULES)
def test_the_boxes_of_a_partition_give_what_the_whole_gives(rule: str) -> None:
    layout = layout_of(rule)
    wholes = numbered(layout.sources)
    expected = carried_out(layout, wholes)
    for seed in range(12):
        draw = random.Random(seed)
        sources = [partition(shape, draw) for shape in layout.sources]
        targets = [partition(shape, draw) for shape in layout.targets]
        parts = [taken(whole, box) for whole, boxes in zip(wholes, sources) for box in boxes]
        made = carried_out(between(layout, sources, targets), parts)
        wanted = [taken(whole, box) for whole, boxes in zip(expected, targets) for box in boxes]
        assert all(np.array_equal(a, b) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_cutting_the_source_and_the_target_commute(rule: str) -> None:
    layout, draw = layout_of(rule), random.Random(1)
    sources = [partition(shape, draw) for shape in layout.sources]
    targets = [partition(shape, draw) for shape in layout.targets]
    whole_sources = [[Box.whole(shape)] for shape in layout.sources]
    whole_targets = [[Box.whole(shape)] for shape in layout.targets]
    there = between(layout, sources, whole_targets)
    back = between(layout.inverse(), [[Box.whole(s)] for s in layout.targets], sources).inverse()
    parts = [taken(w, box) for w, boxes in zip(numbered(layout.sources), sources) for box in boxes]
    assert all(map(np.array_equal, carried_out(there, parts), carried_out(back, parts)))
    assert between(layout, whole_sources, targets).targets == tuple(b.extent for bs in targets for b in bs)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[Piece, tuple[int, ...], Box]:
    """Any piece over a dense source: strides that cross rows, runs that begin in the middle of one, repeated axes."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    numel = math.prod(shape)
    offset = draw(st.integers(0, numel - 1))
    room, extents, strides = numel - 1 - offset, [], []
    for _ in range(draw(st.integers(0, 3))):
        stride = draw(st.integers(0, max(room, 0)))
        size = draw(st.integers(1, 1 + min(room // stride, 8) if stride else 3))
        extents.append(size)
        strides.append(stride)
        room -= stride * (size - 1)
    target = [math.prod(extents[n + 1 :]) for n in range(len(extents))]
    piece = Piece(0, 0, tuple(extents), offset, tuple(strides), 0, tuple(target))
    low = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return piece, shape, Box(low, tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, low)))


@given(pieces())
@settings(max_examples=600, deadline=None)
def test_a_piece_cut_to_a_box_is_what_indexing_a_numbered_array_gives(case: tuple[Piece, tuple[int, ...], Box]) -> None:
    piece, shape, box = case
    whole = np.arange(math.prod(shape)).reshape(shape)
    layout = Layout((shape,), (piece.shape,), (piece,))
    (expected,) = carried_out(layout, [whole])
    inside = np.isin(expected, taken(whole, box))
    (made,) = carried_out(
        Layout((box.extent,), (piece.shape,), tuple(restrict(piece, shape, box))), [taken(whole, box)]
    )
    assert np.array_equal(made, np.where(inside, expected, -1))


def test_long_runs_stay_long() -> None:
    """A shard of rows is one run, and a shard of columns is one piece, however many rows there are."""
    run = Piece(0, 0, (4096 * 1024,), 0, (1,), 0, (1,))
    assert restrict(run, (4096, 1024), Box((1024, 0), (1024, 1024))) == [
        Piece(0, 0, (1 << 20,), 0, (1,), 1 << 20, (1,))
    ]
    columns = restrict(run, (4096, 1024), Box((0, 256), (4096, 256)))
    assert columns == [Piece(0, 0, (4096, 256), 0, (256, 1), 256, (1024, 1))]
    odd = Piece(0, 0, (10_000,), 500, (1,), 0, (1,))
    assert len(restrict(odd, (4096, 1024), Box.whole((4096, 1024)))) <= 3


def test_partitions_cover_once_and_nothing_else_does() -> None:
    draw = random.Random(0)
    for _ in range(300):
        shape = tuple(draw.randrange(1, 6) for _ in range(draw.randrange(4)))
        boxes = partition(shape, draw)
        assert covers_once(shape, boxes)
        counted = np.zeros(shape, int)
        moved = list(boxes)
        moved[0] = Box(tuple(max(0, n - draw.randrange(2)) for n in moved[0].low), moved[0].extent)
        for box in moved:
            counted[slices(box)] += 1
        assert covers_once(shape, moved) == bool((counted == 1).all())
        assert not covers_once(shape, boxes[1:])
        assert not covers_once(shape, [*boxes, boxes[0]])
    assert not covers_once((2,), [Box((1,), (2,))])
    assert covers_once((0, 3), [])
