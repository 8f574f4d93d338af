"""Values that are never None where the code is right."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["present"]

T = TypeVar("T")


def present(value: T | None, what: str) -> T:
    """Return a value that is not None.

    Unlike `assert`, the check also runs under `python -O`. It is for the code's own invariants; anything that a user or
    a file may cause is a diagnostic.

    >>> present(3, "the size")
    3

    Args:
        what: the value by its name.

    Raises:
        RuntimeError: the value is None, which is a bug of ckptsurgery.
    """
    if value is None:
        raise RuntimeError(f"a bug of ckptsurgery: {what} is missing")
    return value
