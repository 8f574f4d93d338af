"""A model as a load sees it: a sharded one by its plain twin, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from ..errors import Diagnostic, LoadError
from ..modeling.saved_names import own_loaders
from ..planning.report import Report
from ..running.model_loading import load_plan
from ..running.sharded_loading import load_shards
from ..sharding.flat_parameters import has_flat_parameters, whole_parameters
from ..sharding.peers import Peers, peers
from ..sharding.pipeline_stages import united
from ..sharding.shards import has_shards
from ..sharding.twins import twin_of
from ..wording import counted

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Carry", "seen_plainly"]

Carry = Callable[..., Report]
"""Carries a plan out on a model, as `load_plan` does."""


@contextmanager
def seen_plainly(model: nn.Module, stages: bool) -> Iterator[tuple[nn.Module, Carry]]:
    """Give the model that decides on a load, and what carries a plan out; any error is raised on all ranks.

    Args:
        stages: whether the ranks' models are parts of one, which decides on the load.

    Raises:
        LoadError: a sharded model, or a stage, without a process group.
    """
    flat = has_flat_parameters(model)
    if not (flat or stages or has_shards(model)):
        yield model, load_plan
        return
    ranks = peers()
    if ranks is None:
        what = "the model is a stage of a pipeline" if stages else "the model is sharded"
        text = f"{what}, and there is no process group to load it with"
        raise LoadError(Diagnostic("no-process-group", text, help="torch.distributed.init_process_group() first"))
    try:
        with whole_parameters(model) if flat else nullcontext():
            twin = twin_of(model)
            if stages:
                ranks.agree(None, "stages")
                _refuse_own_loaders(twin.module, ranks)
                twin = united(twin, ranks)
            yield twin.module, partial(load_shards, twin=twin, ranks=ranks)
    except Exception as error:
        ranks.fail(error)
        raise


def _refuse_own_loaders(stage: nn.Module, ranks: Peers) -> None:
    """Check that no stage has modules with loading of their own, into which the other ranks cannot look."""
    found = [path or "the stage itself" for paths in ranks.shared(own_loaders(stage)) for path in paths]
    if found:
        text = f"{counted(len(found), 'module')} of a stage would load in their own way: {found[0]!r}"
        help = "load such a stage by itself on its ranks: load_into(stage, source, partial=True)"
        raise LoadError(Diagnostic("stages-load-alone", text, notes=tuple(found[1:12]), help=help))
