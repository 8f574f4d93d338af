"""Tensors in chunks: whatever order the bytes of a chunk have in its file, the elements are those of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.storage.checkpoint import Checkpoint
from ckptsurgery.storage.chunked_tensors import Chunk, Chunked, read_range
from ckptsurgery.storage.contents import Contents, Entry
from ckptsurgery.storage.sources.files import OpenFiles
from ckptsurgery.storage.tensors import spec_of, swap_bytes

HEAD = b"head"


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def swapped(tensor: torch.Tensor) -> bytes:
    parts = torch.view_as_real(tensor).contiguous() if tensor.is_complex() else tensor.contiguous()
    return parts.numpy().byteswap().tobytes()


def stored(part: torch.Tensor, how: str, path: Path) -> Entry:
    """A chunk's entry, whose elements lie in one of several ways."""
    spec = spec_of(part)
    if how == "in memory":
        return Entry(spec, tensor=part)
    if how == "made when asked for":
        return Entry(spec, tensor=part.clone)
    turned = "columns" in how
    laid = part.T if turned else part
    path.write_bytes(HEAD + (swapped(laid) if "swapped" in how else raw(laid)))
    strides = (1, part.shape[0]) if turned else None
    return Entry(spec, str(path), len(HEAD), strides, "swapped" in how)


@pytest.mark.parametrize(
    "how", ["rows", "columns", "swapped rows", "swapped columns", "in memory", "made when asked for"]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.complex64, torch.complex128])
def test_a_chunk_is_read_as_it_lies(tmp_path: Path, how: str, dtype: torch.dtype) -> None:
    whole = torch.arange(1, 31).reshape(6, 5).to(dtype)
    if dtype.is_complex:
        whole = whole + 0.5j
    parts = {(0, 0): whole[:4, :2], (0, 2): whole[:4, 2:], (4, 0): whole[4:]}
    chunks = tuple(Chunk(low, stored(part, how, tmp_path / f"{low}")) for low, part in parts.items())
    chunked = Chunked(spec_of(whole), chunks)
    assert torch.equal(chunked(), whole)
    files = OpenFiles({chunk.place.file for chunk in chunks if chunk.place.file})
    start, stop = 3 * whole.element_size(), 23 * whole.element_size()
    assert bytes(read_range(chunked, start, stop, files.read_into)) == raw(whole)[start:stop]
    files.close()


@pytest.mark.parametrize(("dtype", "width"), [("BF16", 2), ("F32", 4), ("F64", 8), ("C64", 4), ("C128", 8), ("I8", 1)])
def test_bytes_are_swapped_within_a_number(dtype: str, width: int) -> None:
    data = bytes(range(32))
    expected = b"".join(data[at : at + width][::-1] for at in range(0, 32, width))
    assert swap_bytes(bytearray(data), dtype) == expected


def laid(how: str, path: Path) -> tuple[Checkpoint, torch.Tensor]:
    tensor = torch.arange(12.0).reshape(3, 4)
    if how == "chunks":
        entry = Entry(spec_of(tensor), tensor=Chunked(spec_of(tensor), (Chunk((0, 0), stored(tensor, "rows", path)),)))
        return Checkpoint(Contents({"w": entry}), "an example"), tensor
    return Checkpoint(Contents({"w": stored(tensor, how, path)}), "an example"), tensor


@pytest.mark.parametrize("how", ["rows", "columns", "swapped rows", "chunks", "in memory"])
def test_ranges_of_a_tensor_are_ranges_of_its_rows(tmp_path: Path, how: str) -> None:
    checkpoint, tensor = laid(how, tmp_path / "x.bin")
    with checkpoint:
        for start, stop in ((0, 48), (5, 21), (47, 48), (48, 48)):
            buffer = bytearray(stop - start)
            checkpoint.read_into("w", start, memoryview(buffer))
            assert bytes(buffer) == bytes(checkpoint.read("w", start, stop)) == raw(tensor)[start:stop]
        with pytest.raises(cs.CheckpointError, match=r"bad-range.*bytes 40 to 50 are not within the tensor's 48"):
            checkpoint.read_into("w", 40, memoryview(bytearray(10)))


def test_a_checkpoint_is_shown_by_what_it_holds(tmp_path: Path) -> None:
    w = torch.ones(3, 4)
    cs.save({"a": w, "b": w, "c": torch.ones(4)}, tmp_path / "x.pt")
    with cs.open(tmp_path / "x.pt") as one:
        assert "3 tensors" in repr(one) and "1 tied" in repr(one)
        assert "files" not in repr(one) and "extras" not in repr(one)
    cs.save({"a": w, "c": torch.ones(4)}, tmp_path / "shards", max_shard_size=50)
    torch.save({"state_dict": {"a": w}, "epoch": 3}, tmp_path / "y.pt")
    with cs.open(tmp_path / "shards") as several, cs.open(tmp_path / "y.pt") as more:
        assert "2 files" in repr(several) and "tied" not in repr(several)
        assert repr(more).endswith("1 extra)") or "1 extra>" in repr(more)


def test_a_lazy_tensor_without_dimensions_has_no_length() -> None:
    with cs.open({"n": torch.tensor(3), "w": torch.ones(5, 2)}) as checkpoint:
        assert len(checkpoint["w"]) == 5
        with pytest.raises(TypeError, match=r"len\(\) of a tensor without dimensions"):
            len(checkpoint["n"])


@pytest.mark.parametrize(("nbytes", "mapped"), [(1 << 20, True), ((1 << 20) - 4, False)])
def test_tensors_are_mapped_from_a_mebibyte_on(tmp_path: Path, nbytes: int, mapped: bool) -> None:
    path = tmp_path / "x.safetensors"
    cs.save({"w": torch.ones(nbytes // 4)}, path)
    with cs.open(path) as checkpoint:
        tensor = checkpoint.load("w")
        assert (str(path) in Path("/proc/self/maps").read_text()) is mapped
        assert tensor.sum() == nbytes // 4
