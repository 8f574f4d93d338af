"""Which tensors stand beside each other, and whether names tell them apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterator

from .roles import factor_of
from .sides import UnitSide
from .units import split_path
from .vocabulary import STRUCTURAL, concepts, words

__all__ = ["Neighbours"]

_SEPARATORS = re.compile(r"[./]")
_NEAR = 3  # how many segments before the leaf may be the one that differs between neighbours


class Neighbours:
    """The tensors of one side by their places: those beside each other differ in one segment of their paths."""

    def __init__(self, side: UnitSide) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.paths: dict[str, str] = {}
        self.places: dict[tuple[str, str], list[str]] = defaultdict(list)
        for unit in side.units:
            for role, leaf in unit.leaves.items():
                for part in leaf.parts:
                    self.shapes[part.key] = part.shape
                    self.paths[part.key] = unit.path if not leaf.fuse else part.key.rpartition(".")[0] or part.key
                    for place in _places(self.paths[part.key]):
                        self.places[role, place].append(part.key)
        self.within: dict[tuple[str, str], list[str]] = defaultdict(list)
        for key, path in self.paths.items():
            for module in _modules(path):
                self.within[module, split_path(key)[1]].append(key)
        self.roles = {key: role for (role, _), keys in self.places.items() for key in keys}

    def rival(self, source: str, shape: tuple[int, ...], name: str) -> str | None:
        """Return a tensor beside `source` that has a target's shape as it is, and that names do not rule out.

        Args:
            shape, name: the target's, without its leaf.
        """
        if self.shapes[source] == shape:
            return None
        path = self.paths[source]
        beside = (k for place in _places(path) for k in self.places[self.roles[source], place])
        alike = (k for k in beside if self.shapes[k] == shape)
        return next((k for k in alike if not _told(path, self.paths[k], name)), None)

    def double(self, source: str, name: str, used: Container[str]) -> str | None:
        """Return a tensor in the same module that is used for nothing, and that could as well be made into a target.

        Args:
            name: the target's, without its leaf.
            used: the sources of what is made.
        """
        path = self.paths[source]
        for module in _modules(path):
            for key in self.within[module, split_path(source)[1]]:
                alike = key not in used and self.shapes[key] == self.shapes[source]
                if alike and not _told(path, self.paths[key], name) and not _told(self.paths[key], path, name):
                    return key
        return None


def _modules(path: str) -> Iterator[str]:
    """The modules around a path, without a number between."""
    segments = _SEPARATORS.split(path)
    for at in range(len(segments) - 1, max(0, len(segments) - _NEAR), -1):
        if segments[at].isdigit():
            return
        yield ".".join(segments[:at])


def _places(path: str) -> Iterator[str]:
    """The path with a gap for each of its last segments; a number counts only where it is the last one."""
    segments = _SEPARATORS.split(path)
    for at in range(len(segments) - 1, max(-1, len(segments) - 1 - _NEAR), -1):
        if at == len(segments) - 1 or not segments[at].isdigit():
            yield ".".join([*segments[:at], "*", *segments[at + 1 :]])


def _told(path: str, rival: str, target: str) -> bool:
    """Whether what only `path` is called occurs in the target's name, and nothing that only the rival is called."""
    one, two, name = _called(path), _called(rival), _called(target)
    return bool((one - two) & name) and not (two - one) & name


def _called(path: str) -> set[str]:
    segments = _SEPARATORS.split(path)[-_NEAR - 1 :]
    meant = {concept for segment in segments for concept, _ in concepts(segment)} - {STRUCTURAL}
    return meant | {word for segment in segments for word in words(segment)} | factor_of(path)
