"""A folder's shards keep the order of the keys, are as full as the limit allows, and no fuller."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgery.storage import open_checkpoint
from ckptsurgery.storage.output.writing import WriterOptions, open_writer


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 20))
def test_a_shard_is_full_when_the_next_tensor_would_exceed_the_limit(sizes: list[int], limit: int) -> None:
    state = {f"k{number}": torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}
    with tempfile.TemporaryDirectory() as folder:
        source = open_checkpoint(state)
        with open_writer(Path(folder) / "out", source.specs, WriterOptions(max_shard_size=limit)) as writer:
            for key in writer.order:
                writer.write(writer.places[key].file, writer.places[key].offset, source.read(key))
            file_of = {key: writer.places[key].file for key in state}
        assert list(writer.order) == list(state)

    shards: list[int] = []
    previous = None
    for key, tensor in state.items():
        if file_of[key] == previous:
            shards[-1] += tensor.numel()
            assert shards[-1] <= limit
        else:
            if shards:
                assert shards[-1] + tensor.numel() > limit
            shards.append(tensor.numel())
        previous = file_of[key]
    assert len(shards) == len(set(file_of.values()))
