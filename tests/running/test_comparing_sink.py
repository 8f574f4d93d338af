"""What was written is compared byte for byte, the first and the last of each tensor and of each piece too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.planning.costing import CHUNK
from ckptsurgery.running.sinks.comparing import WrittenSink

SIZES = {"small": 1, "long": CHUNK + 3, "last": 5}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "three.safetensors"
    cs.save({key: torch.arange(size).to(torch.uint8) for key, size in SIZES.items()}, path)
    return path


@pytest.mark.parametrize(
    ("key", "at"), [("small", 0), *(("long", at) for at in (0, 1, CHUNK - 1, CHUNK, -1)), ("last", 4)]
)
def test_one_byte_that_differs_is_found_in_its_tensor(written: Path, key: str, at: int) -> None:
    with cs.open(written) as checkpoint:
        sink = WrittenSink(checkpoint, SIZES)
        whole = b"".join(
            bytes(checkpoint.load(name).numpy())
            for _, _, name in sorted((p.file, p.offset, k) for k, p in sink.places.items())
        )
        begin = min(place.offset for place in sink.places.values())
        place = sink.places[key]
        sink.write(place.file, begin, whole)
        assert not sink.wrong
        changed = bytearray(whole)
        changed[place.offset - begin + at % place.nbytes] ^= 1
        sink.write(place.file, begin, changed)
        assert sink.wrong == {key}
        alone = WrittenSink(checkpoint, SIZES)
        alone.put(
            key, torch.frombuffer(changed, dtype=torch.uint8)[place.offset - begin :][: place.nbytes], borrowed=True
        )
        assert alone.wrong == {key}
