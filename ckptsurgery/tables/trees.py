"""Folded keys as a tree of modules with totals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ..language.folding import fold_items
from ..notebook_view import TextInNotebooks
from ..specs import TensorSpec
from ..wording import shown_bytes
from .columns import bar, shown_numbers, table
from .totals import Total

__all__ = ["KeyTree", "key_tree", "tree"]

# Dots and slashes separate segments, but not the dots inside of `{0..31}`.
_SEGMENTS = re.compile(r"(?:\{[^{}]*\}|[^./{])+|\{|[./]")


class KeyTree(TextInNotebooks):
    """A tree of keys as text; a prompt and a notebook show it as it is."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__


def key_tree(specs: Mapping[str, TensorSpec], depth: int | None = None, width: int = 100) -> KeyTree:
    """Draw keys as a tree of modules with totals, and runs of keys that differ in a number as one.

    >>> specs = {f"h.{i}.{leaf}": TensorSpec([4], "F32") for i in range(3) for leaf in "wb"}
    >>> key_tree(specs, width=60)
    h.{0..2}  x6  24 numbers  96 B  ██████████
    ├ w       x3  F32 [4]     48 B  █████
    └ b       x3  F32 [4]     48 B  █████

    Args:
        depth: levels that are shown. width: columns of the text.
    """
    lines = [(group.text, specs[group.first], group.count) for group in fold_items(specs)]
    return KeyTree("\n".join(tree(lines, width, depth)))


class _Node(Total):
    def __init__(self) -> None:
        super().__init__()
        self.children: dict[str, _Node] = {}
        self.spec: TensorSpec | None = None


def tree(lines: Sequence[tuple[str, TensorSpec, int]], width: int, depth: int | None = None) -> list[str]:
    """Draw the lines `(folded key, spec, count)` as a tree, with each module's totals and its share of the bytes.

    >>> specs = [("h.{0..2}.w", TensorSpec([4], "F32"), 3), ("h.{0..2}.b", TensorSpec([], "F32"), 3)]
    >>> print("\\n".join(tree(specs, 60)))
    h.{0..2}  x6  15 numbers  60 B  ██████████
    ├ w       x3  F32 [4]     48 B  ████████
    └ b       x3  F32 []      12 B  ██
    >>> print("\\n".join(tree(specs, 60, depth=1)))
    h.{0..2}  x6  15 numbers  60 B  ██████████

    Args:
        depth: levels that are shown; a module at the last one is a line with its totals.
    """
    root = _Node()
    for text, spec, count in lines:
        node = root
        node.add(spec, count)
        for segment in _SEGMENTS.findall(text) or [text]:
            node = node.children.setdefault(segment, _Node())
            node.add(spec, count)
        node.spec = spec
    return table(list(_rows(root, root.nbytes, depth)), "<><><", width)


def _rows(
    node: _Node, whole: int, depth: int | None, indent: str | None = None
) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield the rows below a node; the outermost ones, without an `indent`, have no branches."""
    children = list(node.children.items()) if depth is None or depth > 0 else []
    below = None if depth is None else depth - 1
    for i, (name, child) in enumerate(children):
        while len(child.children) == 1 and child.spec is None:
            ((segment, child),) = child.children.items()
            name += segment
        last = i == len(children) - 1
        branch = "" if indent is None else indent + ("└ " if last else "├ ")
        times = f"x{child.count}" if child.count > 1 else ""
        size = str(child.spec) if child.spec is not None else shown_numbers(child.numel)
        share = bar(child.nbytes / whole if whole else 0.0)
        yield branch + name.rstrip("./"), times, size, shown_bytes(child.nbytes), share
        yield from _rows(child, whole, below, "" if indent is None else indent + ("  " if last else "│ "))
