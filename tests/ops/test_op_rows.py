from __future__ import annotations

import pytest
import torch

from ckptsurgery.ops import OpError, make_op
from ckptsurgery.specs import TensorSpec

TABLE = torch.arange(8.0).reshape(4, 2)


def run(name, tensor, *args, **keywords):
    (result,) = make_op(name, args, keywords).run((tensor,))
    return result


def test_a_slice_is_cut_where_it_is_written_and_never_clipped():
    assert run("slice_rows", TABLE, 1, 3).tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert run("slice_rows", TABLE, 4).shape == (0, 2)
    for start, stop in [(0, 5), (-1, 2), (3, 2), (5, None)]:
        with pytest.raises(OpError, match="rows 0 to 3 only"):
            make_op("slice_rows", (start, stop)).infer((TensorSpec([4, 2], "F32"),))
    with pytest.raises(OpError, match="has none"):
        make_op("slice_rows").infer((TensorSpec([], "F32"),))


def test_rows_are_combined_as_a_sparse_matrix_does():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    old[2, 0] = -0.0
    matrix = torch.randn(6, 9, generator=generator, dtype=torch.float64) * (torch.rand(6, 9, generator=generator) < 0.4)
    matrix[1] = 0
    matrix[1, 2] = 1
    new, rows = matrix.nonzero().T.tolist()
    weights = matrix[new, rows].tolist()
    made = run("combine_rows", old, 6, new, rows, weights, fill="zeros")
    torch.testing.assert_close(made, torch.sparse.mm(matrix.to_sparse(), old))
    assert made[1].view(torch.int64).tolist() == old[2].view(torch.int64).tolist()
    assert run("combine_rows", old, 2, [0], [3], [1], fill="mean")[1].equal(old.mean(0))
    half = run("combine_rows", old.half(), 6, new, rows, weights, fill="zeros")
    torch.testing.assert_close(half, (matrix @ old.half().double()).half(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((2, [0], [0, 1], [1]), "one length"),
        ((2, [2], [0], [1]), "without a 2"),
        ((2, [0], [4], [1]), "no row 4"),
        ((2, [0], [0], [1]), "1 new rows have no entry"),
    ],
)
def test_a_sparse_matrix_that_does_not_fit_is_refused(arguments, text):
    with pytest.raises(OpError, match=text):
        make_op("combine_rows", arguments).infer((TensorSpec([4, 2], "F32"),))


def test_padding_reaches_the_next_multiple_and_its_inverse_cuts_it_off():
    padded = run("pad_to_multiple", TABLE, 3, value=-1)
    assert padded.tolist() == [*TABLE.tolist(), [-1.0, -1.0], [-1.0, -1.0]]
    assert run("pad_to_multiple", TABLE, 4).tolist() == TABLE.tolist()
    assert str(make_op("pad_to_multiple", (3,)).inverse((TensorSpec([4, 2], "F32"),))) == "slice_rows(stop=4)"


@pytest.mark.parametrize(("dtype", "value"), [("U8", -1), ("I32", 0.5), ("BOOL", 2), ("F16", 1e6), ("F8_E4M3", 500.0)])
def test_padding_with_a_value_that_the_dtype_cannot_hold_is_refused_from_the_header(dtype, value):
    with pytest.raises(OpError, match=dtype):
        make_op("pad_to_multiple", (3, value)).infer((TensorSpec([4], dtype),))


@pytest.mark.parametrize(("fill", "row"), [("mean", [3.0, 4.0]), ("zeros", [0.0, 0.0])])
def test_new_rows_are_the_mean_or_zeros(fill, row):
    assert run("resize_rows", TABLE, 6, fill).tolist() == [*TABLE.tolist(), row, row]
    assert run("resize_rows", TABLE, 2, fill).tolist() == TABLE[:2].tolist()


def test_a_map_says_which_old_row_each_new_one_takes_and_the_rest_is_filled():
    table = run("resize_rows", TABLE, 3, "zeros", rows=(("0", 3), ("2", 3)))
    assert table.tolist() == [[6.0, 7.0], [0.0, 0.0], [6.0, 7.0]]
    listed = run("resize_rows", TABLE, 3, "zeros", rows=(2, 0))
    assert listed.tolist() == [[4.0, 5.0], [0.0, 1.0], [0.0, 0.0]]
    assert run("resize_rows", torch.arange(4), 2, rows=(3, 1)).tolist() == [3, 1]


def test_a_map_that_keeps_every_row_has_an_exact_inverse():
    permuted = make_op("resize_rows", (5, "zeros"), {"rows": (2, 0, 3, 1)})
    inverse = permuted.inverse((TensorSpec([4, 2], "F32"),))
    assert torch.equal(inverse.run(permuted.run((TABLE,)))[0], TABLE)
    assert make_op("resize_rows", (5,), {"rows": (2, 0)}).inverse((TensorSpec([4, 2], "F32"),)) is None
    assert make_op("resize_rows", (3,)).inverse((TensorSpec([4, 2], "F32"),)) is None


def test_rows_that_are_not_there_are_named():
    with pytest.raises(OpError, match="has no row 4, 9"):
        make_op("resize_rows", (5,), {"rows": (9, 4, 0)}).infer((TensorSpec([4, 2], "F32"),))
    with pytest.raises(OpError, match="no rows to take a mean of"):
        make_op("resize_rows", (5,)).infer((TensorSpec([0, 2], "F32"),))
    with pytest.raises(OpError, match="computes with floats"):
        make_op("resize_rows", (5,)).infer((TensorSpec([4], "I64"),))


def test_drawn_rows_have_the_mean_and_the_scaled_covariance_of_the_old_ones():
    generator = torch.Generator().manual_seed(0)
    old = (
        torch.randn(50, 3, generator=generator) @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 3.0]]) + 5
    )
    drawn = run("resize_rows", old, 200_050, "normal", scale=0.01)[50:]
    assert torch.allclose(drawn.mean(0), old.mean(0), atol=0.01)
    assert torch.allclose(drawn.T.cov(correction=0), 0.01 * old.T.cov(correction=0), atol=2e-3)


def test_drawn_rows_depend_on_the_seed_alone_and_leave_the_global_generator():
    state = torch.get_rng_state()
    first, again, other = (run("resize_rows", TABLE, 6, "normal", seed=s)[4:] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_more_dims_are_filled_whole():
    table = torch.arange(12, dtype=torch.bfloat16).reshape(2, 2, 3)
    assert torch.equal(run("resize_rows", table, 3)[2], table.float().mean(0).bfloat16())
