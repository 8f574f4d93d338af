"""A zip file, read strictly: its parts must cover the file from its first byte to its last.

A zip file is read from its end, so bytes that belong to no record pass unnoticed: the first of two archives that are
written one after another, or an older copy of a record between two others. Torch's own reader refuses some of them and
passes over others. Here each byte is accounted for: local headers, data, data descriptors, directory, end records.
Padding belongs to a record when it lies in the local header's extra field, which is where torch aligns its data.
"""

from __future__ import annotations

import os
import struct
import zipfile
from typing import BinaryIO, NamedTuple

from ...errors import CheckpointError, Diagnostic
from ..sources.byte_source import read_at
from .zip_records import stays_inside

__all__ = ["Record", "ZipArchive", "refused"]

_LOCAL = struct.Struct("<4s5H3I2H")
_END, _LOCATOR, _END64 = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
_DESCRIPTORS = {12: struct.Struct("<3I"), 16: struct.Struct("<4x3I"), 20: struct.Struct("<I2Q"),
                24: struct.Struct("<4xI2Q")}  # fmt: skip
_ENCRYPTED, _HAS_DESCRIPTOR, _UTF8 = 1, 8, 0x800
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_LONGEST_DESCRIPTOR = 24
_TAIL = 1 << 10  # bytes at the end of a file that hold its end records, unless a long comment follows
_AGAIN = "copy or download it again, or have it written again by torch.save"
_MANY = (
    "each archive is a file of its own: cut them apart. Files of torch.distributed.checkpoint (*.distcp) are read "
    "together: open the folder that holds them"
)


class Record(NamedTuple):
    """One file of the archive.

    Args:
        offset: of its bytes, as they are in the archive.
        nbytes: how many bytes it has once it is unpacked.
        stored: whether they are stored uncompressed.
        packed: how many bytes it has in the archive.
        deflated: whether they are deflated.
    """

    name: str
    offset: int
    nbytes: int
    stored: bool
    packed: int = 0
    deflated: bool = False


class _End(NamedTuple):
    """What the end records declare."""

    directory: int  # offset of the directory
    nbytes: int  # its length
    records: int
    start: int  # where the end records themselves begin
    left: int  # bytes behind them


def refused(source: str, code: str, why: str, help: str | None = None) -> CheckpointError:
    """The error for an archive that cannot be read or trusted."""
    return CheckpointError(Diagnostic(code, f"{source!r} {why}", place=source, help=help or _AGAIN))


class ZipArchive:
    """The records of one zip file, checked against the local headers and to cover the file.

    Args:
        file: the open file.
        source: its path.

    Raises:
        CheckpointError: it is not a zip file, its parts contradict each other, or bytes belong to no part.
    """

    def __init__(self, file: BinaryIO, source: str) -> None:
        self.source = source
        self.file = file
        self.size = file.seek(0, os.SEEK_END)
        self._fetch([(self.size - _TAIL, _TAIL)])
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
            end = self._end()
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, LookupError, OverflowError) as error:
            why = f"is not a readable zip file: {error}"
            raise refused(source, "damaged-zip", why, "copy or download it again: it may be truncated") from None
        if end.left:
            raise refused(source, "trailing-bytes", f"has {end.left:,} bytes behind the end of its zip archive")
        if end.directory + end.nbytes != end.start:
            raise self._misplaced(end)
        if end.records % (_MAX16 + 1) != len(infos) % (_MAX16 + 1):
            why = f"contradicts itself: {end.records} records are announced, and {len(infos)} listed"
            raise refused(source, "damaged-zip", why)
        self.records = dict.fromkeys((info.filename for info in infos), Record("", 0, 0, False))
        if len(self.records) < len(infos):
            names = [info.filename for info in infos]
            twice = next(name for name in self.records if names.count(name) > 1)
            raise refused(source, "damaged-zip", f"holds {twice!r} twice")
        self._cover(infos, end.directory)

    def _fetch(self, ranges: list[tuple[int, int]]) -> None:
        """Tell a remote file what will be read, so that it comes in few round trips."""
        prefetch = getattr(self.file, "prefetch", None)
        if prefetch is not None:
            prefetch(ranges)

    def _end(self) -> _End:
        """The end records, found as every reader finds them: the last signature that can be one."""
        tail = self._read(self.size - _END.size, self.size)
        at = 0
        if not (tail.startswith(b"PK\5\6") and tail.endswith(b"\0\0")):
            tail = self._read(self.size - _END.size - _MAX16, self.size)
            at = tail.rfind(b"PK\5\6")
        _, _, _, _, count, nbytes, directory, comment = _END.unpack_from(tail, at)
        start = self.size - len(tail) + at
        left = self.size - start - _END.size - comment
        wide = self._read(max(0, start - _LOCATOR.size - _END64.size), start)
        if wide[_END64.size :].startswith(b"PK\6\7"):
            _, _, place, _ = _LOCATOR.unpack_from(wide, _END64.size)
            sign, size, *_, count, nbytes, directory = _END64.unpack_from(wide)
            start -= len(wide)
            if sign != b"PK\6\6" or size != _END64.size - 12:
                raise ValueError("its end records contradict each other")
            if place != start and directory + nbytes == start:
                raise ValueError("its end records contradict each other")
        return _End(directory, nbytes, count, start, left)

    def _misplaced(self, end: _End) -> CheckpointError:
        """The error for a directory that is not where the end records place it."""
        behind = end.start - end.directory - end.nbytes
        if behind < 0:
            return refused(self.source, "damaged-zip", "contradicts itself: its directory would reach past its end")
        if self._read(0, 4) == b"PK\3\4":
            why = f"is more than one zip archive: the last one begins after {behind:,} bytes"
            return refused(self.source, "several-archives", why, _MANY)
        why = f"has {behind:,} bytes in front of its zip archive"
        return refused(self.source, "unclaimed-bytes", why)

    def _cover(self, infos: list[zipfile.ZipInfo], directory: int) -> None:
        """Find each record's data; every byte before the directory must belong to a record."""
        at, before = 0, None
        infos = sorted(infos, key=lambda info: info.header_offset)
        ahead = _LOCAL.size + _LONGEST_DESCRIPTOR
        self._fetch([(i.header_offset - _LONGEST_DESCRIPTOR, ahead + len(i.orig_filename.encode())) for i in infos])
        for info in infos:
            name, start = info.orig_filename, info.header_offset
            if start > directory or info.compress_size > self.size:
                raise refused(self.source, "damaged-zip", f"is truncated: {name!r} reaches past its end")
            # One read for the descriptor of the record before and the header of this one.
            data = self._read(min(at, start), start + _LOCAL.size + len(name.encode()))
            self._check_gap(data[: max(0, start - at)], start - at, before, name)
            self.records[info.filename], at = self._record(info, data[max(0, start - at) :], directory)
            before = info
        self._check_gap(self._read(at, min(directory, at + 24)), directory - at, before, "the directory")

    def _check_gap(self, data: bytes, gap: int, before: zipfile.ZipInfo | None, name: str) -> None:
        """Raise unless nothing, or the data descriptor of the record before, lies between two parts."""
        if gap == 0:
            return
        if gap < 0:
            last = before.filename if before else ""
            raise refused(self.source, "damaged-zip", f"has records that overlap: {last!r} and {name!r}")
        layout = _DESCRIPTORS.get(gap)
        if layout is not None and before is not None:
            signed = gap in (12, 20) or data.startswith(b"PK\7\x08")
            if signed and layout.unpack(data) == (before.CRC, before.compress_size, before.file_size):
                return
        where = f"before {name!r}" if before is None else f"between {before.filename!r} and {name!r}"
        raise refused(self.source, "unclaimed-bytes", f"has {gap:,} bytes {where} that belong to no record")

    def _record(self, info: zipfile.ZipInfo, head: bytes, directory: int) -> tuple[Record, int]:
        """A record, by its local header, and the offset behind its data."""
        name = info.orig_filename
        if not stays_inside(name):
            raise refused(self.source, "damaged-zip", f"holds a record outside of its folder: {name!r}")
        if info.flag_bits & _ENCRYPTED:
            raise refused(self.source, "damaged-zip", f"is encrypted ({name!r})")
        if len(head) < _LOCAL.size:
            raise refused(self.source, "damaged-zip", f"is truncated before {name!r}")
        sign, _, flags, method, _, _, crc, packed, size, name_size, extra_size = _LOCAL.unpack_from(head)
        written = head[_LOCAL.size : _LOCAL.size + name_size]
        encoding = "utf-8" if flags & _UTF8 else "cp437"
        same = sign == b"PK\3\4" and method == info.compress_type and written.decode(encoding, "replace") == name
        if same and not flags & _HAS_DESCRIPTOR:
            sizes = size in (info.file_size, _MAX32) and packed in (info.compress_size, _MAX32)
            same = crc == info.CRC and sizes
        if not same:
            raise refused(self.source, "damaged-zip", f"contradicts itself: header and directory differ for {name!r}")
        offset = info.header_offset + _LOCAL.size + name_size + extra_size
        if offset + info.compress_size > directory:
            raise refused(self.source, "damaged-zip", f"is truncated: {name!r} reaches past its end")
        stored = info.compress_type == zipfile.ZIP_STORED
        if stored and info.compress_size != info.file_size:
            raise refused(self.source, "damaged-zip", f"contradicts itself: two sizes for {name!r}")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        end = offset + info.compress_size
        return Record(name, offset, info.file_size, stored, info.compress_size, deflated), end

    def _read(self, start: int, end: int) -> bytes:
        start = max(0, start)
        return read_at(self.file, start, end - start) if end > start else b""

    def stored(self, name: str, remedy: str | None = None) -> Record:
        """The record `name`, which has to exist and to be uncompressed.

        Raises:
            CheckpointError: it does not exist, or is compressed; `remedy` says what to do then.
        """
        record = self.records.get(name)
        if record is None:
            raise refused(self.source, "damaged-zip", f"holds no record {name!r}")
        if not record.stored:
            raise refused(self.source, "compressed-records", f"has compressed records ({name!r})", remedy)
        return record

    def bytes_of(self, name: str, at_most: int = 1 << 20, remedy: str | None = None) -> bytes:
        """The bytes of a small record."""
        record = self.stored(name, remedy)
        if record.nbytes > at_most:
            raise refused(self.source, "damaged-zip", f"has an absurdly large record {name!r}")
        return read_at(self.file, record.offset, record.nbytes)
