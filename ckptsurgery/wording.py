"""Numbers in sentences, and texts of bounded length."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

__all__ = ["brief", "clipped", "close_keys", "counted", "is_text", "listed", "shown_bytes", "shown_keys"]

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


def is_text(value: object) -> bool:
    """Whether a string can be written as UTF-8; one with lone surrogates cannot. What is no string is not judged.

    >>> is_text("größe"), is_text("\\ud800")
    (True, False)
    """
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown_keys(keys: Iterable[str], limit: int = 6) -> tuple[str, ...]:
    """The first few keys, and how many more there are.

    >>> shown_keys(["a", "b", "c"], limit=2)
    ('a', 'b', 'and 1 more')
    """
    names = list(keys)
    shown = tuple(names[:limit])
    return shown if len(names) <= limit else (*shown, f"and {len(names) - limit} more")


def close_keys(key: str, keys: Collection[str], limit: int = 3) -> list[str]:
    """Keys that may have been meant: the same but for a prefix or an index, else similar ones.

    >>> close_keys("layer.weight", ["model.layer.weight", "model.layer.bias"])
    ['model.layer.weight']
    """
    tail, template = "." + key, re.sub(r"\d+", "0", key)
    near = [k for k in keys if k.endswith(tail) or key.endswith("." + k)]
    if not near:
        near = [k for k in keys if re.sub(r"\d+", "0", k) == template] if len(keys) < 20_000 else []
    if near:
        return near[:limit]
    # Comparing is quadratic in the length: enough keys to be useful, few enough to answer at once.
    pool = [k for k in keys if abs(len(k) - len(key)) <= 8][:2000]
    return difflib.get_close_matches(key, pool, n=limit)
