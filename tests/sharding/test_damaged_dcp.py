"""Folders of `torch.distributed.checkpoint` with false metadata: each fault is named, and what is sound is read."""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import ckptsurgery as cs
from ckptsurgery.storage.formats.dcp import read_dcp
from ckptsurgery.storage.unpickling.inert import Opaque

Change = Callable[[Any], object]
FLOAT4 = torch.zeros(4, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


def save(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def change(folder: Path, change: Change) -> Path:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


def place(metadata: Any, key: str) -> Any:
    """Where the metadata says that a key is stored."""
    (found,) = (place for index, place in metadata.storage_data.items() if index.fqn == key)
    return found


def refused(folder: Path) -> cs.Diagnostic:
    with pytest.raises(cs.CheckpointError) as caught:
        cs.open(folder)
    (problem,) = caught.value.diagnostics
    assert problem.place == str(folder) or problem.place == str(folder / ".metadata")
    return problem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "one", {"w": torch.ones(4, 3), "b": torch.ones(2), "epoch": 3})


WHOLE: list[tuple[str, Change, str]] = [
    ("no tensors", lambda m: setattr(m, "state_dict_metadata", None), "lists no tensors or no places of them"),
    ("no places", lambda m: setattr(m, "storage_data", []), "lists no tensors or no places of them"),
    ("place", lambda m: m.storage_data.update({next(iter(m.storage_data)): None}), "the places in"),
    ("a list as a name", lambda m: setattr(place(m, "w"), "relative_path", ["a"]), "the places in"),
    ("a number as a name", lambda m: setattr(place(m, "w"), "relative_path", 5), "the metadata names 5, which"),
    ("key", lambda m: object.__setattr__(next(iter(m.storage_data)), "fqn", 5), "the places in"),
    ("a list as an index", lambda m: object.__setattr__(next(iter(m.storage_data)), "offset", [0, 0]), "the places in"),
    ("a number of ways", lambda m: setattr(place(m, "w"), "transform_descriptors", 5), "the places in"),
]


@pytest.mark.parametrize(("name", "how", "words"), WHOLE, ids=[name for name, *_ in WHOLE])
def test_metadata_that_make_no_sense_are_refused(name: str, how: Change, words: str, folder: Path) -> None:
    problem = refused(change(folder, how))
    assert words in problem.headline
    assert problem.code == ("outside-folder" if "names" in words else "bad-metadata")


def about(metadata: Any) -> Any:
    return metadata.state_dict_metadata["w"]


ONE: list[tuple[str, Change, str]] = [
    ("negative size", lambda m: setattr(about(m), "size", torch.Size([-4, 3])), "has metadata that makes no sense"),
    ("huge size", lambda m: setattr(about(m), "size", torch.Size([2**62, 3])), "has metadata that makes no sense"),
    ("no chunks", lambda m: setattr(about(m), "chunks", None), "has metadata that makes no sense"),
    ("no properties", lambda m: setattr(about(m), "properties", 3), "has metadata that makes no sense"),
    ("a way", lambda m: setattr(place(m, "w"), "transform_descriptors", ["z"]), "is stored in a transformed way (z)"),
    ("negative offset", lambda m: setattr(place(m, "w"), "offset", -1), "has a place that makes no sense"),
    ("negative length", lambda m: setattr(place(m, "w"), "length", -1), "has a place that makes no sense"),
    ("offset text", lambda m: setattr(place(m, "w"), "offset", "0"), "has a place that makes no sense"),
    ("length text", lambda m: setattr(place(m, "w"), "length", "9"), "has a place that makes no sense"),
    ("far", lambda m: setattr(place(m, "w"), "offset", 1 << 70), "reaches past the end of '__0_0.distcp'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "words"), ONE, ids=[name for name, *_ in ONE])
def test_a_tensor_whose_metadata_make_no_sense_is_named(name: str, how: Change, words: str, folder: Path) -> None:
    change(folder, how)
    with pytest.raises(cs.CheckpointError) as caught:
        cs.open(folder)
    problems = caught.value.diagnostics
    assert {problem.code for problem in problems} == {"bad-chunks"}
    assert f"'w' of {str(folder)!r} {words}" == problems[0].headline
    assert [problem.headline for problem in problems[1:]] == (
        [f"'w' of {str(folder)!r} has chunks without a place"] if "place that" in words or "way" in words else []
    )


def test_properties_without_a_dtype_make_no_sense(folder: Path) -> None:
    class Empty:
        def __reduce__(self) -> Any:
            return type(self.properties), (), ()

        properties: Any

    def empty(metadata: Any) -> None:
        odd = Empty()
        odd.properties = about(metadata).properties
        about(metadata).properties = odd

    assert "has metadata that makes no sense" in refused(change(folder, empty)).headline


def test_a_missing_folder_is_an_error_of_the_path(tmp_path: Path) -> None:
    with pytest.raises(cs.CheckpointError) as caught:
        read_dcp(str(tmp_path / "none"))
    (problem,) = caught.value.diagnostics
    assert (problem.code, problem.place) == ("missing-file", str(tmp_path / "none" / ".metadata"))


def test_a_tensor_of_an_unknown_dtype_is_unreadable(folder: Path) -> None:
    def quantised(metadata: Any) -> None:
        about(metadata).properties.dtype = torch.quint8

    with cs.open(change(folder, quantised)) as checkpoint:
        assert list(checkpoint) == ["b"]
        assert checkpoint.unreadable == {"w": "its dtype is unknown here"}


def test_four_bit_tensors_are_not_read_in_chunks(tmp_path: Path) -> None:
    def packed(metadata: Any) -> None:
        about(metadata).properties.dtype = torch.float4_e2m1fn_x2

    folder = change(save(tmp_path / "one", {"w": FLOAT4.view(torch.uint8)}), packed)
    problem = refused(folder)
    assert problem.code == "packed-chunks"
    assert problem.headline == "a tensor of F4 is stored in chunks, and its elements are not whole bytes"


# values that are not tensors


TABLE = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """A checkpoint with tensors in an object, which torch saves as one value."""
    state = argparse.Namespace(table=TABLE, array=numpy.ones(2))
    return save(tmp_path / "one", {"w": torch.ones(2), "optimizer": state})


def test_tensors_within_a_value_are_read(nested: Path) -> None:
    with cs.open(nested) as checkpoint:
        held = checkpoint.extras["optimizer"]
        assert torch.equal(checkpoint.tensor_at(held["table"]), TABLE)
        assert type(held["array"]) is Opaque and held["array"].note == "an array within a value"


def test_a_tensor_within_a_value_that_reaches_outside_is_a_record(nested: Path) -> None:
    file = nested / "__0_0.distcp"
    data = file.read_bytes()
    assert data.count(b"K\x02K\x03\x86") == 1
    file.write_bytes(data.replace(b"K\x02K\x03\x86", b"K\x02K\x07\x86"))
    with cs.open(nested) as checkpoint:
        note = checkpoint.extras["optimizer"]["table"].note
    assert note == "F32 [2, 7] at element 0 with strides [3, 1] reaches outside its storage of 24 bytes"


def longer(metadata: Any) -> None:
    place(metadata, "epoch").length = (64 << 20) + 1


def elsewhere(metadata: Any) -> None:
    place(metadata, "epoch").offset = 1 << 70


def behind(metadata: Any) -> None:
    place(metadata, "epoch").length += 1 << 20


def unplaced(metadata: Any) -> None:
    for index in [index for index in metadata.storage_data if index.fqn == "epoch"]:
        del metadata.storage_data[index]


@pytest.mark.parametrize(
    ("how", "note"),
    [
        (longer, "a value of 67,108,865 bytes, which is not read"),
        (elsewhere, "ends early"),
        (behind, "ends early"),
        (unplaced, "it has no place"),
    ],
)
def test_a_value_that_cannot_be_read_is_a_record(how: Change, note: str, folder: Path) -> None:
    with cs.open(change(folder, how)) as checkpoint:
        assert sorted(checkpoint) == ["b", "w"]
        found = checkpoint.extras["epoch"]
    assert type(found) is Opaque and note in found.note


def test_a_common_file_that_cannot_be_read_is_a_record(folder: Path) -> None:
    (folder / "common.pt").write_bytes(b"PK\3\4 and no more")
    with cs.open(folder) as checkpoint:
        assert checkpoint.extras["common"].note == "common.pt cannot be read"
    torch.save({"iteration": 5, "mask": torch.ones(2)}, folder / "common.pt")
    with cs.open(folder) as checkpoint:
        common = checkpoint.extras["common"]
    assert (common["iteration"], common["mask"].note) == (5, "a tensor of common.pt")


# safetensors blobs


def test_a_blob_without_the_tensor_that_the_metadata_names_is_an_error(tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path / "one", serialization_format=dcp.filesystem.SerializationFormat.SAFETENSORS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(4, 3)}, storage_writer=writer, no_dist=True)
    with cs.open(tmp_path / "one") as checkpoint:
        assert torch.equal(checkpoint["w"].load(), torch.ones(4, 3))

    def halved(metadata: Any) -> None:
        about(metadata).properties.dtype = torch.float16

    problem = refused(change(tmp_path / "one", halved))
    assert (problem.code, problem.headline) == (
        "bad-chunks",
        f"'w' of {str(tmp_path / 'one')!r} is not in '__0_0.distcp' as the metadata says",
    )


# safetensors files of several ranks


def rank_file(folder: Path, rank: int, state: dict[str, torch.Tensor], info: object) -> None:
    """One rank's file, as `HuggingFaceStorageWriter` writes it."""
    folder.mkdir(exist_ok=True)
    text = info if isinstance(info, str) else json.dumps(info)
    metadata = {"DCP_SHARDING_INFO": text, "DCP_VERSION": "1.0", "format": "pt", "author": "me"}
    save_file(state, folder / f"shard-{rank:05}-model-00001-of-00001.safetensors", metadata)


def at(*offsets: object) -> dict[str, Any]:
    return {"w": {"saved_offsets": list(offsets)}}


def test_files_of_ranks_are_joined_where_their_offsets_say(tmp_path: Path) -> None:
    w = torch.arange(12.0).reshape(4, 3)
    rank_file(tmp_path / "one", 1, {"w": w[:2], "none": torch.ones(0, 2)}, at(0, 0))
    rank_file(tmp_path / "one", 2, {"w": w[2:]}, at(2, 0))
    with cs.open(tmp_path / "one") as checkpoint:
        assert torch.equal(checkpoint["w"].load(), w)
        assert checkpoint["none"].load().shape == (0, 2)
        assert checkpoint.metadata == {"author": "me"}


HALF = torch.ones(2, 3)
TORN = [
    ("overlap", HALF, at(1, 0)),
    ("gap", HALF, at(3, 0)),
    ("dtype", HALF.half(), at(2, 0)),
    ("dimensions", torch.ones(2), at(2)),
    ("dimensions of the part", torch.ones(2), at(2, 0)),
    ("dimensions of the place", HALF, at(2)),
]


@pytest.mark.parametrize(("part", "info"), [case[1:] for case in TORN], ids=[case[0] for case in TORN])
def test_parts_that_do_not_fit_are_named(part: torch.Tensor, info: Any, tmp_path: Path) -> None:
    for rank, more in ((1, HALF), (2, part)):
        key = at(0, 0) if rank == 1 else info
        rank_file(tmp_path / "one", rank, {"w": more, "z": more.clone()}, key | {"z": key["w"]})
    problem = refused(tmp_path / "one")
    assert problem.headline == f"the chunks of 'w' in {str(tmp_path / 'one')!r} overlap, or leave some of it out"
    assert (problem.code, problem.notes, problem.help) == ("bad-chunks", ("z",), "copy the files of all ranks")


@pytest.mark.parametrize(
    "info", ["{", [], {"w": {}}, {"w": None}, at(-1, 0), at("0", 0), at(True, 0), at(1.0, 0), '{"w": ' + "[" * 9999]
)
def test_offsets_that_make_no_sense_are_an_error(info: object, tmp_path: Path) -> None:
    rank_file(tmp_path / "one", 1, {"w": torch.ones(2, 3)}, info)
    problem = refused(tmp_path / "one")
    name = "shard-00001-model-00001-of-00001.safetensors"
    assert problem.headline == f"the metadata of {name!r} does not say where its chunks begin"
    assert problem.code == "bad-metadata"


def test_four_bit_parts_are_not_joined(tmp_path: Path) -> None:
    rank_file(tmp_path / "one", 1, {"w": FLOAT4}, at(0, 0))
    with cs.open(tmp_path / "one") as checkpoint:
        assert checkpoint["w"].spec == cs.TensorSpec((4, 4), "F4")
    rank_file(tmp_path / "one", 2, {"w": FLOAT4}, at(4, 0))
    assert refused(tmp_path / "one").code == "packed-chunks"


@pytest.mark.parametrize("paths", [[("w",)], "w", 5])
def test_paths_that_are_no_table_are_passed_over(paths: object, folder: Path) -> None:
    checkpoint = cs.open(change(folder, lambda m: setattr(m, "planner_data", paths)))
    assert sorted(checkpoint) == ["b", "w"] and torch.equal(checkpoint.load("w"), torch.ones(4, 3))
