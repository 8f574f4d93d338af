"""HDF5 files that h5py wrote, in every layout and with very many links, and the same files with one byte changed."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch
from foreign import W, other_programs, refused

import ckptsurgery as cs
from ckptsurgery.storage.formats.cursor import Damaged
from ckptsurgery.storage.formats.format import OpenedSource
from ckptsurgery.storage.formats.hdf5_links import links_of
from ckptsurgery.storage.formats.hdf5_objects import SIGNATURE, Hdf5File
from ckptsurgery.storage.sources.byte_source import LocalFile

DATA = other_programs()
RAW = {name: (DATA / f"{name}.h5").read_bytes() for name in ("layouts", "layouts_old", "links", "old")}
FLOATS = W.tobytes()


def edited(name: str, mark: bytes, at: int, new: bytes, number: int = 0) -> bytes:
    """A file whose bytes at an offset from a mark are others."""
    start = [found.start() for found in re.finditer(re.escape(mark), RAW[name])][number] + at
    return RAW[name][:start] + new + RAW[name][start + len(new) :]


def written(folder: Path, data: bytes) -> Path:
    path = folder / "x.h5"
    path.write_bytes(data)
    return path


def tree(number: int) -> bytes:
    """A tree of chunks in the old file, and what follows its head."""
    places = [found.start() for found in re.finditer(b"TREE\1", RAW["layouts_old"])]
    return RAW["layouts_old"][places[number] : places[number] + 104]


READ = {
    "layouts": ["compact", "größe", "one", "one_packed"],
    "layouts_old": ["compact", "größe", "one", "one_larger", "one_packed", "unwritten_chunks"],
}
NOT_READ = {
    "external": "its data are in another file",
    "virtual": "it is put together from other datasets",
    "unwritten": "its elements were never written",
    "unwritten_chunk": "its elements were never written",
    "lzf": "it is compressed by a filter that is not read here (32000)",
}
UNLISTED = "its chunks are listed in a way that is not read here (3)"


@pytest.mark.parametrize("name", READ)
def test_every_layout_is_read_or_named(name: str) -> None:
    with cs.open(DATA / f"{name}.h5") as checkpoint:
        assert sorted(checkpoint) == READ[name]
        for key in checkpoint:
            wanted = torch.zeros(0) if key == "unwritten_chunks" else torch.tensor(W)
            found = checkpoint[key].load()
            assert found.dtype == (torch.float64 if key == "one_larger" else torch.float32)
            assert torch.equal(found, wanted.to(found.dtype)), key
        missing = {key: UNLISTED for key in ("one_larger", "unwritten_chunks") if key not in READ[name]}
        assert checkpoint.unreadable == NOT_READ | missing
        assert repr(checkpoint.extras["nothing"]) == "<h5py.Dataset: floats, []>"
        link = "<h5py.ExternalLink: a link into another file, which is not followed>"
        assert repr(checkpoint.extras["elsewhere"]) == link and "soft" not in checkpoint.extras
        assert checkpoint.config == {"name": "fixed"}


# links


def links(path: Path, group: str) -> list[str]:
    """The names in a group, in order; all of them lead to one object."""
    with OpenedSource(LocalFile.of(str(path), path.stat())) as opened:
        file = Hdf5File.of(opened)
        places = {link.name: link.address for link in links_of(file, file.messages(file.root)) or ()}
        found = links_of(file, file.messages(places[group] or 0)) or []
    assert {link.address for link in found} == {places["w"]}
    return [link.name for link in found]


NAMES = {
    "few": [f"{number * 37 % 60:02}" for number in range(60)],
    "many": [f"{number:04}" for number in range(1200)],
    "long": [f"{number:04}" + "x" * 240 for number in range(2300)],
}


@pytest.mark.parametrize("group", NAMES)
def test_all_names_of_a_group_are_found_in_order(group: str) -> None:
    assert links(DATA / "links.h5", group) == NAMES[group]


def last(mark: bytes) -> int:
    return RAW["links"].count(mark) - 1


LINKS = [
    ("few", edited("links", b"BTHD", 0, b"BTHE"), "a tree of links is none"),
    ("few", edited("links", b"BTHD", 6, b"\x3f\0\0\0"), "a tree of links makes no sense"),
    ("few", edited("links", b"BTHD", 10, b"\0\0"), "a tree of links makes no sense"),
    ("few", edited("links", b"BTHD", 10, b"\x41\0"), "a tree of links makes no sense"),
    ("few", edited("links", b"BTHD", 12, b"\x11\0"), "a tree of links makes no sense"),
    ("few", edited("links", b"FRHP", 0, b"FRHQ"), "a heap of links is none"),
    ("few", edited("links", b"FRHP", 7, b"\1"), "a heap of links is compressed, or makes no sense"),
    ("few", edited("links", b"FRHP", 110, b"\3"), "a heap of links is compressed, or makes no sense"),
    ("few", edited("links", b"BTLF", 11, b"\xff\xff\xff\xff"), "a link lies outside of its heap"),
    ("few", edited("links", b"BTLF", 10, b"\x10"), "a link is stored in a way that is not known here"),
    ("few", edited("links", b"FHIB", 0, b"FHIC", last(b"FHIB")), "a heap of links has a part that is none"),
]


@pytest.mark.parametrize(("group", "data", "words"), LINKS)
def test_links_that_make_no_sense_are_damage(group: str, data: bytes, words: str, tmp_path: Path) -> None:
    for name in NAMES:
        try:
            assert links(written(tmp_path, data), name) == NAMES[name]
        except Damaged as error:
            assert str(error) == words and name == group
            group = ""
    assert group == ""


def test_a_tree_without_records_is_an_empty_group(tmp_path: Path) -> None:
    path = written(tmp_path, edited("links", b"BTHD", 24, b"\0\0"))
    with OpenedSource(LocalFile.of(str(path), path.stat())) as opened:
        file = Hdf5File.of(opened)
        few = next(link for link in links_of(file, file.messages(file.root)) or () if link.name == "few")
        assert links_of(file, file.messages(few.address or 0)) == []


def test_trees_that_lead_back_to_themselves_are_damage(tmp_path: Path) -> None:
    """Each child of each inner node leads back to it."""
    data = bytearray(RAW["links"])
    for found in re.finditer(b"BTIN", RAW["links"]):
        start = found.start()
        for child in re.finditer(b"BTLF", RAW["links"]):
            at = data.find(struct.pack("<Q", child.start()), start, start + 512)
            if at >= 0:
                data[at : at + 8] = struct.pack("<Q", start)
    with pytest.raises(Damaged, match=r"^a tree of links (leads back to itself|has a part that is none)$"):
        links(written(tmp_path, bytes(data)), "many")


# one byte that is another


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (edited("old", SIGNATURE, 8, b"\x09"), "its superblock is of version 9"),
        (edited("old", SIGNATURE, 13, b"\x03"), "its addresses are of an unknown width"),
        (edited("old", b"TREE\0", 4, b"\1"), "the tree of a group is of another kind"),
        (edited("old", b"TREE\0", 32, struct.pack("<Q", RAW["old"].index(b"TREE\0"))), "the tree of a group leads"),
        (edited("old", b"kinds\0", 0, b"\xff"), "a name is not UTF-8: invalid start byte"),
        (edited("old", b"kinds\0", 0, b"\0"), "it holds too many objects, or nests them too deep"),
        (edited("layouts", b"\x04soft", -3, b"\x02"), "a link is of an unknown version"),
        (edited("layouts", b"\x04soft", -2, b"\x02"), "a name has 1,869,808,641 bytes"),
        (edited("layouts", b"\x02\x02\1\1" + struct.pack("<2Q", 2, 3), 0, b"\3"), "a shape is of an unknown version"),
        (edited("layouts", b"\x02\x02\1\1" + struct.pack("<2Q", 2, 3), 1, b"\x21"), "a dataset has 33 dimensions"),
        (edited("layouts", b"\x02\x02\x02\0", 0, b"\x03"), "the filters of a dataset are of an unknown version"),
        (edited("layouts_old", struct.pack("<3I", 2, 3, 4), 0, bytes(4)), "the chunks of a dataset make no sense"),
        (edited("layouts", b"\3\0\x18\0" + FLOATS, 2, b"\x14"), "'compact' is F32 [2, 3] of 24 bytes, and 20 are"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(data: bytes, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, data)
    problem = refused(path)
    assert problem.code == "bad-header"
    assert problem.headline.startswith(f"{str(path)!r} is damaged: {words}")


def test_a_layout_that_is_stored_elsewhere_is_not_read(tmp_path: Path) -> None:
    with cs.open(written(tmp_path, edited("layouts", b"\3\0\x18\0" + FLOATS, -1, b"\2"))) as checkpoint:
        assert checkpoint.unreadable["compact"] == "its layout is stored elsewhere in the file"


HEAP = RAW["old"].index(b"GCOL")
CONFIGS = [
    ("a version of its own", edited("layouts", b"model_config\0", -9, b"\x09")),
    ("no JSON", edited("layouts", b'{"name": "fixed"}', 16, b"!")),
    ("a list", edited("layouts", b'{"name": "fixed"}', 0, b'["name", "fixed"]')),
    ("no such text", edited("old", b"GCOL", 64, b"\x63")),
    ("the end of the heap", edited("old", b"GCOL", 64, b"\0\0")),
]


@pytest.mark.parametrize("data", [case[1] for case in CONFIGS], ids=[case[0] for case in CONFIGS])
def test_a_configuration_that_cannot_be_read_is_none(data: bytes, tmp_path: Path) -> None:
    with cs.open(written(tmp_path, data)) as checkpoint:
        assert checkpoint.config is None and len(checkpoint) > 2


def test_a_text_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    data = bytearray(RAW["old"])
    for found in re.finditer(re.escape(struct.pack("<Q", HEAP)), RAW["old"]):
        data[found.start() - 4 : found.start()] = struct.pack("<I", (16 << 20) + 1)
    with cs.open(written(tmp_path, bytes(data))) as checkpoint:
        assert checkpoint.config is None


# chunks


def node(number: int, level: int, *chunks: tuple[int, int, int]) -> bytes:
    """The old file with other chunks in one of its trees: stored bytes, filters that were left out, address."""
    start = tree(number)
    made = start[:5] + struct.pack("<BH", level, len(chunks)) + start[8:24]
    made += b"".join(struct.pack("<2I4Q", nbytes, mask, 0, 0, 0, place) for nbytes, mask, place in chunks)
    return edited("layouts_old", start, 0, made)


def place(number: int) -> tuple[int, int, int]:
    nbytes, mask, *_, address = struct.unpack("<2I4Q", tree(number)[24:64])
    return nbytes, mask, address


def self_loop() -> bytes:
    at = RAW["layouts_old"].index(b"TREE\1")
    return node(0, 1, (24, 0, at))


PLAIN = place(0)
PACKED = place(1)


def test_filters_that_a_chunk_was_spared_are_not_undone(tmp_path: Path) -> None:
    with cs.open(written(tmp_path, node(1, 0, (24, 3, PLAIN[2])))) as checkpoint:
        assert torch.equal(checkpoint["one_packed"].load(), torch.tensor(W))
    shuffled = torch.tensor(W).view(torch.uint8).reshape(6, 4).T.reshape(2, 12).contiguous().view(torch.float32)
    with cs.open(written(tmp_path, node(1, 0, (PACKED[0], 1, PACKED[2])))) as checkpoint:
        assert torch.equal(checkpoint["one_packed"].load(), shuffled)


@pytest.mark.parametrize(
    ("key", "data", "words"),
    [
        ("one", edited("layouts_old", tree(0), 0, b"TREF"), "the tree of its chunks is damaged"),
        ("one", self_loop(), "the tree of its chunks is damaged"),
        ("one", node(0, 0, PLAIN, PLAIN), "a chunk is listed twice"),
        ("one", node(0, 0, (20, 0, PLAIN[2])), "a chunk has 20 bytes of 24"),
        ("one_packed", node(1, 0, (24, 0, PLAIN[2])), "a chunk cannot be unpacked: "),
        ("one", edited("layouts_old", struct.pack("<3I", 2, 3, 4), 0, b"\0\0\0\x7f"), "a chunk of 25,568,477,184 "),
    ],
)  # fmt: skip
def test_chunks_that_make_no_sense_are_an_error_of_their_tensor(
    key: str, data: bytes, words: str, tmp_path: Path
) -> None:
    with cs.open(written(tmp_path, data)) as checkpoint, pytest.raises(cs.CheckpointError) as caught:
        checkpoint[key].load()
    (problem,) = caught.value.diagnostics
    assert problem.code == "damaged-tensor"
    assert problem.headline.startswith(f"{key!r} cannot be read: {words}")


# headers by hand


def by_hand(head: bytes, *behind: bytes) -> bytes:
    """A file of nothing but its superblock and the header of its root."""
    total = 48 + len(head) + sum(map(len, behind))
    return SIGNATURE + struct.pack("<4B4QI", 2, 8, 8, 0, 0, (1 << 64) - 1, total, 48, 0) + head + b"".join(behind)


def header(messages: bytes, version: int = 2) -> bytes:
    return b"OHDR" + struct.pack("<2BI", version, 2, len(messages)) + messages


def old_header(messages: bytes, count: int) -> bytes:
    return struct.pack("<2BH2I4x", 1, 0, count, 1, len(messages)) + messages


def goes_on(at: int, nbytes: int) -> bytes:
    return struct.pack("<BHB2Q", 16, 16, 0, at, nbytes)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (by_hand(header(b"", 3)), "an object's header is of an unknown version"),
        (by_hand(header(bytes(4 * 65_537))), "an object has 65,537 header messages"),
        (by_hand(header(goes_on(58, 20))), "an object's header goes on where it was before"),
        (by_hand(header(goes_on(78, 20)), b"NONE" + bytes(16)), "a part of an object's header is missing"),
        (by_hand(old_header(struct.pack("<2HB3x2Q", 16, 16, 0, 64, 24), 9)), "an object's header goes on where it was"),
        (by_hand(b"\2" + bytes(19)), "there is no object at byte 48"),
    ],
)
def test_headers_that_make_no_sense_are_refused(data: bytes, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, data)
    assert refused(path).headline.startswith(f"{str(path)!r} is damaged: {words}")


def test_a_file_without_datasets_says_so(tmp_path: Path) -> None:
    ending = goes_on(78, 8)
    problem = refused(written(tmp_path, by_hand(header(ending), b"OCHK" + bytes(4))))
    assert problem.code == "no-tensors" and "holds no dataset of numbers" in problem.headline


def nested(depth: int) -> bytes:
    """Groups in groups, each with one link; the innermost is empty."""
    size = len(header(hard_link(0)))
    return by_hand(*(header(hard_link(48 + (n + 1) * size)) for n in range(depth)), header(b""))


def hard_link(to: int) -> bytes:
    return struct.pack("<BHB3BsQ", 6, 12, 0, 1, 0, 1, b"g", to)


@pytest.mark.parametrize(("depth", "code"), [(60, "no-tensors"), (70, "bad-header")])
def test_groups_in_groups_have_an_end(depth: int, code: str, tmp_path: Path) -> None:
    problem = refused(written(tmp_path, nested(depth)))
    assert problem.code == code
    assert ("nests them too deep" in problem.headline) == (depth > 64)
