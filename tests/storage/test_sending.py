"""Files reach a device through a ring of buffers: all bytes arrive, in order, and the host holds no more than the ring.

The device of these tests is a thread that copies in the CPU's memory, one copy after another and each of them late.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckptsurgery as cs
from ckptsurgery.storage.sending import BufferChunk, TensorRun, chunks_of, ring_size, send
from ckptsurgery.storage.sources.links import as_device, link_to

FILE = bytes(n * 37 % 251 for n in range(5000))


class Late:
    """A device that takes its time, and notices who overwrites what it still has to fetch."""

    def __init__(self, fails_at: int = -1) -> None:
        self.held, self.going, self.most, self.copies = 0, 0, 0, 0
        self.fails_at = fails_at
        self.thread = ThreadPoolExecutor(1)

    def buffer(self, nbytes: int) -> torch.Tensor:
        self.held += nbytes
        return torch.zeros(nbytes, dtype=torch.uint8)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
        self.copies += 1
        if self.copies - 1 == self.fails_at:
            raise cs.CheckpointError(cs.Diagnostic("device-failed", "the device gave up"))
        self.going += 1
        self.most = max(self.most, self.going)
        seen = [source.clone() for _, source in pairs]
        return self.thread.submit(self._copy, pairs, seen).result

    def _copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], seen: Sequence[torch.Tensor]) -> None:
        time.sleep(0.0005)
        for (target, source), before in zip(pairs, seen):
            assert torch.equal(source, before), "a buffer was filled again while the device fetched from it"
            target.copy_(source)
        self.going -= 1


@pytest.fixture
def late() -> Iterator[Late]:
    device = Late()
    yield device
    device.thread.shutdown()


class Reading:
    """What was read of the one file, in the order in which it was asked for."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[tuple[int, int]] = []
        self.fails_at = fails_at
        self.lock = threading.Lock()

    def __call__(self, file: str, offset: int, buffer: memoryview) -> None:
        with self.lock:
            self.seen.append((offset, len(buffer)))
        if self.fails_at is not None and offset <= self.fails_at < offset + len(buffer):
            raise cs.CheckpointError(cs.Diagnostic("read-failed", "the disk gave up"))
        buffer[:] = FILE[offset : offset + len(buffer)]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.tolist())


def room(runs: Sequence[TensorRun]) -> list[torch.Tensor]:
    """A tensor for each run, old values in it."""
    return [torch.full((run.nbytes,), 255, dtype=torch.uint8) for run in runs]


EXTENTS = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 700)), max_size=12)


@given(EXTENTS, st.integers(1, 300), st.integers(1, 4))
def test_every_byte_arrives_where_it_belongs(extents: list[tuple[int, int]], size: int, readers: int) -> None:
    runs = [TensorRun("f", offset, nbytes, n) for n, (offset, nbytes) in enumerate(extents)]
    tensors, device, whole = room(runs), Late(), []
    begun: set[int] = set()

    def arrived(number: int) -> None:
        run = runs[number]
        assert bytes_of(tensors[number]) == FILE[run.offset : run.offset + run.nbytes], "said to be there, and is not"
        whole.append(number)

    send(runs, tensors, Reading(), device, begun=begun.add, arrived=arrived, readers=readers, size=size)
    assert sorted(whole) == sorted(begun) == list(range(len(runs)))
    assert device.held <= ring_size(readers, size)
    device.thread.shutdown()


@given(st.permutations(range(6)), st.integers(1, 64))
def test_a_tensor_may_be_made_of_runs_from_anywhere(order: list[int], size: int) -> None:
    runs = [TensorRun("f", 500 * source, 30, 0, 30 * n) for n, source in enumerate(order)]
    tensor, device = torch.zeros(180, dtype=torch.uint8), Late()
    heard: list[int] = []
    send(runs, [tensor], Reading(), device, begun=int, arrived=heard.append, readers=2, size=size)
    assert bytes_of(tensor) == b"".join(FILE[500 * source : 500 * source + 30] for source in order)
    assert heard == [0]
    device.thread.shutdown()


@given(EXTENTS, st.integers(1, 300))
def test_chunks_come_in_the_order_of_the_file_and_fill_a_buffer_at_most(
    extents: list[tuple[int, int]], size: int
) -> None:
    runs = [TensorRun("f", offset, nbytes, n) for n, (offset, nbytes) in enumerate(extents)]
    chunks = list(chunks_of(runs, size))
    assert all(0 < chunk.nbytes <= size for chunk in chunks)
    assert all(a.offset + a.nbytes <= b.offset for a, b in pairwise(chunks)), "no byte is read twice"
    parts = [(chunk, part) for chunk in chunks for part in chunk.parts]
    assert all(part.at >= 0 and part.at + part.nbytes <= chunk.nbytes for chunk, part in parts)
    for run in runs:
        mine = sorted((p.start, p.nbytes, c.offset + p.at) for c, p in parts if p.tensor == run.tensor)
        assert sum(nbytes for _, nbytes, _ in mine) == run.nbytes
        assert all(at == run.offset + start for start, _, at in mine)


def test_small_neighbours_share_a_buffer_and_far_ones_do_not() -> None:
    near = [TensorRun("f", 100 * n, 90, n) for n in range(10)]
    assert [(c.offset, c.nbytes, len(c.parts)) for c in chunks_of(near, 5000)] == [(0, 990, 10)]
    far = [TensorRun("f", 0, 90, 0), TensorRun("f", 3000, 90, 1), TensorRun("g", 90, 90, 2)]
    assert [tuple(c)[:3] for c in chunks_of(far, 5000)] == [("f", 0, 90), ("f", 3000, 90), ("g", 90, 90)]


def test_buffers_are_read_in_order_and_used_again(late: Late) -> None:
    runs, read = [TensorRun("f", 0, 4800, 0)], Reading()
    tensors = room(runs)
    send(runs, tensors, read, late, begun=int, arrived=int, readers=1, size=48)
    assert read.seen == [(at, 48) for at in range(0, 4800, 48)]
    assert late.copies == 100
    assert late.held <= ring_size(1, 48) == 4 * 48
    assert late.most > 1, "reading goes on while the device copies"
    assert bytes_of(tensors[0]) == FILE[:4800]


def test_little_takes_little_memory(late: Late) -> None:
    runs = [TensorRun("f", 0, 10, 0), TensorRun("f", 10, 20, 1)]
    send(runs, room(runs), Reading(), late, begun=int, arrived=int)
    assert late.held == 30


@pytest.mark.parametrize("broken", [0, 700, 1999])
def test_a_read_that_fails_leaves_whole_torn_and_untouched_tensors_and_nothing_under_way(broken: int) -> None:
    runs = [TensorRun("f", 200 * n, 200, n) for n in range(10)]
    tensors, device = room(runs), Late()
    begun: set[int] = set()
    whole: set[int] = set()
    with pytest.raises(cs.CheckpointError, match="the disk gave up"):
        send(runs, tensors, Reading(broken), device, begun=begun.add, arrived=whole.add, readers=2, size=64)
    assert device.going == 0
    assert broken // 200 not in whole
    for number, (run, tensor) in enumerate(zip(runs, tensors)):
        if number in whole:
            assert bytes_of(tensor) == FILE[run.offset : run.offset + run.nbytes]
        elif number not in begun:
            assert bytes_of(tensor) == b"\xff" * 200
    assert whole <= begun
    device.thread.shutdown()


def test_a_device_that_fails_ends_all_of_it() -> None:
    runs = [TensorRun("f", 200 * n, 200, n) for n in range(10)]
    device, whole = Late(fails_at=5), set[int]()
    with pytest.raises(cs.CheckpointError, match="the device gave up"):
        send(runs, room(runs), Reading(), device, begun=int, arrived=whole.add, readers=2, size=200)
    assert device.going == 0
    assert whole == set(range(5))
    device.thread.shutdown()


def test_on_the_cpu_plain_copies_do(tmp_path: Path) -> None:
    assert link_to(torch.device("cpu")) is None
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True), "c": torch.empty(0, 3)}
    cs.save(tensors, tmp_path / "x.safetensors")
    with cs.open(tmp_path / "x.safetensors") as checkpoint:
        made = checkpoint.state_dict("cpu")
    assert set(made) == set(tensors)
    assert all(torch.equal(made[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", "maia", 3.5])
def test_a_device_that_is_not_there_is_refused_in_words(device: object) -> None:
    with pytest.raises(cs.CheckpointError) as told:
        as_device(device)  # type: ignore[arg-type]
    (found,) = told.value.diagnostics
    assert found.code == "bad-device" and len(found.headline) < 300


def test_a_chunk_knows_its_parts() -> None:
    (chunk,) = chunks_of([TensorRun("f", 8, 4, 7, 20)], 99)
    assert chunk == BufferChunk("f", 8, 4, [(7, 20, 0, 4)])
