"""Training and measuring: a few lines, the same for every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from .data import Digits

__all__ = ["accuracy", "one_thread", "seeded", "train"]

Model = TypeVar("Model", bound=nn.Module)


def seeded(build: Callable[[], Model], seed: int) -> Model:
    """Build a model from a seed, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: for a model this small, threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(model: nn.Module, digits: Digits, steps: int, seed: int, rate: float = 2e-3) -> torch.optim.Optimizer:
    """Minimise cross-entropy by AdamW with a one-cycle schedule, in batches of 64 at most; the optimizer afterwards."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(digits), (min(64, len(digits)),), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return optimizer


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of images that the model labels right."""
    model.eval()
    with torch.no_grad():
        return float((model(digits.images).argmax(dim=1) == digits.labels).float().mean())
