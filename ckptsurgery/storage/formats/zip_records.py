"""The records of a torch zip file, and what stands between and behind them: headers, descriptors, the directory.

Records are stored, their data begin at multiples of 64 bytes, and each is followed by a data descriptor with its
checksum, exactly as torch lays them out: torch computes the offsets of mapped records from that, without reading the
headers. What is the same for very many records is kept in columns.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import chain, repeat

__all__ = ["ALIGNMENT", "Records", "stays_inside"]

ALIGNMENT = 64
"""Bytes that the data of every record begin at a multiple of."""

_MAX32 = 0xFFFFFFFF
_UTF8, _DESCRIPTOR = 0x800, 0x8
_LOCAL = struct.Struct("<4s2xH18xHH")
_NARROW, _WIDE = struct.Struct("<4sIII"), struct.Struct("<4sIQQ")
_ENTRY = struct.Struct("<4s4xH6xIIIHH10xI")
_PADDING = [b"FB" + struct.pack("<H", n) + b"Z" * n for n in range(ALIGNMENT)]
_ENDS = 56 + 20 + 22


def stays_inside(name: str) -> bool:
    """Whether a record of this name is unpacked inside of the folder that the archive goes to.

    >>> [stays_inside(name) for name in ("a/b.npy", "/a.npy", "a/../../b.npy", "..b.npy")]
    [True, False, False, True]
    """
    return not name.startswith(("/", "\\")) and ".." not in name.replace("\\", "/").split("/") and "\0" not in name


class Records:
    """Files of the archive one after another: their names, where headers and data lie, sizes and checksums.

    >>> records = Records()
    >>> records.add(["archive/version", "archive/none"], [2, 0])
    >>> records.headers, records.starts, records.end
    ([0, 82], [64, 128], 128)
    """

    def __init__(self) -> None:
        self.names: list[bytes] = []
        self.headers: list[int] = []
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self.crcs: list[int] = []
        self.end = 0

    def add(self, names: Iterable[str], sizes: Sequence[int], crcs: Iterable[int] | None = None) -> None:
        """Place more of them behind the last; checksums that are not known yet are 0."""
        known, at = len(self.names), self.end
        self.names += map(str.encode, names)
        for name, nbytes in zip(self.names[known:], sizes):
            start, tail = at + 34 + len(name), 16
            if at >= _MAX32 or nbytes >= _MAX32:
                start, tail = start + len(_wide(nbytes, at)), 24
            start = -(-start // ALIGNMENT) * ALIGNMENT
            self.headers.append(at)
            self.starts.append(start)
            at = start + nbytes + tail if nbytes else start
        self.sizes += sizes
        self.crcs += crcs if crcs is not None else [0] * len(sizes)
        self.end = at

    def seam(self, number: int) -> bytes:
        """What lies between the data of the record before and the data of this one: a descriptor and a header."""
        name, at, nbytes = self.names[number], self.headers[number], self.sizes[number]
        wide = _wide(nbytes, at) if at >= _MAX32 or nbytes >= _MAX32 else b""
        padding = _PADDING[self.starts[number] - at - 34 - len(name) - len(wide)]
        header = _LOCAL.pack(b"PK\3\4", _flags(nbytes), len(name), len(wide) + len(padding))
        return b"".join((self.descriptor(number - 1), header, name, wide, padding))

    def descriptor(self, number: int) -> bytes:
        """What follows the data of a record; before the first, and where there are none, that is nothing."""
        nbytes = self.sizes[number] if number >= 0 else 0
        if not nbytes:
            return b""
        layout = _WIDE if nbytes >= _MAX32 or self.headers[number] >= _MAX32 else _NARROW
        return layout.pack(b"PK\x07\x08", self.crcs[number], nbytes, nbytes)

    def directory(self) -> bytes:
        """What follows the last record."""
        sizes, places, extras = self.sizes, self.headers, self._extras()
        flags = map(_flags, sizes)
        if extras:
            sizes, places = ([min(n, _MAX32) for n in column] for column in (sizes, places))
        tails = extras or [b""] * len(sizes)
        lengths = map(len, self.names), map(len, tails)
        packed = map(_ENTRY.pack, repeat(b"PK\1\2"), flags, self.crcs, sizes, sizes, *lengths, places)
        entries = b"".join(chain.from_iterable(zip(packed, self.names, tails)))
        count, nbytes, place = len(self.names), len(entries), self.end
        ends = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, nbytes, place)
        ends += struct.pack("<4sIQI", b"PK\6\7", 0, place + nbytes, 1)
        few = min(count, 0xFFFF)
        ends += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, min(nbytes, _MAX32), min(place, _MAX32), 0)
        return entries + ends

    @property
    def directory_size(self) -> int:
        """Bytes of the directory, which are known before the checksums are."""
        return sum(map(len, self.names)) + sum(map(len, self._extras())) + _ENTRY.size * len(self.names) + _ENDS

    def _extras(self) -> list[bytes]:
        """What the directory says besides of each record, where the file is so large that it says anything."""
        return list(map(_wide, self.sizes, self.headers)) if self.end >= _MAX32 else []


def _flags(nbytes: int) -> int:
    return _UTF8 | _DESCRIPTOR if nbytes else _UTF8


def _wide(nbytes: int, at: int) -> bytes:
    """The field for what does not fit into 32 bits: a size, and where the header lies."""
    sizes = struct.pack("<QQ", nbytes, nbytes) if nbytes >= _MAX32 else b""
    place = struct.pack("<Q", at) if at >= _MAX32 else b""
    return struct.pack("<HH", 1, len(sizes + place)) + sizes + place if sizes or place else b""
