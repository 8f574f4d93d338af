"""Tensors that are archives within a file: found where zipfile finds them, and refused where they are damaged."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.contents import Entry
from ckptsurgery.storage.formats.archived import Archived, locate

W = torch.arange(6.0).reshape(2, 3)
SPEC = cs.TensorSpec((2, 3), "F32")
BEFORE = 100
END, ENTRY = struct.Struct("<4s4H2IH"), struct.Struct("<4s6xH8xII3H8xI")


def saved(value: object) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def records(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return data.getvalue()


def without(name: str, **more: bytes) -> bytes:
    parts = {key: part for key, part in records(saved(W)).items() if not key.endswith(name)}
    return zipped(parts | more)


def found(data: bytes, spec: cs.TensorSpec = SPEC) -> Entry:
    """The entry of an archive that lies behind some other bytes."""
    whole = bytes(BEFORE) + data

    def read(file: str, offset: int, buffer: memoryview) -> None:
        assert file == "x.distcp" and offset + len(buffer) <= len(whole)
        buffer[:] = whole[offset : offset + len(buffer)]

    return locate(Archived(spec, "x.distcp", BEFORE, len(data)), read)


def refused(data: bytes) -> str:
    """What is wrong with an archive, behind its place."""
    with pytest.raises(cs.CheckpointError) as caught:
        found(data)
    (problem,) = caught.value.diagnostics
    assert (problem.code, problem.place) == ("damaged-chunk", "x.distcp")
    start = f"the part of 'x.distcp' at byte {BEFORE} "
    assert problem.headline.startswith(start)
    return problem.headline.removeprefix(start)


def widened(data: bytes, columns: str = "sph") -> bytes:
    """The same archive with sizes and places in the fields for what does not fit into 32 bits."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos, start = archive.infolist(), archive.start_dir
    directory = b""
    for info in infos:
        wide = [("s", info.file_size), ("p", info.compress_size), ("h", info.header_offset)]
        values = [value for column, value in wide if column in columns]
        extra = struct.pack("<HHI", 0x5455, 4, 0x0001_0001)  # another field, which seems to hold one
        extra += struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)
        size, packed, place = (0xFFFFFFFF if column in columns else value for column, value in wide)
        name = info.filename.encode()
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, info.CRC, packed, size, len(name),
                                 len(extra), 0, 0, 0, 0, place) + name + extra  # fmt: skip
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(infos), len(infos), len(directory), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(directory), 1)
    last = END.pack(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:start] + directory + end + locator + last


@pytest.mark.parametrize("columns", ["", "s", "h", "sp", "sph"])
def test_wide_directories_lead_to_the_same_bytes(columns: str) -> None:
    data = saved(W)
    wide = widened(data, columns)
    assert records(wide) == records(data)
    assert found(wide) == found(data)
    start = found(data).offset - BEFORE
    assert data[start : start + 24] == W.numpy().tobytes()


def test_tensors_keep_their_strides_and_the_order_of_their_bytes() -> None:
    assert found(saved(W.t()), cs.TensorSpec((3, 2), "F32")).strides == (1, 3)
    assert found(saved(W)).big_endian is False
    assert found(without("byteorder", **{"archive/byteorder": b"big"})).big_endian is True


def cut(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def first_entry(data: bytes) -> int:
    return END.unpack(data[-22:])[6]


def test_values_that_are_not_one_plain_tensor_are_refused() -> None:
    assert refused(saved([W])) == "holds no plain tensor"
    assert refused(saved(W.double())) == "holds F64 [2, 3]; the metadata says F32 [2, 3]"
    short = without("data/0", **{"archive/data/0": bytes(20)})
    assert refused(short).startswith("holds a tensor that cannot be read: F32 [2, 3] at element 0 with strides")


def test_records_that_are_missing_or_too_large_are_refused() -> None:
    assert refused(without("data.pkl")) == "holds no record 'data.pkl'"
    assert refused(without("data/0")) == "holds no record 'data/0'"
    large = zipped({"archive/data.pkl": bytes((16 << 20) + 1)})
    assert refused(large) == "has an absurdly large record 'data.pkl'"


DATA = saved(W)
WIDE = widened(DATA)
DIRECTORY = first_entry(DATA)
COMPRESSED = "its records are compressed, or its directory is damaged"
TORN = [
    ("nothing", b"", "unpack requires"),
    ("cut", DATA[:-1], "it does not end as one does"),
    ("a comment", cut(DATA, len(DATA) - 2, b"\1\0"), "it does not end as one does"),
    ("no wide end", cut(WIDE, len(WIDE) - 98, b"PK\6\0"), "its directory is missing"),
    ("a misplaced wide end", cut(WIDE, len(WIDE) - 58, struct.pack("<Q", len(WIDE))), "its directory is misplaced"),
    ("a misplaced end", cut(DATA, len(DATA) - 6, struct.pack("<I", len(DATA))), "its directory is misplaced"),
    ("a large end", cut(DATA, len(DATA) - 10, struct.pack("<I", (16 << 20) + 1)), "its directory is misplaced"),
    ("compressed", zipped(records(DATA), zipfile.ZIP_DEFLATED), COMPRESSED),
    ("no mark", cut(DATA, DIRECTORY, b"PK\1\3"), COMPRESSED),
    ("a long note", cut(DATA, DIRECTORY + 32, b"\xff\xff"), COMPRESSED),
    ("two sizes", cut(DATA, DIRECTORY + 20, b"\1\0\0\0"), "the record 'data.pkl' is misplaced"),
    ("far", cut(DATA, DIRECTORY + 42, struct.pack("<I", DIRECTORY)), "the record 'data.pkl' is misplaced"),
    ("not UTF-8", cut(DATA, DIRECTORY + 46, b"\xff"), "'utf-8' codec can't decode"),
    ("more records than it has", cut(DATA, len(DATA) - 12, b"\xfe\xff"), COMPRESSED),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), [case[1:] for case in TORN], ids=[case[0] for case in TORN])
def test_parts_that_are_no_archives_are_refused(data: bytes, words: str) -> None:
    assert refused(data).startswith(f"is no torch archive ({words}")


def test_a_record_that_is_listed_twice_is_refused() -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for name in ("archive/data.pkl", "archive/data.pkl"):
                archive.writestr(name, b"")
    assert refused(data.getvalue()) == "is no torch archive (the record 'data.pkl' is misplaced)"


def test_local_headers_that_make_no_sense_are_refused() -> None:
    assert refused(cut(DATA, 0, b"PK\3\5")) == "has a record 'data.pkl' whose header is misplaced"
    past = cut(DATA, 28, b"\xff\xff")
    assert refused(past) == "has a record 'data.pkl' whose header is misplaced"
