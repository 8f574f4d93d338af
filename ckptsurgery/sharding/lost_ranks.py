"""Ranks that are lost: which they are, agreed on by the others, none of which waits for the timeout.

A rank that is killed ends its connections, which only the ranks that wait for it see. Each of them reports to the store
of the process group and ends its own connections, so that a rank that waits for this one fails as well. Whoever has not
reported soon afterwards is lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from ..errors import CheckpointError, Diagnostic
from ..wording import listed

__all__ = ["left", "waiting_for_ranks"]

_PATIENCE = 1.0  # seconds in which each rank that is alive and waits for another one reports
_MOMENT = 0.005  # seconds between two looks at the store
_KEY = "ckptsurgery/lost/"
_UNKNOWN = "a rank is gone, or did not answer in time"
_HELPS = {
    "rank-lost": "look at the last messages of that rank, and for a process that the system killed for its memory",
    "rank-failed": "look at the traceback of this rank",
}


@contextmanager
def waiting_for_ranks(rank: int, size: int) -> Iterator[None]:
    """Surround a wait for other ranks.

    The process group is of no use after an error: its connections are closed.

    Args:
        rank: of this process. size: how many there are.

    Raises:
        CheckpointError: a rank is gone, or did not answer in time; the same text on all ranks that are left.
    """
    try:
        yield
    except RuntimeError as error:  # how every backend reports a connection that ended, or a wait that was too long
        raise _agreed(rank, size) from error


def left(rank: int, size: int, text: str) -> CheckpointError:
    """Leave the other ranks in the middle of an exchange, and return the error that all of them raise.

    Args:
        text: why.
    """
    import torch.distributed as dist

    try:
        group: Any = dist.group.WORLD
        told = _first(group.get_group_store(), "rank-failed", text)
        _disconnect(rank, size)
        return told
    except (RuntimeError, ValueError):  # the store went with the rank that kept it
        return _error("rank-failed", text)


def _agreed(rank: int, size: int) -> CheckpointError:
    """The error of all ranks that are left."""
    import torch.distributed as dist

    try:
        group: Any = dist.group.WORLD
        store = group.get_group_store()
        store.set(f"{_KEY}{rank}", "reported")
        _disconnect(rank, size)
        end = time.monotonic() + _PATIENCE
        while not store.check([_KEY + "said"]):
            lost = [str(other) for other in range(size) if not store.check([f"{_KEY}{other}"])]
            if not lost:
                break
            if size == 2 or time.monotonic() > end:
                which = f"rank {lost[0]} is" if len(lost) == 1 else f"ranks {listed(lost, 8)} are"
                return _first(store, "rank-lost", f"{which} gone, or did not answer in time")
            time.sleep(_MOMENT)
        return _first(store, "rank-lost", _UNKNOWN)
    except (RuntimeError, ValueError):
        return _error("rank-lost", _UNKNOWN)


def _first(store: Any, code: str, text: str) -> CheckpointError:
    """The error of the rank that was the first to have one."""
    found: bytes = store.compare_set(_KEY + "said", "", f"{code} {text}")
    first, _, said = found.decode().partition(" ")
    return _error(first, said)


def _error(code: str, text: str) -> CheckpointError:
    return CheckpointError(Diagnostic(code, text, help=_HELPS.get(code)))


def _disconnect(rank: int, size: int) -> None:
    """End the connections to all ranks.

    With gloo, a wait that takes too long ends all connections of a rank, where one to a rank that is gone does not.
    """
    import torch
    import torch.distributed as dist

    if "gloo" not in str(dist.get_backend()):
        return
    for other in range(size):
        if other != rank:
            with suppress(RuntimeError, ValueError):
                work = dist.irecv(torch.empty(1), other)
                if work is not None:
                    work.wait(timedelta(milliseconds=1))
