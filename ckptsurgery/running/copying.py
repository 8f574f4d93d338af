"""Moving bytes from files to files: which runs a plan needs, merged where they are neighbours, in blocks of 1 MiB.

A rearrangement whose pieces are runs of bytes never becomes a tensor, so splitting, fusing and stacking need no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from ..planning.costing import CHUNK
from ..planning.cutting import run_length
from ..planning.layout import Layout, Piece
from ..specs import DTYPES
from ..storage.checkpoint import Checkpoint
from ..storage.cloning import BLOCK
from ..storage.contents import Entry, Extent
from ..storage.staging import Writer

__all__ = ["ByteRun", "copy_runs", "merged", "runs_of"]


_WORTH_SHARING = 64 << 10
BareRun = tuple[str, int, str, int, int]
"""What a `ByteRun` is made of: most are joined with their neighbours before one is made."""


class ByteRun(NamedTuple):
    """Bytes that move as they are."""

    target_file: str
    target_offset: int
    source_file: str
    source_offset: int
    nbytes: int


def runs_of(
    layout: Layout, dtypes: Sequence[str], sources: Sequence[Entry], targets: Sequence[Extent | None]
) -> Iterator[BareRun]:
    """The byte runs of a rearrangement.

    Args:
        dtypes: of the targets.
        sources: where their tensors lie, plainly; targets: where theirs go, None for one that is not written.
    """
    if layout.copies is not None:
        for number, target in zip(layout.copies, targets):
            if target is not None and target.nbytes:
                source = sources[number]
                yield target.file, target.offset, str(source.file), source.offset, target.nbytes
        return
    for piece in layout.pieces:
        source, target = sources[piece.source], targets[piece.target]
        if target is None:
            continue
        size, file = DTYPES[dtypes[piece.target]].itemsize, str(source.file)
        for a, b, length in _elements(piece):
            yield target.file, target.offset + b * size, file, source.offset + a * size, length * size


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
    return list(_joined(sorted(_joined(runs))))


def _joined(runs: Iterable[BareRun]) -> Iterator[ByteRun]:
    file = source = ""
    at = start = size = 0
    for run in runs:
        target_file, target_offset, source_file, source_offset, nbytes = run
        if (
            source_offset == start + size
            and target_offset == at + size
            and source_file == source
            and target_file == file
        ):
            size += nbytes
            continue
        if size:
            yield ByteRun(file, at, source, start, size)
        file, at, source, start, size = run
    if size:
        yield ByteRun(file, at, source, start, size)


def copy_runs(runs: Iterable[ByteRun], checkpoint: Checkpoint, writer: Writer, moved: Callable[[int], object]) -> None:
    """Copy each run, by sharing its blocks where the file system can, else through one buffer of 1 MiB.

    Args:
        moved: hears of the bytes as they go.
    """
    runs = list(runs)
    checkpoint.read_in_order({run.source_file for run in runs})
    buffer = memoryview(bytearray(CHUNK))
    refused: set[tuple[str, str]] = set()
    for some in _in_one_write(runs):
        run = some[0]
        if len(some) > 1:
            _collect(some, checkpoint, writer, buffer, moved)
            continue
        pair = run.target_file, run.source_file
        shared = _blocks(run)
        if shared and pair not in refused:
            if _share(shared, checkpoint, writer):
                moved(shared.nbytes)
                head = shared.target_offset - run.target_offset
                _copy(_part(run, 0, head), checkpoint, writer, buffer, moved)
                _copy(_part(run, head + shared.nbytes, run.nbytes), checkpoint, writer, buffer, moved)
                continue
            refused.add(pair)
        _copy(run, checkpoint, writer, buffer, moved)


def _in_one_write(runs: Iterable[ByteRun]) -> Iterator[Sequence[ByteRun]]:
    """Short runs that adjoin in the target together, as far as the buffer holds them; others alone."""
    held: list[ByteRun] = []
    file, end, size = "", 0, 0
    for run in runs:
        target_file, offset, _, _, nbytes = run
        if held and (offset != end or size + nbytes > CHUNK or target_file != file or nbytes >= _WORTH_SHARING):
            yield held
            held, size = [], 0
        if nbytes >= _WORTH_SHARING:
            yield (run,)
            continue
        held.append(run)
        file, end, size = target_file, offset + nbytes, size + nbytes
    if held:
        yield held


def _collect(
    runs: Sequence[ByteRun],
    checkpoint: Checkpoint,
    writer: Writer,
    buffer: memoryview,
    moved: Callable[[int], object],
) -> None:
    first, size = runs[0], sum([run.nbytes for run in runs])
    if writer.has(first.target_file, first.target_offset, size):
        writer.skip(size)
    else:
        at, read = 0, checkpoint.read_file_into
        for _, _, file, offset, nbytes in runs:
            read(file, offset, buffer[at : at + nbytes])
            at += nbytes
        writer.write(first.target_file, first.target_offset, buffer[:size])
    moved(size)


def _blocks(run: ByteRun) -> ByteRun | None:
    """The whole blocks within a run, where it has the same place within a block on both sides."""
    head = -run.target_offset % BLOCK
    whole = (run.nbytes - head) // BLOCK * BLOCK
    if (run.target_offset - run.source_offset) % BLOCK or whole < _WORTH_SHARING:
        return None
    return _part(run, head, head + whole)


def _share(run: ByteRun, checkpoint: Checkpoint, writer: Writer) -> bool:
    if writer.has(run.target_file, run.target_offset, run.nbytes):
        writer.skip(run.nbytes)
        return True
    with checkpoint.using(run.source_file) as source:
        return writer.clone(run.target_file, run.target_offset, source, run.source_offset, run.nbytes)


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
