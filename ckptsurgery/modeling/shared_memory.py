"""Memory that tensors share without being one tensor: views of one storage, or storages over one block of memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..storage.plain_memory import oddity
from ..storage.tensors import span

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AddressRange", "Memory", "memory_of", "overlapping"]


class AddressRange(NamedTuple):
    """Addresses `[start, stop)` of one device."""

    device: str
    start: int
    stop: int


class Memory:
    """The storages of some tensors, by address.

    Two storages may be one block of memory: `torch.from_numpy` of two views of an array makes two.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._merged: list[AddressRange] = []
        for region in sorted({r for r in map(memory_of, tensors) if r is not None}):
            last = self._merged[-1] if self._merged else None
            if last is not None and last.device == region.device and region.start < last.stop:
                self._merged[-1] = last._replace(stop=max(last.stop, region.stop))
            else:
                self._merged.append(region)
        self._starts = [(region.device, region.start) for region in self._merged]

    def meets(self, tensor: Tensor) -> bool:
        """Return whether a tensor's storage has bytes in common with these.

        >>> import numpy, torch
        >>> row = numpy.zeros(8)
        >>> Memory([torch.from_numpy(row[:4])]).meets(torch.from_numpy(row[2:]))
        True
        """
        region = memory_of(tensor)
        if region is None:
            return False
        at = bisect_right(self._starts, (region.device, region.stop - 1)) - 1
        found = self._merged[at] if at >= 0 else None
        return found is not None and found.device == region.device and found.stop > region.start


def memory_of(tensor: Tensor) -> AddressRange | None:
    """Return the addresses of a tensor's storage; None where it has none, as on the meta device."""
    if tensor.is_meta or oddity(tensor) is not None:
        return None
    storage = tensor.untyped_storage()
    start, size = storage.data_ptr(), storage.nbytes()
    return AddressRange("cpu" if tensor.is_cpu else str(tensor.device), start, start + size) if start and size else None


def overlapping(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return groups of tensors on the CPU that share some of their elements, or have elements that share memory.

    >>> import torch
    >>> row = torch.zeros(9)
    >>> overlapping({"a": row[:5], "b": row[4:], "c": torch.zeros(2), "twice": row[:5]})
    [['a', 'twice', 'b']]

    Names of the very same elements alone are not a group: these are ties. Tensors whose elements alternate in memory
    may form a group, too.

    Args:
        tensors: all of them plain strided memory, which the caller has checked.
    """
    regions: list[tuple[int, int, str]] = []
    alone: set[str] = set()
    for key, tensor in tensors.items():
        if tensor.device.type != "cpu":
            continue
        start, size = tensor.data_ptr(), tensor.element_size()
        if not start:
            continue
        if tensor.is_contiguous():
            stop = start + tensor.numel() * size
        else:
            stop = start + span(tuple(tensor.shape), tensor.stride()) * size
            if _may_meet_itself(tensor):
                alone.add(key)
        regions.append((start, stop, key))
    regions.sort(key=lambda region: region[:2])
    groups: list[list[str]] = []
    end = 0
    for start, stop, key in regions:
        if start >= end:
            groups.append([])
        groups[-1].append(key)
        end = max(end, stop)
    return [group for group in groups if group[0] in alone or _differ([tensors[key] for key in group])]


def _differ(tensors: list[Tensor]) -> bool:
    first = tensors[0]
    return any(
        (t.data_ptr(), t.dtype, t.shape, t.stride()) != (first.data_ptr(), first.dtype, first.shape, first.stride())
        for t in tensors[1:]
    )


def _may_meet_itself(tensor: Tensor) -> bool:
    """Whether two elements of a strided tensor may lie in one place."""
    reached = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride <= reached:
            return True
        reached += stride * (size - 1)
    return False
