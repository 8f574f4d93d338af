"""Text within rules: marks that a backslash takes the meaning from, and splitting where a mark has its meaning."""

from __future__ import annotations

import re

__all__ = ["escape", "guarded", "split_unescaped", "stripped", "unescape"]

_SPECIAL = re.compile(r"->|[{}\[\],|?&\\]")


def escape(text: str, *, first: bool = True) -> str:
    r"""A literal text as a pattern spells it.

    >>> escape("a[0]->b"), escape("+a+b")
    ('a\\[0\\]\\->b', '\\+a+b')

    Args:
        first: the text begins a pattern, where a `+` is a mark.
    """
    plus = "\\" if first and text.startswith("+") else ""
    return plus + _SPECIAL.sub(lambda m: "\\" + m.group(), text)


def unescape(text: str) -> str:
    """The literal text of a pattern's piece."""
    return re.sub(r"\\(->|.)", r"\1", text, flags=re.DOTALL)


def guarded(text: str) -> str:
    r"""A pattern's text with its outermost spaces escaped, since unescaped ones are not part of it.

    >>> guarded(" a b "), guarded(" "), guarded("a")
    ('\\ a b\\ ', '\\ ', 'a')
    """
    if text[-1:].isspace() and not _escaped(text[:-1]):
        text = f"{text[:-1]}\\{text[-1]}"
    return f"\\{text}" if text[:1].isspace() else text


def stripped(text: str) -> str:
    r"""The text without the spaces around it that are not escaped.

    >>> stripped(" a\\  "), stripped(" a ")
    ('a\\ ', 'a')
    """
    body = text.strip()
    return body + text[len(text.rstrip())] if _escaped(body) and len(text.rstrip()) < len(text) else body


def _escaped(before: str) -> bool:
    """Whether what follows this text is escaped."""
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def split_unescaped(text: str, mark: str, depth_marks: str = "{}[]()") -> list[str]:
    r"""Split at `mark` where it stands outside of brackets and is not escaped.

    >>> split_unescaped("{p:q,k}.w, b\\,c", ",")
    ['{p:q,k}.w', ' b\\,c']
    """
    parts, start, at, depth = [], 0, 0, 0
    openers, closers = depth_marks[::2], depth_marks[1::2]
    while at < len(text):
        if text[at] == "\\":
            at += 3 if text.startswith("->", at + 1) else 2
            continue
        if depth == 0 and text.startswith(mark, at):
            parts.append(text[start:at])
            at += len(mark)
            start = at
            continue
        if text[at] in openers:
            depth += 1
        elif text[at] in closers:
            depth = max(0, depth - 1)
        at += 1
    parts.append(text[start:])
    return parts
