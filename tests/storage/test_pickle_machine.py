"""The pickle machine: it reads what Python writes, runs nothing, and turns any garbage into one kind of error."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import pathlib
import pickle
import struct
import sys
import tracemalloc
from unittest.mock import patch

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsurgery.errors import CheckpointError
from ckptsurgery.storage.unpickling import pickle_machine
from ckptsurgery.storage.unpickling.inert import Array, Blob, Opaque
from ckptsurgery.storage.unpickling.pickle_machine import Unpickler


def load(data: bytes):
    return Unpickler(io.BytesIO(data), len(data), "x.pt").load()


class Reduces:
    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


class Thing:
    """A class that the reader must not need."""


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=5000),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.dictionaries(st.text(), inner).map(collections.OrderedDict)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(plain, st.integers(0, 5))
def test_plain_values_come_back_in_every_protocol(value, protocol):
    data = pickle.dumps(value, protocol=protocol)

    def whole(part):
        if isinstance(part, Blob):
            return data[part.offset : part.offset + part.nbytes]
        if isinstance(part, dict):
            return {k: whole(v) for k, v in part.items()}
        return type(part)(map(whole, part)) if type(part) in (list, tuple) else part

    assert whole(load(data)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_well_known_small_classes_become_plain_values(protocol):
    value = {
        "args": argparse.Namespace(lr=0.1, tags=["a"]),
        "path": pathlib.PurePosixPath("/a/b"),
        "set": {1, 2},
        "frozen": frozenset({"x"}),
        "default": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
        "complex": 1 + 2j,
        "bytes": b"\x00\xff",
        "array": bytearray(b"abc"),
        "deque": collections.deque([1, 2]),
        "f": numpy.float32(1.5),
        "i": numpy.int64(-3),
    }
    assert load(pickle.dumps(value, protocol=protocol)) == {
        "args": {"lr": 0.1, "tags": ["a"]},
        "path": "/a/b",
        "set": {1, 2},
        "frozen": frozenset({"x"}),
        "default": {"a": [1]},
        "counter": {"a": 2, "b": 1},
        "complex": 1 + 2j,
        "bytes": b"\x00\xff",
        "array": b"abc",
        "deque": [1, 2],
        "f": 1.5,
        "i": -3,
    }


@pytest.mark.parametrize("protocol", range(2, 6))
def test_numpy_arrays_keep_shape_order_and_place(protocol):
    array = numpy.asfortranarray(numpy.arange(6, dtype=">f4").reshape(2, 3))
    found = load(pickle.dumps(array, protocol=protocol))
    assert type(found) is Array
    assert (found.shape, found.dtype, found.fortran, found.type.big_endian) == ((2, 3), "F32", True, True)
    assert bytes(found.data) == array.T.tobytes()


def test_unknown_objects_are_recorded_and_do_nothing():
    thing = Thing()
    thing.weight = 3
    found = load(pickle.dumps([thing, Thing]))
    assert repr(found) == f"[<{__name__}.Thing>, <{__name__}.Thing>]"
    assert found[0].state == {"weight": 3}
    assert found[1].args is None


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_of_a_file_runs(protocol, tmp_path):
    marker = tmp_path / "pwned"
    command = f"touch {marker}"
    hostile = [
        Reduces(os.system, command),
        Reduces(eval, f"open({str(marker)!r}, 'w')"),
        Reduces(exec, f"open({str(marker)!r}, 'w')"),
        Reduces(getattr, Reduces(__import__, "os"), "system"),
        Reduces(os.mkdir, str(marker)),
        Reduces(pathlib.Path.touch, marker),
    ]
    found = load(pickle.dumps(hostile, protocol=protocol))
    assert all(type(item) is Opaque for item in found)
    assert not marker.exists()


def test_a_class_cannot_be_changed_through_build_or_setitem():
    # BUILD, SETITEM and APPEND aimed at the allowed globals themselves
    for name in (b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nset\n"):
        load(name + b"}(X\x08\x00\x00\x00__call__K\x01ub.")
        load(name + b"N}(X\x08\x00\x00\x00__dict__K\x01u\x86b.")
        load(name + b"K\x01K\x02s.")
        load(name + b"K\x01a.")
    assert collections.OrderedDict(a=1) == load(pickle.dumps(collections.OrderedDict(a=1)))


def test_opcodes_that_announce_much_allocate_little(tmp_path):
    announced = {
        "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40),
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40),
        "text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40),
        "short text": b"\x80\x02X" + struct.pack("<I", 1 << 28),
        "long": b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1),
        "bytearray call": pickle.dumps(Reduces(bytearray, 10**12), 2),
        "bytes call": pickle.dumps(Reduces(bytes, 10**12), 4),
        "list call": pickle.dumps(Reduces(list, Reduces(range, 10**12)), 4),
    }
    tracemalloc.start()
    for data in announced.values():
        (tmp_path / "x.pt").write_bytes(data)
        with (tmp_path / "x.pt").open("rb") as file:  # a file gets a buffer of what it is asked for
            for opened in (io.BytesIO(data), file):
                try:
                    Unpickler(opened, len(data), "x.pt").load()
                except CheckpointError as error:
                    assert error.diagnostics[0].code == "damaged-pickle"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("value", [set(range(10_000)), list(range(10_000)), dict.fromkeys(range(10_000)), "é" * 10_000])
def test_what_a_pickle_makes_is_paid_for_from_its_credit(value):
    data = pickle.dumps(value, 4)
    machine = Unpickler(io.BytesIO(data), len(data), "x.pt")
    before = machine.credit
    made = machine.load()
    assert made == value
    assert before - machine.credit >= sys.getsizeof(made) + (0 if type(made) is str else sum(map(sys.getsizeof, made)))


@pytest.mark.parametrize("data", [b"](K\x01K\x021K\x07a.", b"]K\x010K\x07a.", b"](0K\x07a."])
def test_what_is_popped_is_gone(data):
    assert load(data) == pickle.loads(data) == [7]


def test_pickles_that_blow_up_are_refused_in_time():
    # each line doubles what the one before holds
    doubled = b"(" + b"]K\x01a" + b"2\x86" * 100 + b"K\x01d."
    with pytest.raises(CheckpointError):
        load(b"}" + b"K\x01" + b"2\x86" * 100 + b"K\x02s.")  # hashing such a key takes 2**100 steps
    with pytest.raises(CheckpointError):
        load(doubled)
    items = b"".join(b"K\x01" for _ in range(100_000))
    copies = b"".join(b"h\x01h\x00\x85R" for _ in range(10_000))
    with pytest.raises(CheckpointError, match="out of proportion"):
        load(b"(](" + items + b"eq\x00cbuiltins\nlist\nq\x01" + copies + b"l.")


def test_depth_is_no_problem():
    for data in (
        b"(" * 50_000 + b"t" * 50_000 + b".",
        b"]" * 50_000 + b"a" * 49_999 + b".",
        b"N" + b"\x85" * 50_000 + b".",
    ):
        assert load(data) is not None


def test_every_truncation_of_a_file_is_one_error():
    thing = Thing()
    thing.weights = numpy.arange(4.0)
    value = {"a": [1, 2.5, "x", b"y" * 300, None, True], "b": collections.OrderedDict(c=(1,)), "t": thing}
    for protocol in range(6):
        data = pickle.dumps(value, protocol=protocol)
        for end in range(len(data)):
            with pytest.raises(CheckpointError) as caught:
                load(data[:end])
            assert caught.value.diagnostics[0].code == "damaged-pickle"


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_gives_a_value_or_one_error(data):
    with contextlib.suppress(CheckpointError):
        load(data)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutations_give_a_value_or_one_error(data):
    sound = bytearray(pickle.dumps({"a": numpy.arange(3), "b": [argparse.Namespace(x=1), {1: (2, 3)}, {4}]}, 4))
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        load(bytes(sound))


def test_extension_codes_and_persistent_ids_mean_nothing_by_themselves():
    assert repr(load(b"\x80\x02\x82\x05.")) == "<copyreg.extension_5>"
    with pytest.raises(CheckpointError, match="persistent"):
        load(b"Pid\n.")
    with pytest.raises(CheckpointError, match="outside"):
        load(b"\x80\x05\x97.")


def dcp_metadata(chunks: int, per_tensor: int) -> bytes:
    """The `.metadata` of a checkpoint of `torch.distributed.checkpoint`, of torch's own classes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors, places = {}, {}
    for number in range(chunks // per_tensor):
        key = f"model.layers.{number}.self_attn.q_proj.weight"
        corners = [torch.Size([16 * i, 0]) for i in range(per_tensor)]
        shards = [ChunkStorageMetadata(corner, torch.Size([16, 4096])) for corner in corners]
        size = torch.Size([16 * per_tensor, 4096])
        tensors[key] = TensorStorageMetadata(TensorProperties(torch.bfloat16), size, shards)
        for i, corner in enumerate(corners):
            places[MetadataIndex(key, corner, i)] = _StorageInfo(f"__{i}_0.distcp", 131_072 * number, 131_072)
    about = StorageMeta(checkpoint_id=pathlib.PosixPath("/out"), save_id="1")
    return pickle.dumps(Metadata(tensors, {key: ("model", key) for key in tensors}, places, about))


@pytest.mark.parametrize(("chunks", "per_tensor"), [(1000, 1), (1000, 8), (24_000, 4)])
def test_the_densest_genuine_pickles_are_within_the_credit(chunks, per_tensor, monkeypatch):
    """Without what is free to any file, so that any number of chunks is."""
    monkeypatch.setattr(pickle_machine, "FREE", 0)
    data = dcp_metadata(chunks, per_tensor)
    tree = load(data)
    assert len(tree.state["state_dict_metadata"]) == chunks // per_tensor
    assert len(tree.state["storage_data"]) == chunks
    assert next(iter(tree.state["state_dict_metadata"].values())).state["size"] == (16 * per_tensor, 4096)


def not_at_all(machine: Unpickler, data: bytes, start: int, at: int) -> int:
    """In place of the loop: leave all to the table."""
    machine.file.seek(start + at)
    return at


def read_by(data: bytes, table: bool) -> list[str]:
    """What a pickle is read as, at which price and up to where; by the table of opcodes alone, or with the loop too."""
    behind = bytes(600)  # the loop leaves the last bytes of a file to the table
    machine = Unpickler(io.BytesIO(data + behind), len(data) + len(behind), "x.pt")
    told: list[str] = []
    try:
        with patch.object(pickle_machine, "run_frequent", not_at_all) if table else contextlib.nullcontext():
            told += described(machine.load())
        told.append(f"credit {machine.credit}")
    except CheckpointError as error:
        told.append(error.diagnostics[0].headline.partition(" at byte")[0])
    return [*told, f"at {machine.file.tell()}" if "credit" in told[-1] else ""]


def described(tree: object) -> list[str]:
    """A tree as lines, with the records in it; a part that occurs again is named by its first place."""
    lines: list[str] = []
    known: dict[int, int] = {}
    left = [tree]
    while left and len(lines) < 5000:
        part = left.pop()
        if id(part) in known:
            lines.append(f"again {known[id(part)]}")
            continue
        if type(part) in (dict, list, Opaque) or isinstance(part, dict):
            known[id(part)] = len(lines)
        if isinstance(part, dict):
            lines.append(f"{type(part).__name__} of {len(part)}")
            left += [each for pair in part.items() for each in pair]
        elif isinstance(part, list | tuple):
            lines.append(f"{type(part).__name__} of {len(part)}")
            left += part
        elif type(part) is Opaque:
            lines.append(f"{part.path} {part.note}")
            left += [part.args, part.state, part.items, part.pairs]
        else:
            lines.append(repr(part))
    return lines


@pytest.mark.parametrize("protocol", range(6))
def test_the_loop_reads_what_the_table_reads(protocol):
    thing = Thing()
    thing.place, thing.size, thing.same = "a/b", torch.Size([3, 4]), thing
    values = [
        thing,
        [Thing() for _ in range(300)],
        [torch.Size(range(n)) for n in range(6)] * 3,
        {f"layers.{i}.weight": (i, -i, i * 70_000, None, True) for i in range(500)},
        {"text": ["é" * 20, "x" * 300, ""], "set": {1, 2}, "deep": [[[()]]]},
        pathlib.PurePosixPath("a/b"),
        numpy.arange(5),
    ]
    for value in values:
        data = pickle.dumps(value, protocol)
        assert read_by(data, table=False) == read_by(data, table=True)


def test_the_loop_reads_metadata_as_the_table_does():
    data = dcp_metadata(1000, 8)
    assert read_by(data, table=False) == read_by(data, table=True)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_loop_takes_garbage_as_the_table_does(data):
    genuine = bytearray(dcp_metadata(3, 2) if data.draw(st.booleans()) else pickle.dumps([Thing(), {"a": 3}], 2))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(genuine) - 1))
        genuine[at] = data.draw(st.sampled_from(b"\x94jhK)\x85\x86R\x81}(ubq\x8cJM.]aN\x00\x01\x02\xff"))
    assert read_by(bytes(genuine), table=False) == read_by(bytes(genuine), table=True)
