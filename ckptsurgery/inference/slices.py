"""Slices of many tensors, each known by a hash of its values that no order changes, and the wholes that they fill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING, Any

from .element_maps import hashed, places_between

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["Numbering", "SliceTable"]

_FEWEST = 8  # elements that a slice of a large tensor has to have; smaller ones take as much memory as the tensor
_SMALL = 65536  # elements up to which every slice is looked at
_RANK = 5  # tensors of more axes are not cut

View = tuple[int, ...]


@dataclass(frozen=True)
class Numbering:
    """A whole in which each element is the number of the element of a part that it comes from.

    Args:
        numbers: in the whole's shape; the elements of the first part come first, then those of the second.
        parts: the parts' keys.
        shapes: the parts' shapes.
    """

    numbers: Array
    parts: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def bases(self) -> list[int]:
        """The number of each part's first element, and the number behind the last one."""
        found = [0]
        for shape in self.shapes:
            found.append(found[-1] + prod(shape))
        return found


@dataclass(frozen=True)
class SliceTable:
    """The slices of tensors.

    Args:
        keys: the tensors.
        shapes: their shapes.
        hashes: of all slices, sorted.
        owners: for each slice, the number of its tensor.
        views: for each slice, the number of the axes that it is one step of.
        places: for each slice, its place along those axes.
        listed: the axes, by their number.
    """

    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    hashes: Array
    owners: Array
    views: Array
    places: Array
    listed: tuple[View, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]], load: Callable[[str], Array]) -> SliceTable:
        """Hash the slices of tensors, one tensor at a time."""
        import numpy as np

        keys = tuple(k for k, shape in shapes.items() if 0 < len(shape) <= _RANK)
        numbers: dict[View, int] = {}
        rows: list[tuple[Array, int, int]] = []
        for owner, key in enumerate(keys):
            mixed = hashed(load(key))
            for view in ((), *_views(mixed.shape)):
                rows.append((_sliced(mixed, view), owner, numbers.setdefault(view, len(numbers))))
        if not rows:
            empty = np.zeros(0, dtype=np.int64)
            return cls(keys, (), empty.astype(np.uint64), empty, empty, empty, ())
        hashes = np.concatenate([h for h, _, _ in rows])
        sizes = [len(h) for h, _, _ in rows]
        owners = np.repeat(np.array([o for _, o, _ in rows], dtype=np.int32), sizes)
        views = np.repeat(np.array([v for *_, v in rows], dtype=np.int16), sizes)
        places = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
        order = np.argsort(hashes, kind="stable")
        listed = tuple(tuple(shapes[k]) for k in keys)
        return cls(keys, listed, hashes[order], owners[order], views[order], places[order], tuple(numbers))

    def fill(self, whole: Array, load: Callable[[str], Array]) -> Numbering | None:
        """The tensors that together are a whole, each element once; None where none are."""
        for view, found, left in self._views_of(whole):
            if not left.any():
                result = self._numbered(whole, view, found, load)
                if result is not None:
                    return result
        return None

    def most_of(self, whole: Array, load: Callable[[str], Array]) -> Numbering | None:
        """Tensors of one shape that together are most of a whole; what is of none of them has the number -1."""
        for view, found, left in self._views_of(whole):
            shapes = {self.shapes[owner] for owner, _ in found}
            if left.any() and len(shapes) == 1 and 2 * left.sum() <= len(left):
                result = self._numbered(whole, view, found, load)
                if result is not None:
                    return result
        return None

    def _views_of(self, whole: Array) -> Iterator[tuple[View, list[tuple[int, Array]], Array]]:
        """For each way to cut a whole: the tensors of which all slices are in it, and which slices are of none."""
        if not len(self.hashes) or not 0 < whole.ndim <= _RANK:
            return
        mixed = hashed(whole)
        for view in _views(whole.shape):
            found, left = self._members(_sliced(mixed, view))
            if found:
                yield view, found, left

    def _members(self, wanted: Array) -> tuple[list[tuple[int, Array]], Array]:
        """The tensors of which all slices are among these, each with the places of its slices there; what is left."""
        import numpy as np

        left = np.ones(len(wanted), dtype=bool)
        found: list[tuple[int, Array]] = []
        inside = np.flatnonzero(np.isin(self.hashes, wanted))
        if not len(inside):
            return found, left
        kinds, counts = np.unique(np.stack([self.owners[inside], self.views[inside]]), axis=1, return_counts=True)
        for (owner, view), count in zip(kinds.T.tolist(), counts.tolist()):
            if count != prod(self.shapes[owner][n] for n in self.listed[view]) or any(o == owner for o, _ in found):
                continue
            own = inside[(self.owners[inside] == owner) & (self.views[inside] == view)]
            at = _taken(wanted, self.hashes[own], left)
            if at is not None:
                left[at] = False
                found.append((owner, at))
        return (found, left) if len(found) > 1 else ([], left)

    def _numbered(
        self, whole: Array, view: View, members: Sequence[tuple[int, Array]], load: Callable[[str], Array]
    ) -> Numbering | None:
        import numpy as np

        others = tuple(n for n in range(whole.ndim) if n not in view)
        turned = whole.transpose(*view, *others)
        rows = turned.reshape(-1, *(whole.shape[n] for n in others))
        numbers = np.full(rows.shape, -1, dtype=np.int64)
        base = 0
        for owner, at in members:
            part = load(self.keys[owner])
            places = places_between(part, rows[at])
            if places is None:
                return None
            numbers[at] = base + places.reshape(rows[at].shape)
            base += part.size
        back = np.argsort((*view, *others))
        listed = tuple(owner for owner, _ in members)
        return Numbering(
            numbers.reshape(turned.shape).transpose(*back),
            tuple(self.keys[o] for o in listed),
            tuple(self.shapes[o] for o in listed),
        )


def _views(shape: Sequence[int]) -> list[View]:
    """The axes along which slices are large enough to be distinguished, those with the fewest slices first."""
    axes, size = range(len(shape)), prod(shape)
    found = [(0,)] if len(shape) == 1 else [view for n in range(1, len(shape)) for view in combinations(axes, n)]
    least = 1 if size <= _SMALL else _FEWEST
    kept = [v for v in found if prod(shape[n] for n in v) * least <= size and all(shape[n] > 1 for n in v)]
    return sorted(kept, key=lambda v: (prod(shape[n] for n in v), v))


def _sliced(mixed: Array, view: View) -> Array:
    """The hash of each slice along some axes."""
    others = tuple(n for n in range(mixed.ndim) if n not in view)
    result: Array = mixed.sum(axis=others).reshape(-1)
    return result


def _taken(wanted: Array, own: Array, left: Array) -> Array | None:
    """Free places of the wanted hashes for all of a tensor's own ones, in order; None where there are too few."""
    import numpy as np

    free = np.flatnonzero(left)
    order = free[np.argsort(wanted[free], kind="stable")]
    own = np.sort(own)
    at = np.searchsorted(wanted[order], own) + np.arange(len(own)) - np.searchsorted(own, own)
    if len(order) == 0 or (at >= len(order)).any() or not np.array_equal(wanted[order[at]], own):
        return None
    result: Array = np.sort(order[at])
    return result
