"""Models without weights: parameters on the meta device, buffers computed as they should be."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import Diagnostic, LoadError
from ..ops.seeding import seeded_globals
from .assigning import parameter_like
from .places import places

if TYPE_CHECKING:
    from torch import nn

__all__ = ["skeleton"]


def skeleton(factory: Callable[[], nn.Module]) -> nn.Module:
    """Return the model that `factory` builds, with meta parameters, real buffers, and its ties.

    >>> from torch import nn
    >>> model = skeleton(lambda: nn.Sequential(nn.Linear(9999, 9999), nn.BatchNorm1d(2)))
    >>> model[0].weight.device, model[1].running_var
    (device(type='meta'), tensor([1., 1.]))

    Each parameter turns into a meta one as it is registered, so at most one is in memory at a time, and initialisations
    after that cost nothing. Non-persistent buffers, which no checkpoint holds, are real: loading by assignment makes
    the model whole. The global generators stay as they were.

    Raises:
        LoadError: what `factory` returns is no module, or its constructor computes with the values of parameters.
    """
    import torch
    from torch import nn

    state = torch.initial_seed()
    try:
        with seeded_globals(state), _parameters_on_meta():
            model = factory()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
        raise LoadError(_needs_values(f"the constructor computes with values of parameters: {error}")) from error
    if not isinstance(model, nn.Module):
        raise LoadError(
            Diagnostic("not-a-model", f"the factory returned {type(model).__name__}, and a torch.nn.Module is needed")
        )
    _sweep(model)
    computed = [p.name for p in places(model) if p.is_buffer and p.tensor.is_meta]
    if computed:
        raise LoadError(_needs_values(f"buffers are computed from parameters: {', '.join(computed)}"))
    return model


def _needs_values(said: str) -> Diagnostic:
    return Diagnostic(
        "skeleton-needs-values",
        f"a skeleton has no values, and {said}",
        help="build the model as usual, and load into it by copying",
    )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that this thread registers meanwhile is replaced by a meta one, the same for the same object."""
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from torch.nn.parameter import is_lazy

    thread = threading.get_ident()
    # An id names an object only as long as it lives, hence the weak reference beside it.
    made: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def replace(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter is None or parameter.is_meta or is_lazy(parameter):
            return None
        known = made.get(id(parameter))
        if known is not None and known[0]() is parameter:
            return known[1]
        meta = _meta_like(parameter)
        made[id(parameter)] = weakref.ref(parameter), meta
        return meta

    handle = register_module_parameter_registration_hook(replace)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _meta_like(parameter: nn.Parameter) -> nn.Parameter:
    import torch

    return parameter_like(parameter, torch.empty_like(parameter, device="meta"))


def _sweep(model: nn.Module) -> None:
    """Replace parameters that came in without being registered, keeping their ties."""
    from torch.nn.parameter import is_lazy

    real = [p for p in places(model) if not (p.is_buffer or p.tensor.is_meta or is_lazy(p.tensor))]
    metas = {id(p.tensor): _meta_like(p.owner._parameters[p.leaf]) for p in real}  # type: ignore[arg-type]
    for place, meta in [(p, metas[id(p.tensor)]) for p in real]:
        place.put(meta)
