"""What calls in a pickle mean: the allowed ones give inert values, all others a record that says why."""

from __future__ import annotations

import argparse
import collections
import copyreg
import io
import pathlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from ckptsurgery.errors import CheckpointError
from ckptsurgery.storage.formats.plain_pickle import read_pickle
from ckptsurgery.storage.unpickling.inert import Array, Blob, Opaque, Storage, Tensor
from ckptsurgery.storage.unpickling.pickle_machine import Unpickler

Made = tuple[Any, ...]


class Call:
    """Pickles as a call of a function, with the state that the object would get."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Made:
        return self.parts


class Kept:
    """A storage, which a pickle of torch names by a persistent id."""

    def __init__(self, dtype: str | None = "F32", location: str = "cpu") -> None:
        self.identity = dtype, location


def load(value: object, protocol: int = 4) -> Any:
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> object:
            return thing.identity if isinstance(thing, Kept) else None

    data = io.BytesIO()
    Pickler(data, protocol).dump(value)
    raw = data.getvalue()
    return Unpickler(io.BytesIO(raw), len(raw), "x.pt", lambda it: Storage("0", it[0], 6, it[1])).load()


def read(data: bytes) -> Any:
    return Unpickler(io.BytesIO(data), len(data), "x.pt").load()


def note(value: object) -> str:
    found = load(value)
    assert type(found) is Opaque
    return str(found.note)


def view(kept: object, shape: object = (2, 3), strides: object = (3, 1), offset: object = 0, *bits: object) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, kept, offset, shape, strides, False, collections.OrderedDict(), *bits)


def typed(dtype: torch.dtype) -> Call:
    return Call(torch._utils._rebuild_tensor_v3, Kept("U8"), 0, (2,), (1,), False, collections.OrderedDict(), dtype)


# tensors


DEVICES = [torch._utils._rebuild_device_tensor_from_cpu_tensor, torch._utils._rebuild_device_tensor_from_numpy]


def test_a_view_has_the_places_that_the_pickle_gives() -> None:
    found = load(view(Kept(), offset=4, shape=(1, 2), strides=(2, 1)))
    assert type(found) is Tensor
    assert (found.offset, found.shape, found.strides, found.dtype) == (4, (1, 2), (2, 1), "F32")
    assert load(typed(torch.float8_e4m3fn)).dtype == "F8_E4M3"
    assert load(typed(torch.uint16)).dtype == "U16"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (view(Kept(location="meta")), "a meta tensor, which has no data"),
        (view(Kept(None)), "its dtype is unknown here"),
        (view(3), "its data come from a int"),
        (view(Kept(), (2, 3), (3,)), "its shape, strides or offset make no sense"),
        (view(Kept(), (2, -3)), "its shape, strides or offset make no sense"),
        (view(Kept(), (2, 3), (3, 1.0)), "its shape, strides or offset make no sense"),
        (view(Kept(), (1,) * 65, (1,) * 65), "it has 65 dimensions; 64 is the limit"),
        (typed(torch.quint8), "its dtype <torch.quint8> is unknown here"),
        (Call(torch._utils._rebuild_sparse_tensor, 1, 2), "a sparse tensor: save it after to_dense()"),
    ],
)
def test_what_is_not_a_plain_tensor_says_why(value: object, why: str) -> None:
    assert note(value) == why


def test_a_parameter_is_its_tensor_or_says_what_it_is_over() -> None:
    rebuild = torch._utils._rebuild_parameter
    found = load(Call(rebuild, view(Kept()), True, None))
    assert type(found) is Tensor and found.shape == (2, 3)
    sparse = Call(torch._utils._rebuild_sparse_tensor, 1, 2)
    assert note(Call(rebuild, sparse, True, None)) == "a sparse tensor: save it after to_dense()"
    assert note(Call(rebuild, Call(pathlib.Path.cwd), True, None)).startswith("a parameter over ")
    assert load(Call(rebuild, 3, True, None)).note is None


def test_a_subclass_is_its_tensor_or_says_why_not() -> None:
    rebuild, plain = torch._tensor._rebuild_from_type_v2, torch.nn.Parameter

    def made(function: Callable[..., Any], args: Made, state: Any) -> Any:
        return load(Call(rebuild, function, plain, args, state))

    args = view(Kept()).parts[1]
    function = torch._utils._rebuild_tensor_v2
    assert type(made(function, args, {"a": 1})) is Tensor
    assert "keeps its data in a form of its own" in made(function, args, {"a": view(Kept())}).note
    assert made(torch._utils._rebuild_sparse_tensor, (1, 2), {}).note == "a sparse tensor: save it after to_dense()"
    deep: Any = view(Kept())
    for _ in range(6):
        deep = [deep]
    assert type(made(function, args, {"a": deep})) is Tensor  # so deep no class keeps its elements


@pytest.mark.parametrize("function", DEVICES)
def test_tensors_of_other_devices_are_those_they_were_copied_to(function: Callable[..., Any]) -> None:
    found = load(Call(function, view(Kept()), torch.float32, "xla:0", False))
    assert type(found) is Tensor and found.shape == (2, 3)
    found = load(Call(function, numpy.ones(3, "f4"), torch.float32, "xla:0", False))
    assert type(found) is Array and found.shape == (3,)
    cast = "its data would have to be cast to <torch.bfloat16>"
    assert note(Call(function, view(Kept()), torch.bfloat16, "xla:0", False)) == cast
    assert note(Call(function, 3, torch.float32, "xla:0", False)) == "its data would have to be cast to <torch.float32>"


# plain values


class Defaults:
    """A `defaultdict` without a default as PyPy pickles it."""

    def __reduce__(self) -> Made:
        return collections.defaultdict, (None,), None, None, iter([("a", 1)])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Defaults(), {"a": 1}),
        (Call(str, "text"), "text"),
        (Call(bytes), b""),
        (Call(bytearray, b"abc"), b"abc"),
        (Call(bytes, "\xff", "latin1"), b"\xff"),
        (Call(pathlib.PurePosixPath), "/"),
        (Call(pathlib.PurePosixPath, "/", "a", "b"), "/a/b"),
        (Call(complex, 1, 2.5), 1 + 2.5j),
        (Call(copyreg._reconstructor, argparse.Namespace, object, None), {}),  # type: ignore[attr-defined]
        (Call(tuple, [1, 2]), (1, 2)),
        (Call(set, (1, 2)), {1, 2}),
    ],
)
def test_well_known_calls_give_plain_values(value: object, expected: object) -> None:
    found = load(value)
    assert found == expected and isinstance(found, type(expected))


@pytest.mark.parametrize(
    "value",
    [
        Call(str, 5),
        Call(str, b"text", "utf-8"),
        Call(bytes, 5),
        Call(bytes, "\xff", "utf-16"),
        Call(pathlib.PurePosixPath, 5),
        Call(complex, "1"),
        Call(list, "text"),
        Call(list, 5),
        Call(dict, 5),
        Call(argparse.Namespace, 5),
        Call(slice, 1, 2, 3),
        Call(copyreg._reconstructor, 5, 5, None),  # type: ignore[attr-defined]
    ],
)
def test_other_arguments_leave_a_record(value: Call) -> None:
    found = load(value)
    assert type(found) is Opaque
    assert (found.name, found.args) == (value.parts[0].__name__, value.parts[1])


def test_long_bytes_stay_in_the_file() -> None:
    for value in (b"x" * 100_000, Call(bytes, b"x" * 100_000), Call(bytearray, b"x" * 100_000)):
        found = load(value)
        assert type(found) is Blob and found.nbytes == 100_000


def test_long_bytes_among_the_extras_are_read_or_stay_a_record(tmp_path: pathlib.Path) -> None:
    data = bytes(range(256)) * 20
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"w": numpy.ones(3), "raw": data, "again": data[1:]}, 4))
    extras = read_pickle(path).extras
    assert extras["raw"] == data and extras["again"] == data[1:]
    record = Blob(3, 4, str(tmp_path / "none"))
    assert record.read() is record and repr(record) == "<4 bytes>"


def test_a_class_with_keyword_arguments_is_a_record() -> None:
    class Keywords:
        def __getnewargs_ex__(self) -> tuple[Made, dict[str, Any]]:
            return (1,), {"b": 2}

    Keywords.__qualname__ = Keywords.__name__
    globals()["Keywords"] = Keywords
    found = load(Keywords())
    assert (type(found), found.name, found.args) == (Opaque, "Keywords", ((1,), {"b": 2}))
    assert read(b"\x80\x04cargparse\nNamespace\n)}\x92.") == {}


# numpy


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("code", ["?", "u1", "i2", ">u4", "i8", "f2", ">f4", "f8"])
def test_scalars_have_their_values(code: str, protocol: int) -> None:
    value = numpy.array([1], code)[0]
    found = load(value, protocol)
    assert found == value.item() and type(found) is type(value.item())


def test_scalars_of_python_2_are_bytes_spelt_as_text() -> None:
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    assert read(scalar + b"S'\\x00\\x00\\x20\\x40'\ntR.") == 2.5
    assert type(read(scalar + b"I5\ntR.")) is Opaque


def test_scalars_that_are_no_numbers_are_records() -> None:
    for value in (numpy.datetime64(3, "s"), numpy.complex64(1), numpy.str_("a")):
        assert type(load(value)) is Opaque, value


def test_types_are_known_by_their_code_or_their_class() -> None:
    state = b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    found = read(b"cnumpy\ndtype\n(cml_dtypes\nbfloat16\nI00\nI01\ntR" + state + b".")
    assert (found.code, found.dtype, found.big_endian) == ("bfloat16", "BF16", False)
    assert type(read(b"cnumpy\ndtype\n(I5\nI00\nI01\ntR.")) is Opaque
    assert type(read(b"cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\nlist\n(I0\ntS'b'\ntR.")) is Opaque


@pytest.mark.parametrize("shape", [(1,) * 65, (-1,), (1.0,), ("1",)])
def test_arrays_of_no_shape_are_an_error(shape: Made) -> None:
    array = numpy.ones(1, "f4")
    function, args, state = array.__reduce__()
    assert load(Call(function, *args, state=state)).shape == (1,)
    odd = Call(function, *args, state=(state[0], shape, *state[2:]))
    with pytest.raises(CheckpointError) as caught:
        load(odd)
    assert [problem.code for problem in caught.value.diagnostics] == ["damaged-pickle"]


def test_a_file_that_cannot_be_read_on_is_an_error() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 2:
                raise OSError(5, "Input/output error")
            return super().read(size)

    with pytest.raises(CheckpointError) as caught:
        Unpickler(Failing(b"\x80\x04N."), 4, "x.pt").load()
    assert str(caught.value).startswith(
        "error[damaged-pickle]: the pickle in 'x.pt' cannot be read: Input/output error"
    )
