"""Writing one output on several ranks.

The first rank creates the files under temporary names. All ranks write into them and wait for the disk, and agree that
none of them failed; then the first rank gives the files their names. A rank that fails makes all of them fail with its
error, and what was written is removed. A rank that is killed ends the connections of the others, which fail as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from ..planning.steps import Step
from ..sharding.peers import Peers
from ..storage.output.following import Follower, Outline
from ..storage.output.staging import Writer

__all__ = ["share_of", "write_together"]


def write_together(
    make: Callable[[], Writer],
    ranks: Peers,
    work: Callable[[Writer], int],
    check: Callable[[Writer], None] = lambda writer: None,
) -> tuple[tuple[str, ...], int]:
    """Write files on all ranks; return their names, and the bytes that all ranks wrote.

    Args:
        make: makes the writer; called on the first rank.
        work: writes this rank's part, and returns how many bytes it was; called on every rank.
        check: called with the writer on the first rank, when all is written and nothing has its name yet.
    """

    begun: list[Writer] = []

    def begin() -> None:
        writer = make()
        writer.__enter__()
        begun.append(writer)

    done = False
    try:
        ranks.told(0, begin)
        writer = begun[0] if begun else None
        outline = ranks.gathered(None if writer is None else Outline.of(writer))[0]
        nbytes = ranks.tried(lambda: _worked(writer, outline, work))
        total = sum(ranks.gathered(nbytes))
        files = ranks.told(0, lambda: _committed(writer, total - nbytes, check))
        done = True
        return ranks.gathered(files)[0], total
    finally:
        for writer in () if done else begun:  # also where another rank was lost while the first one began
            writer.abort()


def _worked(writer: Writer | None, outline: Outline, work: Callable[[Writer], int]) -> int:
    if writer is not None:
        return work(writer)
    with Follower(outline) as follower:
        return work(follower)


def _committed(writer: Writer | None, others: int, check: Callable[[Writer], None]) -> tuple[str, ...]:
    if writer is None:
        return ()
    writer.skip(others)
    check(writer)
    writer.commit()
    return tuple(writer.files)


def share_of(steps: Sequence[Step], ranks: Peers) -> Sequence[Step]:
    """The steps that are this rank's part of the work: neighbours in the output, with as many bytes as the others have.

    A step is not divided, so the parts are as equal as the largest steps allow.
    """
    sizes = [sum(spec.nbytes for spec in (*step.program.inputs, *step.program.outputs)) for step in steps]
    total = max(1, sum(sizes))
    middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes))
    return [
        step
        for step, middle in zip(steps, middles)
        if min(ranks.size - 1, int(middle / total * ranks.size)) == ranks.rank
    ]
