"""How keys are shown in messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

__all__ = ["close_keys", "is_text", "shown_keys"]


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
