"""Few objects that stand in very many places: each is asked once, and not once for every place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

__all__ = ["Distinct"]

T = TypeVar("T")
R = TypeVar("R")


class Distinct(Generic[T]):
    """The different objects among many; equal ones count as different, as to compare them is what takes the time.

    >>> row, column = (1, 3), (3, 1)
    >>> many = Distinct([row, column, row, row])
    >>> len(many.objects), many.each(max)
    (2, [3, 3, 3, 3])

    Args:
        objects: `id` -> object; they live as long as this does, so that no other takes the number of one.
        ids: of the object in each place.
    """

    __slots__ = ("ids", "objects")

    def __init__(self, places: Iterable[T]) -> None:
        found = list(places)
        self.ids = list(map(id, found))
        self.objects: dict[int, T] = dict(zip(self.ids, found))

    def each(self, fact: Callable[[T], R]) -> list[R]:
        """A fact about the object in each place."""
        facts = {number: fact(one) for number, one in self.objects.items()}
        return list(map(facts.__getitem__, self.ids))
