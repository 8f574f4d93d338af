"""The fields of a protobuf message, which are passed over or entered where they are stored.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .cursor import Damaged, HeaderCursor

__all__ = ["LENGTH", "VARINT", "MessageField", "fields_of", "text_of", "varint"]

VARINT, LENGTH = 0, 2
_EIGHT, _FOUR = 1, 5
_LONGEST = 1 << 16  # bytes of a text


class MessageField(NamedTuple):
    """A field of a message: its number, how it is encoded, and its value, or where its bytes are."""

    number: int
    wire: int
    value: int
    nbytes: int


def fields_of(cursor: HeaderCursor, start: int, stop: int) -> Iterator[MessageField]:
    """Yield the fields of the message at `[start, stop)`; the caller may move the cursor meanwhile.

    Raises:
        Damaged: a field reaches past the end, or is of an unknown kind.
    """
    cursor.at = start
    while cursor.at < stop:
        tag = varint(cursor)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, nbytes = varint(cursor), 0
        elif wire in (_EIGHT, _FOUR):
            nbytes = 8 if wire == _EIGHT else 4
            value = cursor.skip(nbytes)
        elif wire == LENGTH:
            nbytes = varint(cursor)
            value = cursor.skip(nbytes)
        else:
            raise Damaged(f"a field is of the unknown kind {wire}")
        after = cursor.at
        if after > stop or number == 0:
            raise Damaged("a field reaches past the end of its message")
        yield MessageField(number, wire, value, nbytes)
        cursor.at = after


def varint(cursor: HeaderCursor) -> int:
    """Return the number of variable length at the cursor, unsigned."""
    value = shift = 0
    while True:
        byte = cursor.take(1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
        shift += 7
        if shift > 63:
            raise Damaged("a number has more than 64 bits")


def text_of(cursor: HeaderCursor, part: MessageField) -> str:
    """Return the text that a field holds.

    Raises:
        Damaged: it is too long, not a text, or not UTF-8.
    """
    if part.wire != LENGTH or part.nbytes > _LONGEST:
        raise Damaged(f"a name has {part.nbytes:,} bytes" if part.wire == LENGTH else "a name is a number")
    cursor.at = part.value
    return cursor.text(part.nbytes)
