"""Tensors of one model whose memory runs into each other: a write to one of them changes the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..storage.plain_memory import oddity

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["overlaps"]


def overlaps(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the tensors that share a part of their memory with another one, and the name of that one.

    >>> import torch
    >>> memory = torch.zeros(6)
    >>> overlaps({"a": memory[:4], "b": memory[2:], "c": memory[:2]})
    {'a': 'b', 'b': 'a'}

    A tensor inside of another is a view of it, such as a slice or a tie, and no fault. Tensors with gaps between
    their elements are left out: columns of one matrix lie between each other.
    """
    found: dict[str, str] = {}
    spans = sorted(
        (str(t.device), t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize, name)
        for name, t in tensors.items()
        if oddity(t) is None and not t.is_meta and t.numel() and _dense(t)
    )
    open_span = None
    for span in spans:
        device, start, end, name = span
        if open_span is not None and open_span[0] == device and start < open_span[2]:
            if end <= open_span[2] or start == open_span[1]:  # one is inside of the other
                open_span = max(open_span, span, key=lambda one: one[2])
                continue
            found.setdefault(open_span[3], name)
            found.setdefault(name, open_span[3])
        open_span = span
    return found


def _dense(tensor: Tensor) -> bool:
    """Whether its elements fill one run of memory, in any order of dimensions."""
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return True
