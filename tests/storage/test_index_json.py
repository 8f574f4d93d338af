"""An index that is proved by writing says what an index that is read says, or it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgery.errors import CheckpointError, Diagnostic
from ckptsurgery.specs import TensorSpec
from ckptsurgery.storage.contents import Contents, Entry
from ckptsurgery.storage.formats.index_json import likely_shards, read_plain_index, weight_map_in
from ckptsurgery.storage.formats.sharded import read_index

STYLES: list[dict[str, Any]] = [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}]
FILES = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]

names = st.text(st.sampled_from('ab.0": \\\n\x7fé'), min_size=1, max_size=5)
shards = st.dictionaries(st.sampled_from(FILES), st.lists(names, max_size=4, unique=True), max_size=3)


def said(text: str, held: Mapping[str, list[str]]) -> list[tuple[str, str]] | None:
    """The rows that a proof gives."""
    plain = read_plain_index(text, held)
    if plain is None:
        return None
    rows = [(key, file) for file, keys in held.items() for key in keys]
    return sorted(rows) if plain.by_name else rows


@given(held=shards, style=st.sampled_from(STYLES), by_name=st.booleans(), change=st.sampled_from(["", "move", "drop"]))
def test_a_proof_says_what_reading_says(held: dict[str, list[str]], style: Any, by_name: bool, change: str) -> None:
    weight_map = {key: file for file, keys in held.items() for key in keys}
    first = next(iter(weight_map), None)
    if change and first is not None:
        owner = weight_map.pop(first)
        weight_map |= {first: owner} if change == "move" else {}
    text = json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}, sort_keys=by_name, **style)
    proved = said(text, held)
    assert proved is None or proved == list(weight_map_in(text, "index")[0].items())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("by_name", [False, True])
def test_what_writers_write_is_proved(style: Any, by_name: bool) -> None:
    held = {FILES[0]: ["b.10.w", "b.9.w"], FILES[1]: ["a.w"], FILES[2]: ["c"]}
    weight_map = {key: file for file, keys in held.items() for key in keys}
    text = json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}, sort_keys=by_name, **style)
    plain = read_plain_index(text, held)
    assert plain is not None
    assert (plain.by_name, plain.about) == (by_name, {"total_size": 3})


TRAPS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "a name that would close its own quotes": (
        '{"weight_map": {"a": "1.st", "b": "1.st"}}', {"1.st": ['a": "1.st", "b']}
    ),
    "a name whose backslash JSON would read": ('{"weight_map": {"a\\n": "1.st"}}', {"1.st": ["a\\n"]}),
    "a name with a break that JSON has no room for": ('{"weight_map": {"a\n": "1.st"}}', {"1.st": ["a\n"]}),
    "a key that two files hold": ('{"weight_map": {"a": "1.st", "a": "2.st"}}', {"1.st": ["a"], "2.st": ["a"]}),
    "a key that comes again later": ('{"weight_map": {"a": "1.st", "b": "1.st", "a": "2.st"}}', {"1.st": ["a", "b"]}),
    "a row more than the shards have": ('{"weight_map": {"a": "1.st", "b": "2.st"}}', {"1.st": ["a"]}),
    "a row less": ('{"weight_map": {"a": "1.st"}}', {"1.st": ["a", "b"]}),
    "a file that the index does not name": ('{"weight_map": {"a": "1.st"}}', {"1.st": ["a"], "2.st": []}),
    "a map within the metadata": (
        '{"metadata": {"weight_map": {"a": "1.st"}}, "weight_map": {}}', {"1.st": ["a"]}
    ),
    "a map spelt otherwise": (
        '{"metadata": {"weight_map": {"a": "1.st"}}, "weight\\u005fmap": {"b": "1.st"}}', {"1.st": ["a"]}
    ),
    "a map that is given twice": ('{"weight_map": {"a": "1.st"}, "weight_map": {"b": "1.st"}}', {"1.st": ["a"]}),
    "a map inside of a list": ('[{"weight_map": {"a": "1.st"}}]', {"1.st": ["a"]}),
    "a text that ends early": ('{"weight_map": {"a": "1.st"}', {"1.st": ["a"]}),
    "a comma too few": ('{"weight_map": {"a": "1.st""b": "2.st"}}', {"1.st": ["a"], "2.st": ["b"]}),
    "a comma too many": ('{"weight_map": {"a": "1.st", }}', {"1.st": ["a"]}),
    "no row": ('{"weight_map": {}}', {"1.st": []}),
    "no map": ("{}", {}),
}  # fmt: skip


@pytest.mark.parametrize("what", TRAPS)
def test_what_may_mean_anything_else_is_not_proved(what: str) -> None:
    text, held = TRAPS[what]
    assert read_plain_index(text, held) is None


def test_no_file_outside_of_the_folder_is_likely() -> None:
    assert likely_shards('{"weight_map": {"a": "../model-00001-of-00002.safetensors"}}') == []
    assert likely_shards('{"weight_map": {"a": "/x.safetensors"}}') == []


@dataclass
class Files:
    """Those of a folder, read in a way of their own."""

    read_shard: Callable[[str], Contents]

    def exists(self, path: str) -> bool:
        return Path(path).exists()


@pytest.mark.parametrize("listed", [["a", "b"], ["b", "a"], ["a"], ["a", "c"]])
def test_a_shard_is_read_once_whatever_the_index_says(listed: list[str], tmp_path: Path) -> None:
    held = {FILES[0]: ["a"], FILES[1]: ["b", "c"], FILES[2]: ["d"]}
    owners = {key: file for file, keys in held.items() for key in keys}
    for file in FILES:
        (tmp_path / file).touch()
    read: list[str] = []

    def reader(path: str) -> Contents:
        read.append(path)
        return Contents({key: Entry(TensorSpec((), "F32"), path) for key in held[Path(path).name]})

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: owners[key] for key in listed}}))
    assert list(read_index(str(index), Files(reader)).entries) == listed
    assert len(read) == len(set(read))


def test_a_damaged_shard_that_the_index_does_not_name_is_no_matter(tmp_path: Path) -> None:
    def reader(path: str) -> Contents:
        if path.endswith(FILES[1]):
            raise CheckpointError(Diagnostic("damaged", "damaged", path))
        return Contents({"a": Entry(TensorSpec((), "F32"), path)})

    for file in FILES:
        (tmp_path / file).touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": FILES[0]}}))
    assert list(read_index(str(index), Files(reader)).entries) == ["a"]
    index.write_text(json.dumps({"weight_map": {"a": FILES[0], "b": FILES[1]}}))
    with pytest.raises(CheckpointError, match="damaged"):
        read_index(str(index), Files(reader))
