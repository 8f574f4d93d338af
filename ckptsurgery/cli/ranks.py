"""A command that `torchrun` started several times: its processes share the work, and the first one speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from ..errors import CkptSurgeryError

if TYPE_CHECKING:
    from ..sharding.peers import Peers

__all__ = ["among_ranks"]

_SET = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # by torchrun


@contextmanager
def among_ranks() -> Iterator[Peers | None]:
    """Join the processes that `torchrun` started; None where there is one. An error is the same in all of them."""
    if not os.environ.keys() >= _SET or os.environ["WORLD_SIZE"] == "1":
        yield None
        return
    import torch.distributed as dist

    from ..sharding.peers import peers

    dist.init_process_group("gloo")
    ranks = peers()
    try:
        yield ranks
    except CkptSurgeryError as error:
        if ranks is None or not ranks.rank:
            raise _agreed(ranks, error) from None
        _agreed(ranks, error)
        raise typer.Exit(1) from None
    finally:
        dist.destroy_process_group()


def _agreed(ranks: Peers | None, error: CkptSurgeryError) -> CkptSurgeryError:
    """The error that all ranks raise."""
    try:
        if ranks is not None:
            ranks.fail(error)
    except CkptSurgeryError as agreed:
        return agreed
    return error
