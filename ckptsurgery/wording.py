"""Numbers in sentences."""

from __future__ import annotations

__all__ = ["counted"]

_MANY = {"is": "are", "has": "have", "was": "were", "matches": "match"}
_MANY |= {"copy": "copies", "entry": "entries", "matrix": "matrices"}


def counted(n: int, noun: str, verb: str = "") -> str:
    """So many things, and what they do.

    >>> counted(1, "tensor"), counted(99840, "tensor"), counted(1, "key", "is"), counted(2, "matrix", "holds")
    ('1 tensor', '99,840 tensors', '1 key is', '2 matrices hold')

    Args:
        verb: as it is said of one.
    """
    if n != 1:
        noun, verb = _MANY.get(noun, noun + "s"), _MANY.get(verb, verb.removesuffix("s"))
    return f"{n:,} {noun} {verb}".rstrip()
