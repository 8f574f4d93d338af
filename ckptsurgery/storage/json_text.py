"""JSON from strangers: what is made of nothing but brackets takes thirty times its size in memory, and is refused."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["parse_json", "refuse_brackets"]

_FREE = 20_000  # brackets that any text may have
_SHARE = 12  # characters of text to a bracket; a tensor's row has three in fifty, a short list of numbers one in twenty
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)


def refuse_brackets(text: str) -> None:
    """Refuses a text that would become mostly empty lists and objects.

    >>> refuse_brackets('{"a": [1, 2], "[[[": []}')
    >>> refuse_brackets("[" + "[],"  * 30_000 + "1]")
    Traceback (most recent call last):
        ...
    ValueError: it is made of brackets

    Raises:
        ValueError: more brackets outside of strings than values could need.
    """
    if text.count("[") + text.count("{") <= max(_FREE, len(text) // _SHARE):
        return
    bare = _STRING.sub("", text)
    if bare.count("[") + bare.count("{") > max(_FREE, len(text) // _SHARE):
        raise ValueError("it is made of brackets")


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in any of Unicode's encodings.

    Raises:
        ValueError: no JSON, or made of brackets.
        RecursionError: nested too deep.
    """
    text = data.decode(json.detect_encoding(data))
    refuse_brackets(text)
    return json.loads(text)
