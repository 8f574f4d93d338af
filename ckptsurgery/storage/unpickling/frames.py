"""The way from a file's root to its model: how the tree around the model is named, so that it can be built again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .nodes import children, name_of

__all__ = ["Frame", "Level", "framed", "levels_of", "paths_beside", "route_of"]


@dataclass(frozen=True, slots=True)
class Level:
    """One node on the way to the model.

    Args:
        parts: its keys in order, each with the extras path of its value; None for the key that leads on.
        is_list: whether it is a list, whose keys are positions.
    """

    parts: tuple[tuple[Any, str | None], ...]
    is_list: bool = False


Frame = tuple[Level, ...]
"""The levels from the root down; empty where the file is the model itself."""


def levels_of(tree: Any, chosen: tuple[str, ...]) -> Frame:
    """The nodes on the way to the chosen one.

    >>> levels_of({"epoch": 3, "model": {}}, ("model",))
    (Level(parts=(('epoch', 'epoch'), ('model', None)), is_list=False),)

    Args:
        tree: the file's value.
        chosen: the names on the way.
    """
    levels: list[Level] = []
    node = tree
    for depth, name in enumerate(chosen):
        before = "".join(f"{part}." for part in chosen[:depth])
        parts = list(children(node) or ())
        named = [n for n, (key, _) in enumerate(parts) if name_of(key) == name]
        # where two keys have one name, as 1 and "1", the one that has parts
        at = next((n for n in named if children(parts[n][1]) is not None), named[0])
        told = tuple((key, None if n == at else before + name_of(key)) for n, (key, _) in enumerate(parts))
        levels.append(Level(told, not isinstance(node, dict) and type(node) in (list, tuple)))
        node = parts[at][1]
    return tuple(levels)


def paths_beside(frame: Frame) -> set[str]:
    """The extras paths of what lies beside the way; all other extras lie in the model."""
    return {path for level in frame for _, path in level.parts if path is not None}


def route_of(frame: Frame) -> str:
    """The dotted path of the model, `""` for the whole file.

    >>> route_of((Level((("checkpoint", None),)), Level((("model", None),))))
    'checkpoint.model'
    """
    return ".".join(name_of(key) for level in frame for key, path in level.parts if path is None)


def framed(frame: Frame, model: Any, beside: Mapping[str, Any]) -> Any:
    """The tree around a model, with the same names in the same order.

    >>> around = levels_of({"epoch": 3, "model": {}, "args": 1}, ("model",))
    >>> framed(around, {"w": 0}, {"epoch": 4})
    {'epoch': 4, 'model': {'w': 0}}

    Args:
        model: what stands where the model stood.
        beside: extras path -> value; a path without one is left out, and leaves None in a list.
    """
    node = model
    for level in reversed(frame):
        if level.is_list:
            node = [node if path is None else beside.get(path) for _, path in level.parts]
        else:
            filled = ((key, path) for key, path in level.parts if path is None or path in beside)
            node = {key: node if path is None else beside[path] for key, path in filled}
    return node
