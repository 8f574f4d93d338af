"""What a header may announce: sizes that fit 64 bits, whole bytes, and a length that can hold it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckptsurgery.errors import CheckpointError
from ckptsurgery.specs import MOST_DIMENSIONS, TensorSpec, shape_problem
from ckptsurgery.storage import open_checkpoint
from ckptsurgery.storage.formats.cursor import Damaged, HeaderCursor
from ckptsurgery.storage.formats.format import OpenedSource
from ckptsurgery.storage.sources.byte_source import MemoryBuffer
from ckptsurgery.storage.tensors import torch_shape

sizes = st.integers(0, 3) | st.integers(0, 62).map(lambda n: 1 << n) | st.integers(0, 1 << 64)


@given(st.lists(sizes, max_size=6), st.sampled_from([4, 6, 8, 16, 32, 64]))
@example([1 << 60], 8)
@example([(1 << 60) - 1], 8)
@example([0, (1 << 60) - 1], 8)
@example([0, 1 << 60], 8)
@example([0, 0, (1 << 59) - 1, 2], 8)
@example([1] * MOST_DIMENSIONS, 8)
@example([1] * (MOST_DIMENSIONS + 1), 8)
def test_a_shape_is_sound_when_its_size_in_bits_fits_64(shape: list[int], bits: int) -> None:
    fits = len(shape) <= MOST_DIMENSIONS and bits * math.prod(n or 1 for n in shape) < 1 << 63
    assert (shape_problem(shape, bits) is None) is fits


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_values_of_four_bits_lie_in_pairs_along_the_last_dimension(shape: list[int]) -> None:
    spec = TensorSpec(shape, "F4")
    if shape[-1] % 2:
        with pytest.raises(CheckpointError):
            torch_shape(spec, "key")
    else:
        assert torch_shape(spec, "key") == (*shape[:-1], shape[-1] // 2)


@pytest.mark.parametrize("length", [0, 1])
def test_a_header_that_is_too_short_is_told_as_such(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" * 8)
    with pytest.raises(CheckpointError, match=f"a header of {length} bytes cannot hold a JSON object"):
        open_checkpoint(path)


def test_the_shortest_header_is_an_empty_object(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint


@pytest.mark.parametrize("field", ["shape", "data_offsets"])
@pytest.mark.parametrize("text", ["1.5", "1e0", "Infinity", "NaN"])
def test_a_number_that_is_no_integer_is_quoted_as_it_is_written(field: str, text: str, tmp_path: Path) -> None:
    row = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    whole = json.dumps({"a": row}).replace(json.dumps(row[field]), f"[{text}, {text}]")
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(whole).to_bytes(8, "little") + whole.encode() + b"x")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert f"[{text}, {text}]" in caught.value.diagnostics[0].headline


def test_a_part_of_a_header_ends_where_it_ends() -> None:
    with OpenedSource(MemoryBuffer("x", bytes(range(20)))) as opened:
        part = HeaderCursor(opened, 4, 9)
        assert (part.left, part.take(5), part.left) == (5, bytes(range(4, 9)), 0)
        for cursor, nbytes in [(part, 1), (HeaderCursor(opened, 4, 9), 6), (HeaderCursor(opened, 4), 17)]:
            with pytest.raises(Damaged):
                cursor.take(nbytes)
