"""Seeds by key: the same seed and key give the same stream, whatever else is drawn, in whatever order."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["generator_for", "key_seed", "seeded_globals"]


def key_seed(seed: int, key: str) -> int:
    """Return the seed of one key: 63 bits of blake2b over the seed and the key.

    >>> key_seed(0, "head.weight") == key_seed(0, "head.weight"), key_seed(0, "head.weight") == key_seed(0, "head.bias")
    (True, False)
    """
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(seed: int, key: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` whose stream depends on `seed` and `key` alone.

    >>> import torch
    >>> torch.equal(torch.rand(2, generator=generator_for(0, "a")), torch.rand(2, generator=generator_for(0, "a")))
    True
    """
    import torch

    return torch.Generator(device=device).manual_seed(key_seed(seed, key))


@contextmanager
def seeded_globals(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it, the global generators start at `seed`; after it they are as they were before.

    These are torch's, Python's, and numpy's where it is imported. Code that cannot be handed a generator, such as a
    model's own initialisation, runs under it. `device` names an accelerator to be seeded beside the CPU.

    >>> import torch
    >>> before = torch.get_rng_state()
    >>> with seeded_globals(7):
    ...     first = torch.rand(3)
    >>> with seeded_globals(7):
    ...     again = torch.rand(3)
    >>> torch.equal(first, again), torch.equal(before, torch.get_rng_state())
    (True, True)
    """
    import torch

    numpy = sys.modules.get("numpy")
    generators = [torch.default_generator, *_accelerator_generators(torch.device(device))]
    states = [generator.get_state() for generator in generators]
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        for generator in generators:
            generator.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        yield
    finally:
        for generator, state in zip(generators, states):
            generator.set_state(state)
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _accelerator_generators(device: torch.device) -> list[torch.Generator]:
    """The global generator that draws on `device` go by, where it is not the CPU's."""
    import torch

    if device.type in ("cpu", "meta"):
        return []
    backend = torch.get_device_module(device)
    if device.type == "mps":
        return [backend._get_default_mps_generator()]
    backend.init()
    return [backend.default_generators[backend.current_device() if device.index is None else device.index]]
