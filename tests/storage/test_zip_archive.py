"""A zip file's parts cover the file: what one writer makes opens, and what two make together does not."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import save as dcp_save

import ckptsurgery as cs
from ckptsurgery.errors import CheckpointError

A, B = {"a": torch.arange(5.0), "n": torch.zeros(0)}, {"b": torch.ones(70)}


def written(save: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


FIRST, SECOND = (written(lambda f, tree=tree: torch.save(tree, f)) for tree in (A, B))


class Unseekable(io.RawIOBase):
    """A stream like a pipe: Python's zipfile writes data descriptors into it."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        self.data += bytes(data)  # type: ignore[call-overload]
        return len(bytes(data))  # type: ignore[call-overload]


def repacked(raw: bytes, target: object, wide: bool = False) -> None:
    """The same records, as Python's zipfile writes them."""
    with zipfile.ZipFile(io.BytesIO(raw)) as source, zipfile.ZipFile(target, "w") as new:  # type: ignore[call-overload]
        for info in source.infolist():
            with new.open(info.filename, "w", force_zip64=wide) as record:
                record.write(source.read(info))


def streamed(raw: bytes) -> bytes:
    stream = Unseekable()
    repacked(raw, stream)
    return stream.data


def without_signatures(raw: bytes) -> bytes:
    """Data descriptors of 12 bytes, which the format allows too."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        infos, start = archive.infolist(), archive.start_dir
    made, moved = b"", {}
    for info, end in zip(infos, [i.header_offset for i in infos[1:]] + [start]):
        moved[info.header_offset] = len(made)
        part = raw[info.header_offset : end]
        made += part[:-16] + part[-12:] if part[-16:-12] == b"PK\7\x08" else part
    directory, at = bytearray(raw[start:]), 0
    for _ in infos:
        name, extra, comment = struct.unpack_from("<3H", directory, at + 28)
        offset = moved[struct.unpack_from("<I", directory, at + 42)[0]]
        struct.pack_into("<I", directory, at + 42, offset)
        at += 46 + name + extra + comment
    struct.pack_into("<I", directory, at + 16, len(made))
    return made + bytes(directory)


def unchecked() -> bytes:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return written(lambda f: torch.save(A, f))
    finally:
        torch.serialization.set_crc32_options(before)


def aligned(to: int) -> bytes:
    from torch.utils.serialization import config

    before, config.save.storage_alignment = config.save.storage_alignment, to
    try:
        return written(lambda f: torch.save(A, f))
    finally:
        config.save.storage_alignment = before


def in_a_file(folder: Path) -> bytes:
    torch.save(A, folder / "named.pt")
    return (folder / "named.pt").read_bytes()


def by_this_library(folder: Path) -> bytes:
    cs.save(A, folder / "ours.pt")
    return (folder / "ours.pt").read_bytes()


def repacked_in_a_file(wide: bool) -> bytes:
    return written(lambda f: repacked(FIRST, f, wide))


GENUINE: dict[str, Callable[[Path], bytes]] = {
    "torch.save into memory": lambda folder: FIRST,
    "torch.save into a file": in_a_file,
    "torch.save without checksums": lambda folder: unchecked(),
    "torch.save with storages at pages": lambda folder: aligned(4096),
    "torch.save with storages at 8 bytes": lambda folder: aligned(8),
    "this library": by_this_library,
    "Python's zipfile": lambda folder: repacked_in_a_file(False),
    "Python's zipfile with zip64 fields": lambda folder: repacked_in_a_file(True),
    "Python's zipfile into a pipe": lambda folder: streamed(FIRST),
    "descriptors without a signature": lambda folder: without_signatures(streamed(FIRST)),
}


@pytest.mark.parametrize("how", GENUINE)
def test_what_one_writer_made_opens_with_its_values(how: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(GENUINE[how](tmp_path))
    with cs.open(path) as ckpt:
        assert list(ckpt) == ["a", "n"]
        assert torch.equal(ckpt["a"].load(), A["a"])


def hole(raw: bytes, filling: bytes, number: int = 2) -> bytes:
    """An archive with bytes between two of its records, and its directory corrected for that."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        infos, start = archive.infolist(), archive.start_dir
    cut = infos[number].header_offset if number < len(infos) else start
    directory, at = bytearray(raw[start:]), 0
    for info in infos:
        name, extra, comment = struct.unpack_from("<3H", directory, at + 28)
        if info.header_offset >= cut:
            struct.pack_into("<I", directory, at + 42, info.header_offset + len(filling))
        at += 46 + name + extra + comment
    place = start + len(filling)
    if directory[at : at + 4] == b"PK\6\6":
        struct.pack_into("<Q", directory, at + 48, place)
        struct.pack_into("<Q", directory, at + 56 + 8, place + at)
        at += 76
    struct.pack_into("<I", directory, at + 16, place)
    return raw[:cut] + filling + raw[cut:start] + bytes(directory)


def codes(path: Path, raw: bytes) -> list[str]:
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        cs.open(path)
    assert all(d.help and d.place for d in caught.value.diagnostics)
    return [d.code for d in caught.value.diagnostics]


COMPOSED = {
    "two archives": (FIRST + SECOND, "several-archives"),
    "an archive twice": (FIRST + FIRST, "several-archives"),
    "three archives": (FIRST + SECOND + FIRST, "several-archives"),
    "noise behind": (FIRST + b"\1" * 99, "trailing-bytes"),
    "a byte behind": (FIRST + b"\0", "trailing-bytes"),
    "noise in front": (b"noise" + FIRST, "text-file"),
    "an archive in a hole": (hole(FIRST, SECOND), "unclaimed-bytes"),
    "zeros in a hole": (hole(FIRST, bytes(64)), "unclaimed-bytes"),
    "a byte in front of the directory": (hole(FIRST, b"\0", 10**6), "unclaimed-bytes"),
    "bytes like a descriptor in a hole": (hole(streamed(FIRST), b"PK\7\x08" + bytes(12)), "unclaimed-bytes"),
    "an archive in front of all records": (hole(repacked_in_a_file(False), SECOND, 0), "unclaimed-bytes"),
}


@pytest.mark.parametrize("how", COMPOSED)
def test_what_belongs_to_no_record_is_refused_by_name(how: str, tmp_path: Path) -> None:
    raw, code = COMPOSED[how]
    if code == "text-file":
        assert codes(tmp_path / "x.pt", raw) in (["unknown-format"], ["text-file"])
    else:
        assert codes(tmp_path / "x.pt", raw) == [code]


@pytest.mark.parametrize("before", [FIRST, FIRST + SECOND, SECOND])
def test_the_bytes_in_front_of_an_archive_are_counted(before: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(before + FIRST)
    with pytest.raises(CheckpointError, match=rf"\b{len(before):,} bytes"):
        cs.open(tmp_path / "x.pt")


parts = st.sampled_from([FIRST, SECOND, streamed(FIRST), b"\0" * 16, b"PK\7\x08", b"PK\5\6" + bytes(18), b"noise"])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_composition_opens_as_what_it_is_or_not_at_all(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("zips") / "x.pt"
    base = data.draw(st.sampled_from([FIRST, SECOND, streamed(FIRST)]))
    front, behind = data.draw(st.lists(parts, max_size=2)), data.draw(st.lists(parts, max_size=2))
    filling = data.draw(st.none() | parts)
    inner = base if filling is None else hole(base, filling, data.draw(st.integers(0, 9)))
    raw = b"".join([*front, inner, *behind])
    path.write_bytes(raw)
    try:
        with cs.open(path) as ckpt:
            found = {key: ckpt[key].load() for key in ckpt}
    except CheckpointError:
        assert raw != base
        return
    assert raw == base
    right = B if base is SECOND else A
    assert found.keys() == right.keys()
    assert all(torch.equal(found[key], right[key]) for key in right)


def test_a_count_of_records_that_is_wrong_is_refused(tmp_path: Path) -> None:
    raw = bytearray(repacked_in_a_file(False))
    end = raw.rindex(b"PK\5\6")
    struct.pack_into("<HH", raw, end + 8, 1, 1)
    assert codes(tmp_path / "x.pt", bytes(raw)) == ["damaged-zip"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_of_distributed_checkpoints_are_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    state = {"x": torch.arange(4.0), "y": torch.ones(3)}
    dcp_save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (file,) = (tmp_path / "dcp").glob("*.distcp")
    with pytest.raises(CheckpointError) as caught:
        cs.open(file)
    (problem,) = caught.value.diagnostics
    assert problem.code == "several-archives"
    assert "open the folder that holds them" in str(problem.help)
    with cs.open(tmp_path / "dcp") as ckpt:
        assert all(torch.equal(ckpt[key].load(), state[key]) for key in state)


@pytest.mark.parametrize("legacy", [True, False], ids=["torch.save", "pickle.dump"])
def test_a_second_object_behind_the_first_is_not_left_out(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        for tree in (A, B):
            if legacy:
                torch.save(tree, file, _use_new_zipfile_serialization=False)
            else:
                pickle.dump({key: value.numpy() for key, value in tree.items()}, file)
    with pytest.raises(CheckpointError) as caught:
        cs.open(path)
    assert [d.code for d in caught.value.diagnostics] == ["trailing-bytes"]
