"""Plain text in columns: it fits the width where it can, and never cuts a key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import wrap

from ..wording import counted

__all__ = ["bar", "cut", "hanging", "listing", "shown_numbers", "table"]


def table(rows: Sequence[Sequence[str]], align: str, width: int) -> list[str]:
    """Rows in columns; a first cell too long for its column keeps its line, the others follow on the next.

    >>> print("\\n".join(table([("a", "F32 [2]"), ("a.long.name", "I64 []")], "<<", 14)))
    a      F32 [2]
    a.long.name
           I64 []

    Args:
        rows: equally many cells each.
        align: `<` or `>` for each column.
        width: columns of the terminal.
    """
    if not rows:
        return []
    widths = [max(len(row[c]) for row in rows) for c in range(len(align))]
    gaps = 2 * (len([w for w in widths[1:] if w]))
    others = sum(widths[1:]) + gaps
    first = max(1, min(widths[0], width - others))
    lines: list[str] = []
    for row in rows:
        cells = [f"{cell:{a}{w}}" for cell, a, w in zip(row[1:], align[1:], widths[1:], strict=True) if w]
        head = row[0]
        if len(head) > first:
            lines.append(head)
            head = ""
        lines.append("  ".join([f"{head:{align[0]}{first}}", *cells]).rstrip())
    return lines


def listing(entries: Mapping[str, str], width: int | None) -> list[str]:
    """Names and what they are; what is too long for `width` goes on below itself. Without a width, a line each.

    >>> print("\\n".join(listing({"a": "what there is to be said of it", "long": "little"}, 26)))
    a     what there is to be
          said of it
    long  little
    """
    indent = max(map(len, entries), default=0) + 2
    lines: list[str] = []
    for name, text in entries.items():
        folded = [text] if width is None else wrap(text, max(20, width - indent), break_on_hyphens=False)
        first, *rest = folded or [""]
        lines += [f"{name:<{indent}}{first}".rstrip(), *(" " * indent + more for more in rest)]
    return lines


def hanging(text: str, width: int) -> str:
    """Wrap the lines that are longer than `width` at their blanks, and indent what follows by four columns more.

    >>> print(hanging("plan\\n  layers.{i}.weight [x y] -> h.{i}.weight [y x]", 26))
    plan
      layers.{i}.weight [x y]
          -> h.{i}.weight
          [y x]

    A help and the lines of a fenced block stay as they are, so that they can be copied.
    """
    lines: list[str] = []
    fenced = False
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        fenced ^= line.startswith("```")
        if fenced or len(line) <= width or line.lstrip(" =").startswith("help: "):
            lines.append(line)
        else:
            lines += wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def bar(share: float, columns: int = 10) -> str:
    """Return a bar of eighths of a column; a share that is not zero shows at least one eighth.

    >>> bar(0.5, 4), bar(0.3, 4), bar(0.001, 4), bar(0.0, 4)
    ('██', '█▏', '▏', '')
    """
    eighths = max(min(1, math.ceil(share)), math.floor(share * columns * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def cut(text: str, width: int) -> str:
    """The text on one line of `width` columns, `…` where it was cut.

    >>> cut("abcdefgh", 5), cut("one\\ntwo", 20)
    ('abcd…', 'one two')
    """
    text = " ".join(text.split("\n"))
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def shown_numbers(n: int) -> str:
    """So many elements, for people.

    >>> shown_numbers(1), shown_numbers(72), shown_numbers(22_713_216), shown_numbers(671_026_404_352)
    ('1 number', '72 numbers', '22.7 M numbers', '671.0 B numbers')
    """
    if n < 1000:
        return counted(n, "number")
    size: float = n
    for unit in ("k", "M", "B", "T"):
        size /= 1000
        if size < 999.95 or unit == "T":
            break
    return f"{size:.1f} {unit} numbers"
