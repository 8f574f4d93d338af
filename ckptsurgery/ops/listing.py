"""Numbers that a recipe knows by a name: they print as their name, however many there are."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Listing"]


class Listing(tuple[int | float, ...]):
    """A list of numbers, all of them integers or all of them floats.

    >>> ids = Listing([4, 2], "kept")
    >>> ids[0], str(ids), ids == (4, 2)
    (4, 'kept', True)

    Args:
        name: what an op writes in place of the numbers.
    """

    name: str

    def __new__(cls, numbers: Iterable[int | float], name: str) -> Listing:
        """Make a list of numbers with a name."""
        made = super().__new__(cls, numbers)
        made.name = name
        return made

    @property
    def whole(self) -> bool:
        """Whether the numbers are integers."""
        return all(type(number) is int for number in self[:1])

    def __repr__(self) -> str:
        return f"<Listing {self.name}: {len(self):,} numbers>"

    def __str__(self) -> str:
        return self.name
