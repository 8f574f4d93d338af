"""HDF5's superblock and object headers: what messages an object of the file has.

Source: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html (HDF5 File Format Specification 3.0; the
sections that are named below). A part of it is read: what h5py and Keras write. Whatever else there is has a name in an
error, and no pointer of the file is followed twice on one way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .cursor import Damaged, HeaderCursor
from .format import OpenedSource

__all__ = ["SIGNATURE", "Hdf5File", "Message", "is_hdf5", "superblock_at"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MESSAGES = 1 << 16  # of an object
_CONTINUATION = 0x10
_STARTS = (0, 512, 1024, 2048, 4096, 8192)  # where a superblock may be, behind a block of the user's


class Message(NamedTuple):
    """A header message: its type, whether it is stored elsewhere, where its data begin, and their length."""

    type: int
    is_shared: bool
    at: int
    nbytes: int


def is_hdf5(head: bytes) -> bool:
    """Return whether a file begins as HDF5 does.

    >>> is_hdf5(bytes([137]) + b"HDF" + bytes([13, 10, 26, 10, 0])), is_hdf5(b"HDF")
    (True, False)
    """
    return superblock_at(head) is not None


def superblock_at(head: bytes) -> int | None:
    """Return where the superblock begins, as far as a file's first bytes show."""
    return next((at for at in _STARTS if head[at : at + 8] == SIGNATURE), None)


@dataclass(slots=True)
class Hdf5File:
    """What the superblock says of a file, and the reading of what it leads to.

    Args:
        opened: the file.
        base: added to each address.
        root: address of the root group's object header.
        end: the first byte behind everything; 0 where it is not known.
        offsets: bytes of an address.
        lengths: bytes of a length.
    """

    opened: OpenedSource
    base: int = 0
    root: int = 0
    end: int = 0
    offsets: int = 8
    lengths: int = 8

    @classmethod
    def of(cls, opened: OpenedSource) -> Hdf5File:
        """Read the superblock (section II).

        Raises:
            Damaged: it makes no sense, or is of a version that is not known.
        """
        start = superblock_at(opened.head) or 0
        cursor = HeaderCursor(opened, start + len(SIGNATURE))
        version = cursor.number("B")
        found = cls(opened)
        if version in (0, 1):
            cursor.skip(4)
            found.offsets, found.lengths = cursor.take(2)
            cursor.skip(1 + 4 + 4 + (4 if version else 0))
            found._check_widths()
            found.base = found.number(cursor, found.offsets)
            cursor.skip(found.offsets)  # free space
            found.end = found.number(cursor, found.offsets)
            cursor.skip(2 * found.offsets)  # driver, the name of the root group
            found.root = found.number(cursor, found.offsets)
        elif version in (2, 3):
            found.offsets, found.lengths = cursor.take(2)
            found._check_widths()
            cursor.skip(1)
            found.base = found.number(cursor, found.offsets)
            cursor.skip(found.offsets)  # an extension of the superblock
            found.end = found.number(cursor, found.offsets)
            found.root = found.number(cursor, found.offsets)
        else:
            raise Damaged(f"its superblock is of version {version}")
        return found

    def _check_widths(self) -> None:
        if self.offsets not in (2, 4, 8) or self.lengths not in (2, 4, 8):
            raise Damaged("its addresses are of an unknown width")

    @property
    def nowhere(self) -> int:
        """The address of what does not exist."""
        return (1 << 8 * self.offsets) - 1

    def at(self, address: int) -> HeaderCursor:
        """Return a cursor at an address."""
        place = self.base + address
        if not 0 <= place < self.opened.size:
            raise Damaged(f"an address leads to byte {place:,}, outside of the file")
        return HeaderCursor(self.opened, place)

    def number(self, cursor: HeaderCursor, nbytes: int) -> int:
        """Return an unsigned number of any width."""
        return int.from_bytes(cursor.take(nbytes), "little")

    def address(self, cursor: HeaderCursor) -> int:
        """Return an address."""
        return self.number(cursor, self.offsets)

    def length(self, cursor: HeaderCursor) -> int:
        """Return a length."""
        return self.number(cursor, self.lengths)

    def messages(self, address: int) -> list[Message]:
        """Return the header messages of an object (section IV.A).

        Raises:
            Damaged: there is no object, or its header makes no sense.
        """
        cursor = self.at(address)
        mark = cursor.take(4)
        cursor.at -= 4
        found = list(self._new_messages(cursor) if mark == b"OHDR" else self._old_messages(cursor))
        if len(found) > _MESSAGES:
            raise Damaged(f"an object has {len(found):,} header messages")
        return found

    def _old_messages(self, cursor: HeaderCursor) -> Iterator[Message]:
        """The messages of a header of version 1."""
        if cursor.number("B") != 1:
            raise Damaged(f"there is no object at byte {cursor.at - 1:,}")
        cursor.skip(1)
        left = cursor.number("<H")
        cursor.skip(4)
        nbytes = cursor.number("<I")
        cursor.skip(4)
        blocks, seen = [(cursor.at, nbytes)], set[int]()
        while blocks:
            start, nbytes = blocks.pop(0)
            if start in seen or len(seen) > _MESSAGES:
                raise Damaged("an object's header goes on where it was before")
            seen.add(start)
            cursor.at, stop = start, start + nbytes
            while left > 0 and cursor.at + 8 <= stop:
                kind, size, flags = cursor.number("<H"), cursor.number("<H"), cursor.number("B")
                cursor.skip(3)
                message = Message(kind, bool(flags & 2), cursor.skip(size), size)
                left -= 1
                if kind == _CONTINUATION:
                    blocks.append(self._continued(message))
                else:
                    yield message

    def _new_messages(self, cursor: HeaderCursor) -> Iterator[Message]:
        """The messages of a header of version 2."""
        cursor.skip(4)
        if cursor.number("B") != 2:
            raise Damaged("an object's header is of an unknown version")
        flags = cursor.number("B")
        cursor.skip((16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0))
        nbytes = self.number(cursor, 1 << (flags & 3))
        extra = 2 if flags & 4 else 0
        blocks, seen = [(cursor.at, nbytes)], set[int]()
        while blocks:
            start, nbytes = blocks.pop(0)
            if start in seen or len(seen) > _MESSAGES:
                raise Damaged("an object's header goes on where it was before")
            cursor.at, stop = start, start + nbytes
            if seen:
                if cursor.take(4) != b"OCHK":
                    raise Damaged("a part of an object's header is missing")
                stop -= 4  # its checksum
            seen.add(start)
            while cursor.at + 4 + extra <= stop:
                kind, size, bits = cursor.number("B"), cursor.number("<H"), cursor.number("B")
                cursor.skip(extra)
                message = Message(kind, bool(bits & 2), cursor.skip(size), size)
                if kind == _CONTINUATION:
                    blocks.append(self._continued(message))
                else:
                    yield message

    def _continued(self, message: Message) -> tuple[int, int]:
        cursor = HeaderCursor(self.opened, message.at, message.at + message.nbytes)
        address, nbytes = self.address(cursor), self.length(cursor)
        return self.at(address).at, nbytes
