"""From a tensor's description to its bytes: views that reach outside, repeat or do not add up are refused by key."""

from __future__ import annotations

import pytest

from ckptsurgery.errors import CheckpointError
from ckptsurgery.specs import TensorSpec
from ckptsurgery.storage.formats.storages import StorageRun, place_all, place_array, place_tensor
from ckptsurgery.storage.unpickling.inert import Array, Blob, Joined, NumpyType, Storage, Tensor

FILE = "x.pt"


def tensor(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: str = "F32", offset: int = 0, shift: int = 0
) -> Tensor:
    return Tensor(Storage("0", dtype, 6, shift=shift), offset, shape, strides, dtype)


def array(shape: tuple[int, ...], data: bytes | Blob | None, code: str = "f4", big: bool = False) -> Array:
    made = Array()
    made.type, made.shape, made.data = NumpyType(code, big), shape, data
    return made


def run(nbytes: int, big_endian: bool = False) -> StorageRun:
    return StorageRun(FILE, 1000, nbytes, big_endian)


def test_views_lie_where_their_storage_does() -> None:
    entry = place_tensor(tensor((2, 3), (3, 1)), run(24))
    assert (entry.spec, entry.file, entry.offset, entry.strides) == (TensorSpec((2, 3), "F32"), FILE, 1000, None)
    entry = place_tensor(tensor((3, 2), (1, 3), offset=1, shift=2), run(36, big_endian=True))
    assert (entry.offset, entry.strides, entry.big_endian) == (1012, (1, 3), True)
    assert place_tensor(tensor((2, 1, 3), (3, 99, 1)), run(24)).strides is None  # a dimension of one has no stride
    assert place_tensor(tensor((6,), (1,), "U8"), run(6, big_endian=True)).big_endian is False


def test_packed_values_lie_two_to_a_byte() -> None:
    entry = place_tensor(tensor((2, 3), (3, 1), "F4", offset=1), run(7))
    assert (entry.spec, entry.offset) == (TensorSpec((2, 6), "F4"), 1001)


LARGE = (1 << 26) // 4
ODD = [
    (tensor((2, 3), (3, 1), offset=1), 24, "F32 [2, 3] at element 1 with strides [3, 1] reaches outside its"),
    (tensor((0,), (1,), offset=7), 24, "F32 [0] at element 7 with strides [1] reaches outside its storage of 24 bytes"),
    (tensor((LARGE + 1,), (0,)), 1 << 19, "F32 [16777217] repeats the 524288 bytes of its storage until they are 67,"),
    (tensor((2, 3), (1, 2), "F4"), 6, "a view of packed F4 values that is not contiguous"),
    (tensor((), (), "F4"), 6, "a view of packed F4 values that is not contiguous"),
    (tensor((2, 3), (3, 1), "F4", offset=1), 6, "it reaches outside its storage of 6 bytes"),
    (tensor((1 << 40, 1 << 40), (0, 0)), 6, "it "),
]  # fmt: skip


@pytest.mark.parametrize(("view", "nbytes", "why"), ODD)
def test_views_that_do_not_fit_are_refused(view: Tensor, nbytes: int, why: str) -> None:
    with pytest.raises(ValueError) as caught:
        place_tensor(view, run(nbytes))
    assert str(caught.value).startswith(why)


def test_views_that_repeat_a_little_are_read() -> None:
    assert place_tensor(tensor((LARGE,), (0,)), run(4)).strides == (0,)
    assert place_tensor(tensor((LARGE + 1,), (0,)), run((1 << 20) + 1)).strides == (0,)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (array((1,), None), "an array of f4 elements is no tensor"),
        (array((1,), b"1234", "U1"), "an array of U1 elements is no tensor"),
        (Array(), "an array of unknown elements is no tensor"),
        (array((2,), b"1234"), "F32 [2] needs 8 bytes, the file holds 4"),
        (array((2,), Blob(0, 9, FILE)), "F32 [2] needs 8 bytes, the file holds 9"),
        (array((-1,), b""), "its shape is none"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(odd: Array, why: str) -> None:
    with pytest.raises(ValueError) as caught:
        place_array(odd, FILE)
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("code", "data", "expected"),
    [("f4", b"\1\2\3\4", b"\4\3\2\1"), ("c8", b"\1\2\3\4\5\6\7\x08", b"\4\3\2\1\x08\7\6\5"), ("u1", b"\1", b"\1")],
)
def test_foreign_bytes_are_turned_element_by_element(code: str, data: bytes, expected: bytes) -> None:
    entry = place_array(array((1,), data, code, big=True), FILE)
    assert entry.tensor.pieces == (expected,) and entry.big_endian is False


SLICES = [
    ([array((1,), b"1234"), array((1,), b"12345678", "f8")], "its slices are not of one kind"),
    ([array((1,), b"1234"), array((1, 1), b"1234")], "its slices are not of one kind"),
    ([array((1,), b"1234"), array((1,), Blob(0, 4, FILE), big=True)], "its slices are not of one kind"),
    ([array((1,), b"1234")], "its slices do not add up to F32 [2]"),
]


@pytest.mark.parametrize(("slices", "why"), SLICES)
def test_slices_that_do_not_fit_are_refused(slices: list[Array], why: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        place_all({"w": Joined(slices, (2,), "F32")}, lambda storage: run(0), FILE)
    (problem,) = caught.value.diagnostics
    assert (problem.code, problem.headline) == ("damaged-tensor", f"'w' cannot be read: {why}")


def test_an_error_lists_at_most_200_tensors() -> None:
    leaves = {f"w{n}": tensor((9,), (1,)) for n in range(300)}
    with pytest.raises(CheckpointError) as caught:
        place_all(leaves, lambda storage: run(4), FILE)
    assert len(caught.value.diagnostics) == 200
    assert "'w199' cannot be read" in caught.value.diagnostics[-1].headline
