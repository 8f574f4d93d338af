"""Ops that merge models by the magnitudes of their deltas: `ties`, `breadcrumbs`, `della`.

As in `blending`, sources are the same tensor of several models, computed with in float32 and rounded once. All but
`della` find their thresholds block by block first, and hold no tensor whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import BlockFacts, OpError, Tensors
from .blending import Blending, elected, onto, summed, uniform_like, weights_of
from .keyed import At
from .over_axes import Integers
from .registry import op
from .surveying import DIGIT, Surveying, begins, tally

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Breadcrumbs", "Della", "Ties"]


@op
@dataclass(frozen=True)
class Ties(Surveying):
    """Trim the deltas of tuned models, elect signs, and merge what agrees; sources: base, then tuned.

    Of each delta the `density` · n elements of largest magnitude are kept. The sign of an element is that of the
    weighted sum of the deltas. base + scale · Σ w[k] · delta[k] / Σ w[k], over the deltas of that sign (Yadav et al.,
    "TIES-Merging", 2023).

    >>> str(Ties(0.2))
    'ties(density=0.2)'

    Args:
        density: the share of elements that is kept, from 0 to 1.
        scale, w, integers: as for `task_arithmetic`.
        normalise: divide by the weights that agree; else the sum alone.

    The threshold takes two passes over the tensors of its own, and elements equal to it are all kept. Computed in
    float32 (float64 for float64) and rounded once. There is no inverse.

    Raises:
        OpError: as for `task_arithmetic`; a density outside of its range.
    """

    name = "ties"
    density: float
    scale: float = 1.0
    w: tuple[float, ...] | None = None
    normalise: bool = True
    integers: Integers = "error"

    def __post_init__(self) -> None:
        _share(self.name, "density", self.density)

    def check(self, count: int) -> None:
        weights_of(self, self.w, count - 1)

    def passes(self, itemsize: int) -> int:
        return 8 * itemsize // DIGIT if 0 < self.density < 1 else 0

    def facts(self, tensors: Tensors, known: Sequence[Any]) -> BlockFacts:
        return _tallies(tensors, known, 1)

    def finding(self, facts: Any, known: Sequence[Any]) -> Any:
        return _begun(facts, known, lambda count: (count - max(1, int(self.density * count)),))

    def mixed(self, tensors: Tensors, at: At, known: Sequence[Any]) -> Tensor:
        base, *tuned = tensors
        deltas = [tensor.sub_(base) for tensor in tuned]
        if known:
            least = _magnitudes(known, base)
            deltas = [delta.mul_(delta.abs() >= size) for delta, size in zip(deltas, least)]
        scale = self.scale if self.density else 0.0
        return onto(base, scale, elected(deltas, weights_of(self, self.w, len(tuned)), self.normalise))


@op
@dataclass(frozen=True)
class Breadcrumbs(Surveying):
    """Leave out the largest and the smallest elements of the deltas; sources: base, then tuned.

    base + scale · Σ w[k] · mask[k] · (tuned[k] - base). The mask drops the `gamma` · n elements of largest magnitude,
    and of the others the smallest, until `density` · n are left (Davari and Belilovsky, "Model Breadcrumbs", 2024).

    >>> str(Breadcrumbs(0.9))
    'breadcrumbs(density=0.9)'

    Args:
        density, gamma: shares of the elements, from 0 to 1.
        scale, w, integers: as for `task_arithmetic`. elect: as for `dare`.

    The thresholds take two passes over the tensors of their own. Computed in float32 (float64 for float64) and rounded
    once. There is no inverse.

    Raises:
        OpError: as for `ties`.
    """

    name = "breadcrumbs"
    density: float
    gamma: float = 0.01
    scale: float = 1.0
    w: tuple[float, ...] | None = None
    elect: bool = False
    integers: Integers = "error"

    def __post_init__(self) -> None:
        _share(self.name, "density", self.density)
        _share(self.name, "gamma", self.gamma)

    def check(self, count: int) -> None:
        weights_of(self, self.w, count - 1)

    def passes(self, itemsize: int) -> int:
        return 8 * itemsize // DIGIT if self.density < 1 else 0

    def facts(self, tensors: Tensors, known: Sequence[Any]) -> BlockFacts:
        return _tallies(tensors, known, 2)

    def finding(self, facts: Any, known: Sequence[Any]) -> Any:
        return _begun(facts, known, self._ranks)

    def _ranks(self, count: int) -> tuple[int, int]:
        """The ranks of the smallest and of the largest magnitude that is kept; none is where the first is larger."""
        kept, top = int(self.density * count), int(self.gamma * count)
        low = max(0, count - kept - top)
        return (low, min(low + kept, count) - 1) if kept else (count - 1, -1)

    def mixed(self, tensors: Tensors, at: At, known: Sequence[Any]) -> Tensor:
        base, *tuned = tensors
        deltas = [tensor.sub_(base) for tensor in tuned]
        if known:
            ends = _magnitudes(known, base)
            for delta, least, most in zip(deltas, ends[::2], ends[1::2]):
                size = delta.abs()
                delta.mul_((size >= least) & (size <= most))
        weights = weights_of(self, self.w, len(tuned))
        return onto(base, self.scale, elected(deltas, weights) if self.elect else summed(deltas, weights))


@op
@dataclass(frozen=True)
class Della(Blending):
    """Drop elements of the deltas at random, small ones more often, and rescale the others; sources: base, then tuned.

    In each row the elements are ranked by magnitude. The probability to keep one rises from density - epsilon for the
    smallest to density + epsilon for the largest, and what is kept is divided by it (Deep et al., "DELLA-Merging",
    2024). Then signs are elected and the deltas merged as in `ties`.

    >>> str(Della(0.4, 0.1))
    'della(density=0.4, epsilon=0.1)'

    Args:
        density, epsilon: with 0 < density - epsilon and density + epsilon < 1.
        scale, w, integers: as for `task_arithmetic`. elect: as for `dare`.

    The ranks need whole tensors; the draws are reproducible as those of `dare`. Computed in float32 (float64 for
    float64) and rounded once. There is no inverse.

    Raises:
        OpError: as for `ties`.
    """

    name = "della"
    density: float
    epsilon: float = 0.15
    scale: float = 1.0
    w: tuple[float, ...] | None = None
    elect: bool = True
    integers: Integers = "error"

    def __post_init__(self) -> None:
        if not (self.density - self.epsilon > 0 and self.density + self.epsilon < 1):
            raise OpError(f"della: density ± epsilon lies within 0 to 1, and {self.density} ± {self.epsilon} does not")

    def check(self, count: int) -> None:
        weights_of(self, self.w, count - 1)

    def run(self, tensors: Tensors, at: At | None = None) -> Tensors:
        return self.blended(tensors, at or At(""))

    def blend(self, tensors: Tensors, at: At) -> Tensor:
        base, *tuned = tensors
        deltas = [self._dropped(tensor - base, at, n) for n, tensor in enumerate(tuned)]
        weights = weights_of(self, self.w, len(tuned))
        return onto(base, self.scale, elected(deltas, weights) if self.elect else summed(deltas, weights))

    def _dropped(self, delta: Tensor, at: At, number: int) -> Tensor:
        rows = delta.reshape(-1, delta.shape[-1]) if delta.dim() > 1 else delta.reshape(1, -1)
        ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(delta.dtype) / max(1, rows.shape[1] - 1)
        keep = (self.density - self.epsilon + 2 * self.epsilon * ranks).reshape(delta.shape)
        return delta * (uniform_like(delta, at, number) < keep) / keep


def _share(name: str, what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise OpError(f"{name}: {what} is from 0 to 1, not {value}")


def _tallies(tensors: Tensors, known: Sequence[Any], ranks: int) -> Tensor:
    """The next digits of the magnitudes of each delta, counted for each of so many ranks."""
    import torch

    base, *tuned = tensors
    begun = known[-1] if known else ((0, 0),) * (ranks * len(tuned))
    sizes = [(tensor - base).abs_() for tensor in tuned]
    if not known:
        return torch.stack([tally(size, 0, 0) for size in sizes]).repeat_interleave(ranks, 0)
    return torch.stack([tally(sizes[n // ranks], begin, len(known)) for n, (begin, _) in enumerate(begun)])


def _begun(counts: Tensor, known: Sequence[Any], ranks: Callable[[int], Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """The leading digits of the magnitudes of some ranks, one digit more than is known, and what is left of the ranks.

    Args:
        ranks: those that are looked for among so many elements.
    """
    if known:
        return tuple(begins(row, rank, begin) for row, (begin, rank) in zip(counts, known[-1]))
    wanted = ranks(int(counts[0].sum()))
    return tuple(begins(row, wanted[n % len(wanted)]) for n, row in enumerate(counts))


def _magnitudes(known: Sequence[Any], like: Tensor) -> Sequence[float]:
    """The magnitudes whose digits are all known."""
    import torch

    digits = [begin for begin, _ in known[-1]]
    whole = torch.tensor(digits, dtype=torch.int32 if like.element_size() == 4 else torch.int64)
    found: list[float] = whole.view(like.dtype).tolist()
    return found
