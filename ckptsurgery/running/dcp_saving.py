"""Saving in the format of `torch.distributed.checkpoint`: a plan from one process, shards from all ranks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CkptSurgeryError, Diagnostic
from ..planning.plan import Plan
from ..planning.sharing import output_aliases
from ..sharding.peers import Peers
from ..storage.checkpoint import Checkpoint
from ..storage.output.dcp_writer import DcpWriter, refuse_existing
from ..storage.output.durability import Durability
from ..storage.output.staging import beside
from .executor.programs import Loads, run_step

__all__ = ["save_shards_as_dcp", "write_dcp"]


def write_dcp(
    plan: Plan, checkpoint: Checkpoint, path: Path, ranks: int, sync: bool, moved: Callable[[int], object]
) -> tuple[tuple[str, ...], int]:
    """Write what a plan makes, cut as `ranks` ranks hold it; return the files and the bytes.

    Tied names are written one by one, since torch's loader asks for each of them.
    """
    aliases = output_aliases(plan, checkpoint)
    names: dict[str, list[str]] = {}
    for alias, kept in aliases.items():
        names.setdefault(kept, []).append(alias)
    loads = Loads(checkpoint.load, plan.steps)
    with DcpWriter(path, ranks, Durability(sync)) as writer:
        for step in plan.steps:
            for key, tensor in zip(step.targets, run_step(step, loads)):
                before = writer.nbytes
                for name in () if key in aliases else (key, *names.get(key, ())):
                    writer.add(name, tensor)
                moved(writer.nbytes - before)
            loads.done(step)
        checkpoint.check_unchanged()
    return writer.files, writer.nbytes


def save_shards_as_dcp(state: Any, path: str | os.PathLike[str], ranks: Peers) -> tuple[str, ...]:
    """Write what the ranks hold together, each its own file, by torch's own writer; return the files.

    The folder has a hidden name until all ranks are done, and takes its own then.

    Raises:
        CheckpointError: the same on all ranks.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    final = Path(path).expanduser()
    ranks.told(0, lambda: refuse_existing(final))
    folder: Path = ranks.gathered(beside(final))[0]
    done = False
    try:
        ranks.tried(lambda: _tried(lambda: save(state, checkpoint_id=folder), final))
        ranks.told(0, lambda: _named(folder, final))
        done = True
    finally:
        if not done:  # on each rank: one that fails later than the first may have made the folder anew
            shutil.rmtree(folder, ignore_errors=True)
    return tuple(sorted(str(file) for file in final.iterdir()))


def _tried(work: Callable[[], object], path: Path) -> None:
    """Do torch's work; whatever it raises is an error of the output."""
    from torch.distributed.checkpoint.api import CheckpointException  # not an Exception, and the same on all ranks

    try:
        work()
    except CkptSurgeryError:
        raise
    except (Exception, CheckpointException) as error:
        failures = error.failures if isinstance(error, CheckpointException) else {}
        reason = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in failures.items()) or error
        text = f"torch cannot write {str(path)!r}: {reason}"
        raise CheckpointError(Diagnostic("write-failed", text, str(path), help="look at what the ranks say")) from error


def _named(folder: Path, final: Path) -> None:
    refuse_existing(final)
    folder.rename(final)
    Durability(True).keep_names(final.parent)
