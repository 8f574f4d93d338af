"""What a tensor holds in the place of what it should: found out from the data, for those tensors that are wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import LoadError
from ..modeling.defaults import DefaultInitialisation as OwnInit
from ..planning.steps import Step
from ..running.executor.programs import run_step
from ..specs import DTYPES, dtype_name
from ..storage.checkpoint import Checkpoint
from .expecting import Expectation
from .faults import Fault

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Causes"]

_SAMPLE = 1024
"""Bytes at the start of a tensor by which others like it are looked up, before they are compared as a whole."""

_MOST_DRAWN = 1 << 24
"""Elements of a tensor beyond which its own initialisation is not drawn to compare with."""

_DRAWS = 16
"""How many tensors are drawn: a model that was not loaded at all has thousands that are all alike."""

_NARROWER = ("BF16", "F16", "F8_E4M3", "F8_E5M2")


@dataclass
class Causes:
    """Finds out what wrong tensors of one model hold.

    Args:
        untouched: whether a tensor is known to be as it was before the load.
    """

    model: nn.Module
    checkpoint: Checkpoint
    expected: Expectation
    untouched: Callable[[str], bool] = lambda key: False
    _drawn: int = 0
    _as_built: dict[int, tuple[str, str]] = field(default_factory=dict)
    _samples: dict[tuple[object, ...], dict[bytes, list[str]]] = field(default_factory=dict)

    def of(self, key: str, actual: Tensor) -> Fault:
        """Return the fault of a tensor whose bytes differ from what the plan makes."""
        step = self._steps[key]
        kind, text = self._as_built.get(id(actual), ("", ""))  # another name of this very tensor
        if not kind:
            kind, text = self._cause(key, actual.detach().cpu().contiguous(), self._made(step, key))
            if kind == "left-as-built":
                self._as_built[id(actual)] = kind, text
        return Fault(key, kind, text, self.expected.target.specs[key], step.sources)

    @cached_property
    def _steps(self) -> Mapping[str, Step]:
        return {key: step for step in self.expected.plan.steps for key in step.targets}

    def _made(self, step: Step, key: str) -> Tensor:
        made = run_step(step, self.checkpoint.load)[step.targets.index(key)]
        return made.detach().cpu().contiguous()

    def _cause(self, key: str, actual: Tensor, wanted: Tensor) -> tuple[str, str]:
        if self.untouched(key):
            return "left-as-built", "unchanged since before the load"
        if not _varies(actual) and _varies(wanted):
            return "left-as-built", f"all {actual.flatten()[0].item():g}"
        other = self._another(key, actual)
        if other is not None:
            return "holds-another", f"of {other!r}"
        for find in (_rounded, _rearranged, _partly, _scaled):
            found = find(actual, wanted)
            if found is not None:
                return found
        drawn = self._as_drawn(key, actual)
        return drawn or ("other-values", _difference(actual, wanted))

    def _another(self, key: str, actual: Tensor) -> str | None:
        """The key of another tensor whose values it holds: of those made for the model, and of the source's own."""
        if not actual.numel() or not _varies(actual):
            return None
        place = (tuple(actual.shape), dtype_name(actual.dtype))
        if place not in self._samples:
            found: dict[bytes, list[str]] = {}
            for name, tensor in self._alike(*place):
                found.setdefault(_digest(tensor), []).append(name)
            self._samples[place] = found
        for name in self._samples[place].get(_digest(actual), ()):
            if name != key and _same(actual, self._named(name)):
                return name.removeprefix("source:")
        return None

    def _alike(self, shape: tuple[int, ...], dtype: str) -> Iterator[tuple[str, Tensor]]:
        for step in self.expected.plan.steps:
            for key, spec in zip(step.targets, step.program.outputs):
                if spec.shape == shape and spec.dtype == dtype:
                    yield key, self._made(step, key)
        for key in self.expected.unused:
            spec = self.checkpoint.specs[key]
            if spec.shape == shape and spec.dtype == dtype:
                yield f"source:{key}", self.checkpoint.load(key)

    def _named(self, name: str) -> Tensor:
        if name.startswith("source:"):
            return self.checkpoint.load(name.removeprefix("source:"))
        return self._made(self._steps[name], name)

    def _as_drawn(self, key: str, actual: Tensor) -> tuple[str, str] | None:
        """Whether its mean and spread are those that the model's own initialisation gives."""
        if self._drawn >= _DRAWS or actual.numel() > _MOST_DRAWN or actual.numel() < 8:
            return None
        if not actual.is_floating_point():
            return None
        self._drawn += 1
        try:
            with OwnInit(self.model) as stage:
                drawn, by = stage.draw(key, 0)
        except LoadError:
            return None
        a, b = actual.float(), drawn.float().cpu()
        spread = float(b.std())
        slack = 6 * spread / actual.numel() ** 0.5
        alike = abs(float(a.mean() - b.mean())) <= 2 * slack and abs(float(a.std()) - spread) <= slack
        return ("left-as-built", f"as {by} draws it") if alike else None


def _varies(tensor: Tensor) -> bool:
    return bool(tensor.numel()) and bool((tensor != tensor.flatten()[0]).any())


def _digest(tensor: Tensor) -> bytes:
    from ..storage.tensors import dense_bytes

    return hashlib.blake2b(dense_bytes(tensor, "a tensor")[:_SAMPLE], digest_size=16).digest()


def _same(a: Tensor, b: Tensor) -> bool:
    from ..modeling.ties import equal_bytes

    return a.shape == b.shape and a.dtype == b.dtype and equal_bytes(a.contiguous(), b.contiguous())


def _rounded(actual: Tensor, wanted: Tensor) -> tuple[str, str] | None:
    import torch

    if not wanted.is_floating_point():
        return None
    for name in _NARROWER:
        narrow = getattr(torch, DTYPES[name].torch or "", None)
        if narrow is None or narrow.itemsize >= wanted.dtype.itemsize:
            continue
        if _same(wanted.to(narrow).to(wanted.dtype), actual):
            return "rounded", f"rounded to {name}"
    return None


def _rearranged(actual: Tensor, wanted: Tensor) -> tuple[str, str] | None:
    if actual.dim() == 2 and actual.shape[0] == actual.shape[1] and _same(actual, wanted.T):
        return "rearranged", "transposed"
    if actual.dim() < 1 or not actual.numel():
        return None
    if actual.dim() > 1 or actual.numel() < 1 << 20:
        rows, others = (sorted(map(_digest_row, t.reshape(t.shape[0], -1))) for t in (actual, wanted))
        if rows == others and len(set(rows)) > 1:
            return "rearranged", "the same rows in another order"
    if _sorted_equal(actual, wanted):
        return "rearranged", "the same elements in another order"
    return None


def _digest_row(row: Tensor) -> bytes:
    from ..storage.tensors import dense_bytes

    return hashlib.blake2b(dense_bytes(row, "a row"), digest_size=8).digest()


def _sorted_equal(actual: Tensor, wanted: Tensor) -> bool:
    if actual.numel() > _MOST_DRAWN or not actual.is_floating_point() or not _varies(actual):
        return False
    return bool((actual.float().flatten().sort().values == wanted.float().flatten().sort().values).all())


def _partly(actual: Tensor, wanted: Tensor) -> tuple[str, str] | None:
    """Whether whole rows, columns or slices of it are right, and others are not."""
    same = actual == wanted
    for dim, size in enumerate(actual.shape):
        right = same.movedim(dim, 0).reshape(size, -1).all(1)
        count = int(right.sum())
        if size > 1 and count:
            what = "rows" if dim == 0 else "columns" if dim == actual.dim() - 1 else f"slices of dimension {dim}"
            return "partly-loaded", f"{count} of {size} {what} are right"
    return None


def _scaled(actual: Tensor, wanted: Tensor) -> tuple[str, str] | None:
    """Whether it is its source times one number, such as codes without their scale or a merged factor."""
    if not (actual.is_floating_point() and wanted.is_floating_point()) or actual.numel() < 8:
        return None
    a, b = actual.double().flatten(), wanted.double().flatten()
    at = int(b.abs().argmax())
    if not b[at] or not b.isfinite().all() or not a.isfinite().all():
        return None
    factor = a[at] / b[at]
    if not factor or bool((a - factor * b).abs().max() > 1e-2 * a.abs().max()):
        return None
    return None if abs(float(factor) - 1) < 0.02 else ("other-values", f"its source times {float(factor):.6g}")


def _difference(actual: Tensor, wanted: Tensor) -> str:
    differ = actual != wanted
    share = float(differ.float().mean()) if actual.numel() else 0.0
    if not actual.is_floating_point():
        return f"{share:.1%} of its elements differ"
    most = float((actual.double() - wanted.double()).abs().max())
    return f"{share:.1%} of its elements differ, by {most:.3g} at most"
