"""Plain pickles: numpy state_dicts, Paddle's files, and tensors that `pickle.dump` wrote."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path

import numpy
import pytest
import torch

from ckptsurgery.errors import CheckpointError
from ckptsurgery.specs import DTYPES
from ckptsurgery.storage.formats.plain_pickle import read_pickle


@pytest.fixture
def dumped(tmp_path):
    def dump(value, protocol=4):
        path = tmp_path / "x.pdparams"
        path.write_bytes(pickle.dumps(value, protocol))
        return path

    return dump


def values(contents):
    found = {}
    for key, entry in contents.entries.items():
        if entry.tensor is not None:
            found[key] = entry.tensor()
            continue
        assert entry.strides is None and not entry.big_endian
        data = Path(entry.file).read_bytes()[entry.offset : entry.offset + entry.spec.nbytes]
        dtype = getattr(torch, DTYPES[entry.spec.dtype].torch)
        found[key] = torch.frombuffer(bytearray(data), dtype=dtype).reshape(entry.spec.shape)
    return found


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_lie_where_the_entry_says(dumped, protocol):
    value = {"a.w": numpy.arange(6.0).reshape(2, 3), "a.b": numpy.arange(3), "long": numpy.ones(5000, "f4")}
    contents = read_pickle(dumped(value, protocol))
    found = values(contents)
    for key in value:
        assert numpy.array_equal(found[key].numpy(), value[key])
    assert all((entry.file is not None) == (protocol > 2) for entry in contents.entries.values())


def test_fortran_order_and_foreign_byte_order_are_noted(dumped):
    value = numpy.arange(6, dtype=">f4").reshape(2, 3)
    entry = read_pickle(dumped({"w": numpy.asfortranarray(value)})).entries["w"]
    assert (entry.strides, entry.big_endian, entry.spec.shape) == ((1, 2), True, (2, 3))
    late = read_pickle(dumped({"w": numpy.asfortranarray(value)}, 2)).entries["w"].tensor()
    assert late.tolist() == value.tolist()


def test_paddles_conventions_are_undone(dumped):
    w = numpy.arange(6, dtype="f4").reshape(2, 3)
    value = {
        "fc.weight": ("linear_0.w_0", w),
        "fc.half": numpy.full((3,), 0x3F80, "u2"),
        "StructuredToParameterName@@": {"fc.weight": "linear_0.w_0"},
    }
    for protocol in (2, 3, 4):
        contents = read_pickle(dumped(value, protocol))
        found = values(contents)
        assert found["fc.weight"].tolist() == w.tolist()
        assert found["fc.half"].dtype == torch.bfloat16 and found["fc.half"].tolist() == [1.0, 1.0, 1.0]
        assert contents.extras == {"StructuredToParameterName@@": {"fc.weight": "linear_0.w_0"}}


def test_slices_of_a_large_parameter_are_joined(dumped):
    w = numpy.arange(5000.0).reshape(50, 100)
    value = collections.OrderedDict()
    value["w@@.0"], value["w@@.1"] = w.reshape(-1)[:3000], w.reshape(-1)[3000:]
    value["UnpackBigParamInfor@@"] = {"w": {"OriginShape": (50, 100), "slices": ["w@@.0", "w@@.1"]}}
    for protocol in (2, 3, 4):
        contents = read_pickle(dumped(value, protocol))
        assert list(contents.entries) == ["w"]
        assert torch.equal(values(contents)["w"], torch.from_numpy(w))
    value["UnpackBigParamInfor@@"]["w"]["OriginShape"] = (50, 101)
    with pytest.raises(CheckpointError, match="do not add up"):
        read_pickle(dumped(value))


class Evals:
    def __init__(self, array):
        self.array = array

    def __reduce__(self):
        return eval, ("data", {"data": self.array})


def test_an_array_that_reduces_to_eval_is_refused_by_name(dumped):
    value = {"a": Evals(numpy.ones(3)), "b": numpy.ones(3)}
    with pytest.raises(CheckpointError, match=r"'a' would be made by running (builtins|__builtin__).eval"):
        read_pickle(dumped(value))
    with pytest.raises(CheckpointError, match="eval"):
        read_pickle(dumped({"a": Evals(numpy.ones(3))}))


def test_tensors_that_pickle_dump_wrote_are_read(dumped):
    module = torch.nn.Linear(3, 500)
    found = values(read_pickle(dumped(module.state_dict())))
    assert all(torch.equal(found[key], tensor) for key, tensor in module.state_dict().items())
    with pytest.raises(CheckpointError, match=r"protocol 2.*torch.save"):
        read_pickle(dumped(module.state_dict(), 2))


def test_object_arrays_are_no_tensors(dumped):
    contents = read_pickle(dumped({"w": numpy.ones(3), "names": numpy.array(["a", "b"], dtype=object)}))
    assert list(contents.entries) == ["w"] and "names" in contents.extras


def test_arrays_that_announce_more_than_they_hold_are_refused(dumped):
    path = dumped({"w": numpy.ones((7, 1))})
    path.write_bytes(path.read_bytes().replace(b"K\x07K\x01\x86", b"K\x08K\x01\x86"))
    with pytest.raises(CheckpointError, match=r"'w' cannot be read: F64 \[8, 1\] needs 64 bytes, the file holds 56"):
        read_pickle(path)
