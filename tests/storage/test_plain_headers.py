"""What the pattern reads of a header is what JSON says, and all that it is not sure of it leaves to JSON."""

from __future__ import annotations

import json
import random
import struct

import pytest

from ckptsurgery.errors import CheckpointError
from ckptsurgery.specs import TensorSpec
from ckptsurgery.storage.formats.safetensors import read_plain_header, read_safetensors

ROWS = {
    "w.0": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "é": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    "none": {"dtype": "I64", "shape": [0, 7], "data_offsets": [16, 16]},
    "last": {"dtype": "F4", "shape": [4], "data_offsets": [16, 18]},
}
METADATA = {"format": "pt", "config": '{"a": [1]}, "x'}


def by_name(rows):
    return {name: dict(sorted(row.items())) for name, row in rows.items()}


def written(tmp_path, text, size=18):
    path = tmp_path / "x.safetensors"
    header = text.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    return str(path)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("order", [dict, by_name])
@pytest.mark.parametrize("metadata", [{}, {"__metadata__": METADATA}, {"__metadata__": {}}])
@pytest.mark.parametrize("padding", ["", "   "])
def test_headers_of_all_usual_writers_are_read_by_pattern(separators, order, metadata, padding):
    text = json.dumps({**metadata, **order(ROWS)}, separators=separators, ensure_ascii=False) + padding
    header = read_plain_header(text, 18)
    assert header is not None
    assert header.names == tuple(ROWS)
    assert header.specs == [TensorSpec(row["shape"], row["dtype"]) for row in ROWS.values()]
    assert header.begins == [row["data_offsets"][0] for row in ROWS.values()]
    assert header.metadata == metadata.get("__metadata__", {})


PLAIN = json.dumps({"__metadata__": METADATA, **ROWS}, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN.replace('},"w.0"', '}"w.0"'),  # no comma after the metadata
        PLAIN.replace('},"none"', '};"none"'),
        PLAIN.replace('},"none"', '}, "x","none"'),
        PLAIN.replace('},"none"', '},1,"none"'),
        PLAIN + "}",
        PLAIN[:-1],
        "[" + PLAIN[1:],
        PLAIN.replace("[0,12]", "[00,12]"),
        PLAIN.replace("[2,3]", "[02,3]"),
        PLAIN.replace("[2,3]", "[2,,3]"),
        PLAIN.replace("[2,3]", "[2,4]"),
        PLAIN.replace('"BF16"', '"BF17"'),
        PLAIN.replace('"F4","shape":[4]', '"F4","shape":[3]'),
        PLAIN.replace("[12,16]", "[11,15]"),
        PLAIN.replace('"format"', '"config"'),
        PLAIN.replace('"pt"', "1"),
        PLAIN.replace("w.0", "w\n0"),
        PLAIN.replace("w.0", ""),
        "{}",
        "",
    ],
)  # fmt: skip
def test_what_is_not_sound_is_left_to_json(text):
    assert text != PLAIN
    assert read_plain_header(text, 18) is None


def test_names_with_escapes_and_other_ways_of_writing_are_read_all_the_same(tmp_path):
    for text in (json.dumps(ROWS), json.dumps({'a"b': ROWS["w.0"]}), json.dumps(ROWS, indent=1)):
        size = 12 if "a" in text[:4] else 18
        names = list(json.loads(text))
        assert list(read_safetensors(written(tmp_path, text, size)).entries) == names


def test_a_name_given_twice_is_found_where_one_of_the_two_has_lost_its_fields(tmp_path):
    text = '{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"b":{"dtypes":[0,4]},"b":' + (
        '{"dtype":"BF16","shape":[3,0],"data_offsets":[4,4]}}'
    )
    with pytest.raises(CheckpointError, match="'b' is given twice"):
        read_safetensors(written(tmp_path, text, 4))


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_pattern_accepts_json_reads_the_same(seed):
    """Headers with a few characters changed: most are refused by both, none is taken for another one."""
    draw = random.Random(seed)
    accepted = 0
    for _ in range(500):
        text = PLAIN
        for _ in range(draw.randint(0, 2)):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(['"', ",", "0", "1", "}", "{", " ", "[", "]", ":", "a", ""]) + text[at + 1 :]
        header = read_plain_header(text, 18)
        if header is not None:
            accepted += 1
            rows = json.loads(text)
            assert rows.pop("__metadata__", {}) == header.metadata
            assert {n: (s.dtype, list(s.shape), b) for n, s, b in zip(header.names, header.specs, header.begins)} == {
                name: (row["dtype"], row["shape"], row["data_offsets"][0]) for name, row in rows.items()
            }
    assert accepted
