"""TOML as it is written: quoted texts, keys, values, and the lines of a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["entry_text", "key_text", "quoted", "table_lines", "value_text"]


def quoted(text: str) -> str:
    r"""Return a text as a basic string of TOML.

    >>> print(quoted('a "b"\n'))
    "a \"b\"\n"
    """
    # JSON's escapes are TOML's, but TOML also wants DEL escaped
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def value_text(value: Any) -> str:
    """Return a number, a text, a list or a table as TOML writes it on one line; None is a blank to fill in.

    >>> value_text({"a b": [1, 2.5], "c": None})
    '{ "a b" = [1, 2.5], c = … }'
    """
    if value is None:
        return "…"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key_text(k)} = {value_text(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(value_text, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) else str(value)


def entry_text(part: str, value: Any) -> str:
    """Return an entry of a recipe file, on one line that TOML reads as it is pasted.

    >>> entry_text("dims", {"h": {"q": 8, "k": 2}}), entry_text("drop", ["x.{i}"])
    ('dims = { h = { q = 8, k = 2 } }', 'drop = ["x.{i}"]')
    """
    return f"{part} = {value_text(value)}"


def table_lines(name: str, entries: Mapping[str, Any]) -> list[str]:
    """Return an empty line, a table's head and its entries.

    >>> table_lines("scope.tie", {"a.b": "c"})
    ['', '[scope.tie]', '"a.b" = "c"']

    Args:
        name: as it is written, with the tables around it.
    """
    return ["", f"[{name}]", *(f"{key_text(k)} = {value_text(v)}" for k, v in entries.items())]


def key_text(text: str) -> str:
    """Return a key as TOML writes it: bare where that is allowed.

    >>> key_text("a.b"), key_text("a-b")
    ('"a.b"', 'a-b')
    """
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else quoted(text)
