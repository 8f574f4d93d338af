"""Rows of a foldable tree: keys that differ in numbers only and with the same facts are one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..language.folding import fold_groups
from ..specs import TensorSpec

__all__ = ["tree_rows"]

_MOST = 6000  # rows of one tree; keys fold to some hundred, and a page stays below 2 MB


def tree_rows(specs: Mapping[str, TensorSpec | None], said: Callable[[str], tuple[Any, ...]]) -> dict[str, Any]:
    """Make the rows of one tree.

    >>> specs = {f"h.{i}.w": TensorSpec([2, 3], "F32") for i in range(4)}
    >>> tree_rows(specs, lambda key: ("copy",))
    {'rows': [['h.{0..3}.w', 4, 'F32 [2, 3]', 96, 'copy']], 'left': 0, 'keys': 4, 'bytes': 96}

    Args:
        specs: key -> spec, in order; None where it is not known.
        said: further facts about a key; keys with other facts are other rows.

    Returns:
        rows: text of the keys, how many they are, spec, bytes of all of them, and the further facts. left: keys that no
        row shows, since there are too many. keys and bytes: of all.
    """
    labels: dict[tuple[object, ...], tuple[object, ...]] = {}  # one object for each, which folding compares by identity

    def label(key: str) -> tuple[object, ...]:
        found = (specs[key], *said(key))
        return labels.setdefault(found, found)

    groups = fold_groups(specs, label)
    rows = []
    for group in groups[:_MOST]:
        spec = specs[group.first]
        nbytes = spec.nbytes * group.count if spec is not None else 0
        rows.append([group.text, group.count, str(spec) if spec is not None else "", nbytes, *said(group.first)])
    left = sum(group.count for group in groups[_MOST:])
    return {"rows": rows, "left": left, "keys": len(specs), "bytes": _bytes(specs.values())}


def _bytes(specs: Iterable[TensorSpec | None]) -> int:
    return sum(spec.nbytes for spec in specs if spec is not None)
