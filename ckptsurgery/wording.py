"""Numbers in sentences, and texts of bounded length."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["brief", "clipped", "counted", "listed", "shown_bytes"]

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


def clipped(text: str, most: int = 120) -> str:
    """Return the text with its middle left out where it is longer than `most` characters.

    >>> clipped("model.layers.0.weight", 12)
    'mode … eight'
    """
    if len(text) <= most:
        return text
    head = (most - 3) // 2
    return f"{text[:head]} … {text[len(text) - (most - 3 - head) :]}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are.

    >>> listed(["a", "b", "c", "d"]), listed(["a"])
    ('a, b, c, … 1 more', 'a')
    """
    shown = [clipped(name) for name in names[:most]]
    return ", ".join([*shown, f"… {len(names) - most:,} more"] if len(names) > most else shown)


def brief(kind: str, subject: str, *parts: str) -> str:
    """Return a `repr` of at most some 1,000 characters, whatever an object holds.

    >>> brief("Plan", "2 source keys -> 2 target keys", "2 copy", "")
    '<Plan 2 source keys -> 2 target keys: 2 copy>'

    Args:
        kind: the name of the class.
        subject: the object in a few words.
        parts: facts about it; empty ones are left out.
    """
    facts = ", ".join(clipped(part) for part in parts if part)
    return f"<{kind} {clipped(subject, 300)}{': ' * bool(facts)}{clipped(facts, 600)}>"


def shown_bytes(n: int) -> str:
    """Return a size for people, in decimal units.

    >>> shown_bytes(999), shown_bytes(1_500_000), shown_bytes(999_999_999)
    ('999 B', '1.5 MB', '1.0 GB')
    """
    if n < 1000:
        return f"{n} B"
    size = float(n)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.95 or unit == "TB":
            break
    return f"{size:.1f} {unit}"
