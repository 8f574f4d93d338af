"""Moving bytes from files to files: which runs a plan needs, merged where they are neighbours.

Long runs are copied by the kernel where it can; short ones, and those that it refuses, go through a buffer of 1 MiB.

A rearrangement whose pieces are runs of bytes never becomes a tensor, so splitting, fusing and stacking need no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product, starmap
from typing import NamedTuple

from ...narrowing import present
from ...planning.costing import CHUNK
from ...planning.cutting import run_length
from ...planning.layout import Layout, Piece
from ...specs import DTYPES, TensorSpec
from ...storage.checkpoint import Checkpoint
from ...storage.contents import Extent
from ...storage.output.staging import Writer
from ...storage.sources.byte_source import MEMORY, Range
from ...storage.sources.kernel_copies import BLOCK, KERNEL_PIECE
from .tasks import Task, run_tasks

__all__ = [
    "FETCHED_AT_ONCE",
    "ByteRun",
    "batches_within",
    "copy_runs",
    "fetch_ranges",
    "merged",
    "moves_of",
    "neighbours",
    "runs_of",
]

_LONG = 64 << 10
"""Bytes of a run from which on a call of its own costs less than collecting it with its neighbours."""

FETCHED_AT_ONCE = 64 << 20
"""Bytes of remote files that are asked for together: enough for the requests that a source makes at a time."""

Move = tuple[int, int, int, int, int]
"""Which source goes to which target, from which byte of the one to which byte of the other, and how many bytes."""

BareRun = tuple[str, int, int, str, int]
"""What a `ByteRun` is made of: most are joined with their neighbours before one is made."""


class ByteRun(NamedTuple):
    """Bytes that move as they are."""

    target_file: str
    target_offset: int
    nbytes: int
    source_file: str
    source_offset: int


def moves_of(layout: Layout, outputs: Sequence[TensorSpec]) -> list[Move]:
    """A rearrangement in bytes, which is the same for all steps that run one program.

    Args:
        outputs: specs of the targets.
    """
    if layout.copies is not None:
        return [(source, n, 0, 0, spec.nbytes) for n, (source, spec) in enumerate(zip(layout.copies, outputs))]
    sizes = [DTYPES[spec.dtype].itemsize for spec in outputs]
    return [
        (piece.source, piece.target, a * sizes[piece.target], b * sizes[piece.target], length * sizes[piece.target])
        for piece in layout.pieces
        for a, b, length in _elements(piece)
    ]


def runs_of(
    moves: Iterable[Move], sources: Sequence[tuple[str, int]], targets: Sequence[Extent | None]
) -> Iterator[BareRun]:
    """The byte runs of a rearrangement.

    Args:
        sources: file and offset of each tensor, all of whose bytes lie there in order.
        targets: where theirs go, None for one that is not written.
    """
    for source, target, start, at, nbytes in moves:
        place = targets[target]
        if place is not None and nbytes:
            file, offset = sources[source]
            yield place[0], place[1] + at, nbytes, file, offset + start


def _elements(piece: Piece) -> Iterator[tuple[int, int, int]]:
    """(source offset, target offset, length) of each run, in elements."""
    inner = run_length(piece)
    if inner == piece.numel:
        yield piece.source_offset, piece.target_offset, inner
        return
    outer = slice(None, -1) if inner > 1 else slice(None)
    shape, a, b = piece.shape[outer], piece.source_strides[outer], piece.target_strides[outer]
    for index in product(*map(range, shape)):
        yield (
            piece.source_offset + sum(i * s for i, s in zip(index, a)),
            piece.target_offset + sum(i * s for i, s in zip(index, b)),
            inner,
        )


def merged(runs: Iterable[BareRun]) -> list[ByteRun]:
    """Runs in the order of the target files, neighbours on both sides made one."""
    # Most come in order already: so what is sorted is short, and 100,000 runs never lie in memory together.
    return list(starmap(ByteRun, _joined(sorted(_joined(runs)))))


def _joined(runs: Iterable[BareRun]) -> Iterator[BareRun]:
    file = source = ""
    at = start = size = 0
    for run in runs:
        target_file, target_offset, nbytes, source_file, source_offset = run
        if (
            source_offset == start + size
            and target_offset == at + size
            and source_file == source
            and target_file == file
        ):
            size += nbytes
            continue
        if size:
            yield file, at, size, source, start
        file, at, size, source, start = run
    if size:
        yield file, at, size, source, start


def copy_runs(runs: Iterable[ByteRun], checkpoint: Checkpoint, writer: Writer, moved: Callable[[int], object]) -> None:
    """Copy each run: long ones in the kernel, which shares blocks where the file system can, else through a buffer.

    Args:
        moved: called with a number of bytes as they are copied.
    """
    runs = list(runs)
    held = [run for run in runs if run.source_file == MEMORY and run.nbytes >= _LONG]
    if held:
        run_tasks((Task(0, partial(_write_held, run, checkpoint, writer)) for run in held), moved)
        runs = [run for run in runs if run.source_file != MEMORY or run.nbytes < _LONG]
    remote = {file for file in {run.source_file for run in runs} if checkpoint.is_remote(file)}
    if remote:
        _fetch([run for run in runs if run.source_file in remote], checkpoint, writer, moved)
        runs = [run for run in runs if run.source_file not in remote]
    checkpoint.read_in_order({run.source_file for run in runs})
    buffer = memoryview(bytearray(CHUNK))
    refused: set[tuple[str, str]] = set()  # pairs of files between which the kernel does not copy
    for some in _in_one_write(runs, writer):
        if len(some) > 1:
            _collect(some, checkpoint, writer, buffer, moved)
            continue
        for part in _at_blocks(some[0]):
            pair = part.target_file, part.source_file
            if pair in refused or part.nbytes < _LONG:
                _copy(part, checkpoint, writer, buffer, moved)
            elif rest := _copy_in_kernel(part, checkpoint, writer, moved):
                refused.add(pair)
                _copy(rest, checkpoint, writer, buffer, moved)


def _fetch(runs: Iterable[ByteRun], checkpoint: Checkpoint, writer: Writer, moved: Callable[[int], object]) -> None:
    """Copy runs of remote files: many ranges are fetched at once, then written."""
    parts = (_part(run, at, min(at + CHUNK, run.nbytes)) for run in runs for at in range(0, run.nbytes, CHUNK))
    for batch in batches_within(parts, FETCHED_AT_ONCE):
        wanted = [run for run in batch if not writer.has(run.target_file, run.target_offset, run.nbytes)]
        buffers = [bytearray(run.nbytes) for run in wanted]
        fetch_ranges(checkpoint, wanted, [memoryview(buffer) for buffer in buffers])
        for run, buffer in zip(wanted, buffers):
            writer.write(run.target_file, run.target_offset, buffer)
        writer.skip(sum(run.nbytes for run in batch) - sum(run.nbytes for run in wanted))
        moved(sum(run.nbytes for run in batch))


def batches_within(runs: Iterable[ByteRun], most: int) -> Iterator[list[ByteRun]]:
    """Part runs into lists of so many bytes at most; a longer run is alone.

    >>> [len(batch) for batch in batches_within([ByteRun("t", 0, n, "s", 0) for n in (4, 4, 9, 1)], most=8)]
    [2, 1, 1]
    """
    batch: list[ByteRun] = []
    held = 0
    for run in runs:
        if batch and held + run.nbytes > most:
            yield batch
            batch, held = [], 0
        batch.append(run)
        held += run.nbytes
    if batch:
        yield batch


def fetch_ranges(checkpoint: Checkpoint, runs: Sequence[ByteRun], buffers: Sequence[memoryview]) -> None:
    """Fill a buffer for each run, with one call for each of the source's files."""
    by_file: dict[str, list[Range]] = {}
    for run, buffer in zip(runs, buffers):
        by_file.setdefault(run.source_file, []).append((run.source_offset, buffer))
    for file, ranges in by_file.items():
        checkpoint.read_ranges(file, ranges)


def neighbours(runs: Iterable[ByteRun], short: int, most: int, gap: int) -> Iterator[list[ByteRun]]:
    """Group short runs that lie close together in their source, to be read at once; long ones come alone.

    >>> runs = [ByteRun("t", 0, 4, "s", n) for n in (0, 4, 9, 99)]
    >>> [len(group) for group in neighbours(runs, short=8, most=12, gap=1)]
    [2, 1, 1]

    Args:
        runs: in the order of their sources.
        short: bytes below which a run is short.
        most: bytes that a group may span.
        gap: bytes between two of them that may be read in vain.
    """
    group: list[ByteRun] = []
    for run in runs:
        if group:
            first, last = group[0], group[-1]
            end = last.source_offset + last.nbytes
            between = 0 if first.source_file == MEMORY else gap  # nobody keeps alive what lies between two tensors
            near = run.source_file == first.source_file and end <= run.source_offset <= end + between
            if (
                not near
                or max(last.nbytes, run.nbytes) >= short
                or run.source_offset + run.nbytes - first.source_offset > most
            ):
                yield group
                group = []
        group.append(run)
    if group:
        yield group


def _write_held(run: ByteRun, checkpoint: Checkpoint, writer: Writer) -> int:
    """Write a run that is in memory, without a copy."""
    for start in range(0, run.nbytes, KERNEL_PIECE):
        part = _part(run, start, min(start + KERNEL_PIECE, run.nbytes))
        if writer.has(part.target_file, part.target_offset, part.nbytes):
            writer.skip(part.nbytes)
        else:
            view = present(checkpoint.view(part.source_file, part.source_offset, part.nbytes), "bytes in memory")
            writer.write(part.target_file, part.target_offset, view)
    return run.nbytes


def _in_one_write(runs: Iterable[ByteRun], writer: Writer) -> Iterator[Sequence[ByteRun]]:
    """Short runs that adjoin in the target together, as far as the buffer holds them; others alone."""
    held: list[ByteRun] = []
    file, start, end = "", 0, 0
    for run in runs:
        target_file, offset, nbytes, _, _ = run
        fits = target_file == file and offset + nbytes - start <= CHUNK and nbytes < _LONG
        if held and not (fits and writer.adjoin(end, offset)):
            yield held
            held = []
        if nbytes >= _LONG:
            yield (run,)
            continue
        if not held:
            file, start = target_file, offset
        held.append(run)
        end = offset + nbytes
    if held:
        yield held


def _collect(
    runs: Sequence[ByteRun],
    checkpoint: Checkpoint,
    writer: Writer,
    buffer: memoryview,
    moved: Callable[[int], object],
) -> None:
    first, last, size = runs[0], runs[-1], sum([run.nbytes for run in runs])
    start = first.target_offset
    if writer.has(first.target_file, start, size):
        writer.skip(size)
    else:
        read = checkpoint.read_file_into
        for _, at, nbytes, file, offset in runs:
            read(file, offset, buffer[at - start : at - start + nbytes])
        writer.write(first.target_file, start, buffer[: last.target_offset + last.nbytes - start])
    moved(size)


def _at_blocks(run: ByteRun) -> Iterator[ByteRun]:
    """Part a run where whole blocks begin and end, if they have the same place on both sides and could be shared."""
    head = -run.target_offset % BLOCK
    whole = (run.nbytes - head) // BLOCK * BLOCK
    if (run.target_offset - run.source_offset) % BLOCK or whole < _LONG:
        yield run
        return
    cuts = (0, head, head + whole, run.nbytes)
    yield from (_part(run, start, stop) for start, stop in pairwise(cuts) if start < stop)


def _copy_in_kernel(
    run: ByteRun, checkpoint: Checkpoint, writer: Writer, moved: Callable[[int], object]
) -> ByteRun | None:
    """Copy a run in the kernel, a piece at a time; return the rest that it refused, if any."""
    done = 0
    while done < run.nbytes:
        size = min(KERNEL_PIECE, run.nbytes - done)
        offset, copied = run.target_offset + done, size
        if writer.has(run.target_file, offset, size):
            writer.skip(size)
        else:
            with checkpoint.using(run.source_file) as source:
                if source is None:
                    return _part(run, done, run.nbytes)
                copied = writer.copy(run.target_file, offset, source, run.source_offset + done, size)
        done += copied
        moved(copied)
        if copied < size:
            return _part(run, done, run.nbytes)
    return None


def _part(run: ByteRun, start: int, stop: int) -> ByteRun:
    target, source = run.target_offset + start, run.source_offset + start
    return run._replace(target_offset=target, source_offset=source, nbytes=stop - start)


def _copy(
    run: ByteRun, checkpoint: Checkpoint, writer: Writer, buffer: memoryview, moved: Callable[[int], object]
) -> None:
    done = 0
    while done < run.nbytes:
        part = buffer[: min(CHUNK, run.nbytes - done)]
        if writer.has(run.target_file, run.target_offset + done, len(part)):
            writer.skip(len(part))
        else:
            checkpoint.read_file_into(run.source_file, run.source_offset + done, part)
            writer.write(run.target_file, run.target_offset + done, part)
        done += len(part)
        moved(len(part))
