"""Moving bytes from files to files: which runs a plan needs, merged where they are neighbours, in blocks of 1 MiB.

A rearrangement whose pieces are runs of bytes never becomes a tensor, so splitting, fusing and stacking need no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from ..planning.costing import CHUNK
from ..planning.layout import Layout, Piece
from ..specs import DTYPES
from ..storage.checkpoint import Checkpoint
from ..storage.contents import Extent
from ..storage.staging import Writer

__all__ = ["ByteRun", "copy_runs", "merged", "runs_of"]

_SHORT_RUN = 16 << 10
_MANY_RUNS = 4096


class ByteRun(NamedTuple):
    """Bytes that move as they are."""

    target_file: str
    target_offset: int
    source_file: str
    source_offset: int
    nbytes: int


def runs_of(
    layout: Layout, dtypes: Sequence[str], sources: Sequence[Extent], targets: Sequence[Extent]
) -> list[ByteRun] | None:
    """The byte runs of a rearrangement, or None where they are so many and so short that a tensor is the better way.

    Args:
        dtypes: of the targets.
        sources, targets: where the tensors of each side lie.
    """
    bits = [DTYPES[d].bits for d in dtypes]
    if any(b % 8 for b in bits) and layout.copies is None:
        return None
    if layout.copies is not None:
        return [
            ByteRun(t.file, t.offset, sources[s].file, sources[s].offset, t.nbytes)
            for s, t in zip(layout.copies, targets)
            if t.nbytes
        ]
    count = sum(_run_count(p) for p in layout.pieces)
    total = sum(t.nbytes for t in targets)
    if count == 0 or (count > _MANY_RUNS and total // count < _SHORT_RUN):
        return None
    runs = []
    for piece in layout.pieces:
        size = bits[piece.target] // 8
        source, target = sources[piece.source], targets[piece.target]
        for a, b, length in _elements(piece):
            runs.append(
                ByteRun(target.file, target.offset + b * size, source.file, source.offset + a * size, length * size)
            )
    return runs


def _runs_on(piece: Piece) -> bool:
    return not piece.shape or (piece.source_strides[-1] == piece.target_strides[-1] == 1)


def _run_count(piece: Piece) -> int:
    return piece.numel // piece.shape[-1] if piece.shape and _runs_on(piece) else piece.numel


def _elements(piece: Piece) -> Iterator[tuple[int, int, int]]:
    """(source offset, target offset, length) of each run, in elements."""
    inner = piece.shape[-1] if piece.shape and _runs_on(piece) else 1
    outer = slice(None, -1) if piece.shape and _runs_on(piece) else slice(None)
    shape, a, b = piece.shape[outer], piece.source_strides[outer], piece.target_strides[outer]
    for index in product(*map(range, shape)):
        yield (
            piece.source_offset + sum(i * s for i, s in zip(index, a)),
            piece.target_offset + sum(i * s for i, s in zip(index, b)),
            inner,
        )


def merged(runs: Iterable[ByteRun]) -> list[ByteRun]:
    """Runs in the order of the target files, neighbours on both sides made one."""
    result: list[ByteRun] = []
    for run in sorted(runs):
        last = result[-1] if result else None
        if (
            last is not None
            and (last.target_file, last.source_file) == (run.target_file, run.source_file)
            and last.target_offset + last.nbytes == run.target_offset
            and last.source_offset + last.nbytes == run.source_offset
        ):
            result[-1] = last._replace(nbytes=last.nbytes + run.nbytes)
        else:
            result.append(run)
    return result


def copy_runs(runs: Iterable[ByteRun], checkpoint: Checkpoint, writer: Writer, moved: Callable[[int], object]) -> None:
    """Copy each run through one buffer of 1 MiB; `moved` hears of the bytes as they go."""
    buffer = memoryview(bytearray(CHUNK))
    for run in runs:
        done = 0
        while done < run.nbytes:
            part = buffer[: min(CHUNK, run.nbytes - done)]
            if writer.has(run.target_file, run.target_offset + done, len(part)):
                writer.skip(len(part))
                moved(len(part))
                done += len(part)
                continue
            checkpoint.read_file_into(run.source_file, run.source_offset + done, part)
            writer.write(run.target_file, run.target_offset + done, part)
            done += len(part)
            moved(len(part))
