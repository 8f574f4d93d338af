"""A network in two codebases, and the pairs that are made of it by its converter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

Numbers = dict[str, Tensor]
_ABSENT = -1.0


@dataclass(frozen=True)
class Network:
    """One network in two codebases.

    Args:
        source: the shape of each source tensor.
        convert: the library's own converter.
    """

    source: Mapping[str, tuple[int, ...]]
    convert: Callable[[Numbers], Numbers]


@dataclass(frozen=True)
class Pair:
    """What inference is given, and the truth."""

    name: str
    family: str
    kind: str
    source: Mapping[str, tuple[int, ...]]
    made: Numbers = field(repr=False)

    def to_json(self) -> dict[str, object]:
        """All of it as plain data."""
        return {
            "name": self.name,
            "family": self.family,
            "kind": self.kind,
            "source": [[k, list(s)] for k, s in self.source.items()],
            "target": [[k, list(t.shape)] for k, t in self.made.items()],
            "expected": {k: digest(t) for k, t in self.made.items() if present(t)},
        }


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's numbers, in C order."""
    numbers = tensor.detach().to(torch.float64).contiguous().numpy().astype("<i8")
    return hashlib.blake2b(numbers.tobytes(), digest_size=6).hexdigest()


def present(tensor: Tensor) -> bool:
    """Whether a target tensor consists of source elements only, each once."""
    flat = tensor.detach().reshape(-1).to(torch.float64)
    return bool((flat >= 0).all() and (flat == flat.round()).all()) and len(flat.unique()) == len(flat)


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> Numbers:
    """Tensors whose elements are numbered through."""
    found, at = {}, 0
    for key, shape in shapes.items():
        found[key] = torch.arange(at, at + prod(shape), dtype=torch.float64).reshape(shape)
        at += prod(shape)
    return found


def _converted(network: Network, given: Numbers) -> Numbers:
    """What a converter makes; source tensors that are not given are filled with a number that no element has."""
    filled = {
        k: given[k] if k in given and tuple(given[k].shape) == tuple(s) else torch.full(tuple(s), _ABSENT).double()
        for k, s in network.source.items()
    }
    return {k: t.detach() for k, t in network.convert(filled).items()}


def plain(name: str, family: str, network: Network) -> Pair:
    """A whole network and its counterpart."""
    return Pair(name, family, "plain", network.source, _converted(network, numbered(network.source)))


def deeper(name: str, family: str, one: Network, other: Network) -> Pair:
    """A network and the counterpart of one with another number of layers: layers with the same index correspond."""
    return Pair(name, family, "depth", one.source, _converted(other, numbered(one.source)))


def partial(
    name: str,
    family: str,
    network: Network,
    keep: Callable[[str], bool],
    more: Mapping[str, tuple[int, ...]] = {},
    wanted: Callable[[str], bool] = lambda key: True,
) -> Pair:
    """A network with only some of its tensors, with others that have no counterpart; the whole counterpart, or some."""
    source = {k: s for k, s in network.source.items() if keep(k)} | dict(more)
    made = _converted(network, numbered(source))
    return Pair(name, family, "partial", source, {k: t for k, t in made.items() if wanted(k)})


def negative(name: str, family: str, one: Network, other: Network) -> Pair:
    """Two networks that have nothing to do with each other."""
    made = _converted(other, {})
    return Pair(name, family, "negative", one.source, made)
