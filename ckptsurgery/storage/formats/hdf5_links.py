"""HDF5's groups: the names in them and where the objects are, in each of the three ways in which links are stored.

Old groups have a B-tree of symbol tables and a heap of names (sections III.A.1, III.B, III.D). New ones keep a few
links as header messages (IV.A.2.g), and many in a fractal heap (III.G) whose objects a second kind of B-tree lists
(III.A.2). Soft links lead to objects that are listed anyway; links into other files are not followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .cursor import Damaged, HeaderCursor
from .hdf5_objects import Hdf5File, Message

__all__ = ["GroupLink", "links_of"]

_LINK_INFO, _LINK, _SYMBOLS = 0x02, 0x06, 0x11
_HARD, _SOFT = 0, 1
_NODES = 1 << 18  # of a tree
_LONGEST = 1 << 16  # bytes of a name


class GroupLink(NamedTuple):
    """A name in a group.

    Args:
        name: the name.
        address: of the object's header; None where the link leads into another file.
        order: when it was made among the group's links; 0 where that is not kept.
    """

    name: str
    address: int | None
    order: int = 0


def links_of(file: Hdf5File, messages: list[Message]) -> list[GroupLink] | None:
    """Return the links of a group, in the order in which they were made or else by name; None for other objects.

    Raises:
        Damaged: a tree or a heap makes no sense.
    """
    found: list[GroupLink] = []
    is_group = False
    for message in messages:
        cursor = HeaderCursor(file.opened, message.at, message.at + message.nbytes)
        if message.type == _SYMBOLS:
            is_group = True
            found += _old_links(file, file.address(cursor), file.address(cursor))
        elif message.type == _LINK:
            is_group = True
            found += _link(file, cursor)
        elif message.type == _LINK_INFO:
            is_group = True
            found += _many_links(file, cursor)
    if not is_group:
        return None
    return sorted(found, key=lambda link: (link.order, link.name))


def _old_links(file: Hdf5File, tree: int, heap: int) -> Iterator[GroupLink]:
    cursor = file.at(heap)
    if cursor.take(4) != b"HEAP":
        raise Damaged("a group has no heap of names")
    cursor.skip(4)
    nbytes = file.length(cursor)
    file.length(cursor)
    names = file.at(file.address(cursor)).at
    waiting, seen = [tree], set[int]()
    while waiting:
        address = waiting.pop()
        if address in seen or len(seen) > _NODES:
            raise Damaged("the tree of a group leads back to itself")
        seen.add(address)
        cursor = file.at(address)
        mark = cursor.take(4)
        if mark == b"TREE":
            if cursor.number("B") != 0:
                raise Damaged("the tree of a group is of another kind")
            cursor.skip(1)
            count = cursor.number("<H")
            cursor.skip(2 * file.offsets)
            for _ in range(count):
                file.length(cursor)
                waiting.append(file.address(cursor))
        elif mark == b"SNOD":
            cursor.skip(2)
            for _ in range(cursor.number("<H")):
                start, where = file.address(cursor), file.address(cursor)
                kind = cursor.number("<I")
                cursor.skip(20)
                if kind != 2:  # a soft link
                    yield GroupLink(_name_at(file, names, start, nbytes), where)
        else:
            raise Damaged("the tree of a group has a part that is none")


def _name_at(file: Hdf5File, heap: int, start: int, nbytes: int) -> str:
    """The name that begins at a byte of a heap, and ends before a zero."""
    if start >= nbytes:
        raise Damaged("a name lies outside of its heap")
    cursor = HeaderCursor(file.opened, heap + start, min(heap + nbytes, file.opened.size))
    found = bytearray()
    while cursor.left and len(found) <= _LONGEST:
        block = cursor.take(min(64, cursor.left))
        end = block.find(0)
        found += block if end < 0 else block[:end]
        if end >= 0:
            return _text(bytes(found))
    raise Damaged("a name has no end")


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"a name is not UTF-8: {error.reason}") from None


def _link(file: Hdf5File, cursor: HeaderCursor) -> Iterator[GroupLink]:
    """A link message."""
    if cursor.number("B") != 1:
        raise Damaged("a link is of an unknown version")
    flags = cursor.number("B")
    kind = cursor.number("B") if flags & 8 else _HARD
    order = cursor.number("<Q") if flags & 4 else 0
    if flags & 16:
        cursor.skip(1)
    nbytes = file.number(cursor, 1 << (flags & 3))
    if nbytes > _LONGEST:
        raise Damaged(f"a name has {nbytes:,} bytes")
    name = _text(cursor.take(nbytes))
    if kind == _HARD:
        yield GroupLink(name, file.address(cursor), order)
    elif kind != _SOFT:
        yield GroupLink(name, None, order)


def _many_links(file: Hdf5File, cursor: HeaderCursor) -> Iterator[GroupLink]:
    """The links that a link info message leads to."""
    cursor.skip(1)
    if cursor.number("B") & 1:
        cursor.skip(8)
    heap, tree = file.address(cursor), file.address(cursor)
    if heap == file.nowhere or tree == file.nowhere:
        return
    objects = _Heap.at(file, heap)
    for record in _records(file, tree):
        yield from _link(file, objects.object(record[4:] if len(record) == 4 + objects.id_bytes else record[8:]))


def _width(limit: int) -> int:
    """Bytes of a number up to a limit, as HDF5 reserves them."""
    return (max(limit, 1).bit_length() - 1) // 8 + 1


def _records(file: Hdf5File, address: int) -> Iterator[bytes]:
    """The records of a B-tree of version 2, in no order."""
    cursor = file.at(address)
    if cursor.take(4) != b"BTHD":
        raise Damaged("a tree of links is none")
    cursor.skip(2)
    node_size, size, depth = cursor.number("<I"), cursor.number("<H"), cursor.number("<H")
    cursor.skip(2)
    root, count = file.address(cursor), cursor.number("<H")
    if root == file.nowhere or not count:
        return
    if not 0 < size <= 64 or node_size < 64 or depth > 16:
        raise Damaged("a tree of links makes no sense")
    most = [(node_size - 10) // size]
    below = [most[0]]  # the most records of a whole tree of so many levels
    pointers = [0]
    for level in range(1, depth + 1):
        pointers.append(file.offsets + _width(most[0]) + (_width(below[level - 1]) if level > 1 else 0))
        most.append((node_size - 10 - pointers[level]) // (size + pointers[level]))
        below.append((most[level] + 1) * below[level - 1] + most[level])
    waiting, seen = [(root, count, depth)], set[int]()
    while waiting:
        address, count, level = waiting.pop()
        if address in seen or len(seen) > _NODES:
            raise Damaged("a tree of links leads back to itself")
        seen.add(address)
        cursor = file.at(address)
        if cursor.take(4) != (b"BTIN" if level else b"BTLF") or count > most[level]:
            raise Damaged("a tree of links has a part that is none")
        cursor.skip(2)
        for _ in range(count):
            yield cursor.take(size)
        for _ in range(count + 1 if level else 0):
            child, number = file.address(cursor), file.number(cursor, _width(most[0]))
            if level > 1:
                cursor.skip(_width(below[level - 1]))
            waiting.append((child, number, level - 1))


@dataclass(slots=True)
class _Heap:
    """A fractal heap: objects of any length in blocks that grow in powers of two."""

    file: Hdf5File
    id_bytes: int
    width: int
    first: int
    largest: int
    offset_bytes: int
    length_bytes: int
    root: int
    rows: int

    @classmethod
    def at(cls, file: Hdf5File, address: int) -> _Heap:
        cursor = file.at(address)
        if cursor.take(4) != b"FRHP":
            raise Damaged("a heap of links is none")
        cursor.skip(1)
        id_bytes, filters = cursor.number("<H"), cursor.number("<H")
        cursor.skip(1)
        largest_object = cursor.number("<I")
        cursor.skip(10 * file.lengths + 2 * file.offsets)
        width = cursor.number("<H")
        first, largest = file.length(cursor), file.length(cursor)
        bits = cursor.number("<H")
        cursor.skip(2)
        root, rows = file.address(cursor), cursor.number("<H")
        whole = all(n and n & (n - 1) == 0 for n in (width, first, largest))
        if filters or not whole or largest < first or bits > 64:
            raise Damaged("a heap of links is compressed, or makes no sense")
        block_bytes = (largest.bit_length() - 1 + 7) // 8
        return cls(
            file, id_bytes, width, first, largest, (bits + 7) // 8, min(block_bytes, _width(largest_object)), root, rows
        )

    def object(self, identity: bytes) -> HeaderCursor:
        """A cursor over the object of a heap ID."""
        if len(identity) < 1 + self.offset_bytes + self.length_bytes or identity[0] >> 4 & 3:
            raise Damaged("a link is stored in a way that is not known here")
        start = int.from_bytes(identity[1 : 1 + self.offset_bytes], "little")
        nbytes = int.from_bytes(identity[1 + self.offset_bytes :][: self.length_bytes], "little")
        block, begins = self._block(start)
        place = self.file.at(block).at + start - begins
        return HeaderCursor(self.file.opened, place, min(place + nbytes, self.file.opened.size))

    def _block(self, start: int) -> tuple[int, int]:
        """The address of the direct block that holds an offset, and the offset at which it begins."""
        address, rows, begins = self.root, self.rows, 0
        direct = self.largest.bit_length() - self.first.bit_length() + 2
        for _ in range(16):
            if rows == 0:
                return address, begins
            cursor = self.file.at(address)
            if cursor.take(4) != b"FHIB":
                raise Damaged("a heap of links has a part that is none")
            cursor.skip(1 + self.file.offsets + self.offset_bytes)
            row, size, at = 0, self.first, begins
            while row < rows and start >= at + self.width * size:
                at += self.width * size
                row += 1
                size = self.first << max(0, row - 1)
            if row >= rows:
                break
            column = (start - at) // size
            cursor.skip((row * self.width + column) * self.file.offsets)
            address, begins = self.file.address(cursor), at + column * size
            # An indirect block of so many bytes has the rows whose blocks add up to them.
            rows = 0 if row < direct else (size // (self.first * self.width)).bit_length()
        raise Damaged("a link lies outside of its heap")
