"""Ops that pick entries by index, and ops on rows along any axis, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgery.ops import OpError, make_op
from ckptsurgery.ops.base import AxisPlace
from ckptsurgery.ops.listing import Listing
from ckptsurgery.ops.numerics import specs_of
from ckptsurgery.specs import TensorSpec

TABLE = torch.arange(8.0).reshape(4, 2)


def test_siblings_are_numpys_delete_and_insert() -> None:
    (dropped,) = make_op("drop_rows", ((3, 1),)).run((TABLE,))
    assert np.array_equal(dropped.numpy(), np.delete(TABLE.numpy(), [3, 1], axis=0))
    (added,) = make_op("insert_rows", ((0, 2, 5), 9)).run((TABLE[:3],))
    assert added[:, 0].tolist() == [9.0, 0.0, 9.0, 2.0, 4.0, 9.0]
    assert torch.equal(make_op("drop_rows", ((0, 2, 5),)).run((added,))[0], TABLE[:3])


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_an_op_on_rows_works_along_an_axis_that_is_merged_with_others(
    data: st.DataObject, outer: int, size: int, inner: int
) -> None:
    tensor = torch.arange(2.0 * outer * size * inner * 3).reshape(2, outer * size * inner, 3)
    apart = tensor.reshape(2, outer, size, inner, 3).numpy()
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    place = AxisPlace(1, outer, size, inner)
    for op, wanted in (
        (make_op("take", ("h", tuple(ids))), np.take(apart, ids, axis=2)),
        (make_op("drop_rows", (tuple(set(ids)), "h")), np.delete(apart, sorted(set(ids)), axis=2)),
        (make_op("slice_rows", (0, ids[0]), {"axis": "h"}), apart[:, :, : ids[0]]),
        (make_op("resize_rows", (size + 1, "mean"), {"axis": "h"}), None),
    ):
        placed = op.placed(place)
        (made,) = placed.run((tensor,))
        assert specs_of((made,)) == placed.infer(specs_of((tensor,)))
        if wanted is not None:
            assert np.array_equal(made.numpy(), wanted.reshape(2, -1, 3))


def test_a_permutation_of_a_merged_axis_comes_back() -> None:
    place = AxisPlace(0, 2, 3, 2)
    op = make_op("take", ("h", (2, 0, 1))).placed(place)
    tensor = torch.arange(24.0).reshape(12, 2)
    back = op.inverse(specs_of((tensor,)))
    assert back is not None
    assert torch.equal(back.run(op.run((tensor,)))[0], tensor)
    assert make_op("take", ("h", (0, 0, 1))).placed(place).inverse(specs_of((tensor,))) is None


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("take", ("x", (4,)), r"take\(\[4\]\): there is no entry 4 among 4"),
        ("take", ("x", (-1,)), "no entry -1 among 4"),
        ("take", ("x", (0, 1, 1, 2), True), "not a permutation of 4"),
        ("take", ("x", Listing(range(100, 400), "kept")), r"take\(kept\): there is no entry 100 among 4"),
        ("take", ("x", tuple(range(100, 400))), r"take\(300 indices\): there is no entry"),
        ("drop_rows", ((1, 1),), "an index stands twice"),
        ("insert_rows", ((9,),), "no entry 9 among 5"),
    ],
)
def test_an_index_that_is_not_there_is_refused_without_printing_a_long_list(name: str, args: tuple, text: str) -> None:
    with pytest.raises(OpError, match=text):
        make_op(name, args).infer((TensorSpec([4, 2], "F32"),))
