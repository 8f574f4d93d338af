"""`watch_load`: a context that surrounds one load, and checks the model when it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..catalog import RecipeLike
from ..errors import Diagnostic, LoadError, Remedy
from ..language.dims import DimValue
from ..modeling.places import named_tensors, require_module
from ..modeling.ties import find_ties
from ..planning.report import Report
from ..storage.places.opening import open as open_checkpoint
from .loaded import Before, CheckOptions, checked, listed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LoadWatch", "watch_load"]

_SAMPLES = 4096
"""Elements of a tensor that are remembered, spread over it: no load leaves all of them as they were by chance."""


def watch_load(
    model: nn.Module | None,
    source: Any,
    recipe: RecipeLike | None = None,
    *,
    keep: str | Sequence[str] = (),
    untied: str | Sequence[str] = (),
    dtype: str = "lossless",
    subtree: str | None = None,
    config: Mapping[str, Any] | None = None,
    dims: Mapping[str, DimValue] | None = None,
    progress: bool | None = None,
) -> LoadWatch:
    """Return a context for one load: on leaving it the model is checked as `check_loaded` does.

    >>> import torch, ckptsurgery as cs
    >>> source = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    >>> model = torch.nn.Linear(2, 1)
    >>> with cs.watch_load(model, source) as watch:
    ...     _ = model.load_state_dict(source)
    >>> watch.report.loaded
    ('weight', 'bias')

    It knows more than a check afterwards: which tensors the load never touched, and which ties it broke. An exception
    inside is passed on, and nothing is checked then.

    Args:
        model: what is loaded into; None where the call makes it: assign it to `watch.model` inside.
        source: and all others: as for `check_loaded`.
    """
    if model is not None:
        require_module(model)
    options = CheckOptions(recipe, listed(keep), listed(untied), dtype, config, dims, progress)
    return LoadWatch(model, source, subtree, options)


class LoadWatch:
    """A watch over one load; `.report` is the account of it afterwards."""

    def __init__(self, model: nn.Module | None, source: Any, subtree: str | None, options: CheckOptions) -> None:
        self.model = model
        self.report: Report | None = None
        self._source, self._subtree, self._options = source, subtree, options
        self._samples: dict[str, bytes] = {}
        self._before = Before()

    def __enter__(self) -> LoadWatch:
        if self.model is not None:
            self._samples = {name: _sample(tensor) for name, tensor in named_tensors(self.model).items()}
            self._before = Before([g for g in find_ties(self.model) if g.kind != "declared"], self._untouched)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        if self.model is None:
            assigned = Remedy("model", "watch.model = …", kind="before")
            raise LoadError(Diagnostic("not-a-model", "no model was given to the watch", remedies=(assigned,)))
        checkpoint = open_checkpoint(self._source, subtree=self._subtree)
        self.report = checked(self.model, checkpoint, self._options, self._before)

    def _untouched(self, key: str) -> bool:
        known = self._samples.get(key)
        return bool(known) and self.model is not None and _sample(named_tensors(self.model)[key]) == known


def _sample(tensor: Tensor) -> bytes:
    """The bits of some elements, spread over the tensor; none where it has no data."""
    import torch

    from ..storage.plain_memory import oddity

    if tensor.is_meta or not tensor.numel() or oddity(tensor) is not None:
        return b""
    flat = tensor.detach().reshape(-1)
    found = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().contiguous().view(torch.uint8)
    return found.numpy().tobytes()
