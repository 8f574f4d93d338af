"""Ops that ask where they run: `run(self, tensors, at)` gets the key and the seed, so that draws are reproducible."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from ..specs import TensorSpec
from .base import AxisPlace, BlockFacts, Op, OpError, Specs, Tensors
from .initialisers import Initialiser
from .seeding import generator_for, key_seed

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["At", "Draw", "Seeded", "asks_at", "run_at"]


@dataclass(frozen=True, slots=True)
class At:
    """Where an op runs.

    >>> At("layers.0.w", 7).uniform(4)[2:].tolist() == At("layers.0.w", 7, start=2).uniform(2).tolist()
    True

    Args:
        key: the key that is made; the source's key for an op before a rearrangement.
        seed: the plan's seed.
        start: the number of the first element, where the op gets a block of a tensor.
    """

    key: str
    seed: int = 0
    start: int = 0

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for the whole tensor; an op that draws from it is not elementwise."""
        return generator_for(self.seed, self.key, device)

    def uniform(self, count: int, stream: str = "") -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Numbers in [0, 1) for elements `start` to `start + count - 1`; the same however a tensor is cut into blocks.

        They come from Philox, whose n-th number needs no others.

        Args:
            stream: names one of several independent rows of numbers for the same key.
        """
        import numpy as np

        # One step of Philox gives four numbers.
        steps, over = divmod(self.start, 4)
        key = key_seed(self.seed, f"{self.key}\0{stream}" if stream else self.key)
        numbers = np.random.Generator(np.random.Philox(key=key).advance(steps))
        return numbers.random(over + count)[over:]


def asks_at(op: Op) -> bool:
    """Whether an op's `run` takes `at`."""
    return _asks(type(op).run) if not isinstance(op, Seeded) else True


@cache
def _asks(run: object) -> bool:
    return "at" in inspect.signature(run).parameters  # type: ignore[arg-type]


def run_at(op: Op, tensors: Tensors, at: At) -> Tensors:
    """Run an op, with `at` where it asks for it."""
    return op.run(tensors, at) if asks_at(op) else op.run(tensors)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Seeded(Op):
    """An op that asks where it runs, with the seed of a plan."""

    op: Op
    seed: int = 0

    @property
    def joins(self) -> bool:  # type: ignore[override]
        return self.op.joins

    @property
    def axis_role(self) -> str | None:  # type: ignore[override]
        return self.op.axis_role

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        return self.op.elementwise

    def infer(self, specs: Specs) -> Specs:
        return self.op.infer(specs)

    def run(self, tensors: Tensors, at: At | None = None) -> Tensors:
        return run_at(self.op, tensors, replace(at or At(""), seed=self.seed))

    def surveys(self, specs: Specs) -> int:
        return self.op.surveys(specs)

    def survey(self, tensors: Tensors) -> BlockFacts:
        return self.op.survey(tensors)

    def after(self, facts: BlockFacts) -> Op:
        return Seeded(self.op.after(facts), self.seed)

    def inverse(self, inputs: Specs | None = None) -> Op | None:
        return self.op.inverse(inputs)

    def on_moments(self) -> Op | None:
        return self.op.on_moments()

    def placed(self, place: AxisPlace) -> Op:
        return Seeded(self.op.placed(place), self.seed)

    def __str__(self) -> str:
        return str(self.op)


@dataclass(frozen=True)
class Draw(Op):
    """Make a tensor of an initialiser; it takes no sources.

    >>> draw = Draw(Initialiser.of("normal", (), {"std": 0.02}), TensorSpec([2, 3], "BF16"))
    >>> draw.infer(()), str(draw)
    ((TensorSpec(shape=(2, 3), dtype='BF16'),), 'normal(std=0.02)')

    The numbers are those that the initialiser draws into a model's parameter of this name, with the same seed.
    """

    joins = True
    initialiser: Initialiser
    spec: TensorSpec

    def infer(self, specs: Specs) -> Specs:
        if specs:
            raise OpError(f"{self} takes no sources")
        self.initialiser.check(self.spec)
        return (self.spec,)

    def run(self, tensors: Tensors, at: At | None = None) -> Tensors:
        import torch

        from .numerics import torch_dtype

        made = torch.empty(self.spec.shape, dtype=torch_dtype(self.spec.dtype))
        where = at or At("")
        return (self.initialiser.apply(made, generator_for(where.seed, where.key)),)

    def __str__(self) -> str:
        return str(self.initialiser)
