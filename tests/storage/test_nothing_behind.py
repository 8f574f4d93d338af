"""A file that goes on behind its end is refused in every format: what is there would be left out without a word."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ckptsurgery as cs

STATE = {"a": torch.ones(3), "b": torch.zeros(2)}
DATA = Path(__file__).parents[1] / "data" / "formats"


def stream(state: dict[str, Tensor]) -> bytes:
    """A torch file in memory."""
    held = io.BytesIO()
    torch.save(state, held)
    return held.getvalue()


def archive(data: bytes) -> bytes:
    """A tar archive of one checkpoint."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        member = tarfile.TarInfo("model_weights.ckpt")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return held.getvalue()


def written(suffix: str, folder: Path) -> bytes:
    """The bytes of a small checkpoint in the format of a suffix."""
    path = folder / f"made{suffix}"
    if suffix in (".npz", ".npy"):
        write = {".npz": lambda: np.savez(path, **{k: v.numpy() for k, v in STATE.items()})}
        write[".npy"] = lambda: np.save(path, STATE["a"].numpy())
        write[suffix]()
    elif suffix == ".pth":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    elif suffix == ".pt.gz":
        return gzip.compress(stream(STATE))
    elif suffix == ".nemo":
        return archive(stream(STATE))
    elif suffix == ".h5":
        found = DATA / "new.h5"
        return found.read_bytes() if found.exists() else lzma.decompress((DATA / "new.h5.xz").read_bytes())
    else:
        cs.save(STATE, path)
    return path.read_bytes()


SUFFIXES = [".safetensors", ".pt", ".pth", ".npz", ".npy", ".msgpack", ".gguf", ".pt.gz", ".nemo", ".h5"]


@pytest.mark.parametrize("behind", ["another file", "noise"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_behind_the_end_is_not_left_out(suffix: str, behind: str, tmp_path: Path) -> None:
    data = written(suffix, tmp_path)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data)
    with cs.open(path) as checkpoint:
        assert len(checkpoint)
    path.write_bytes(data + (data if behind == "another file" else b"\0\0noise" * 5))
    with pytest.raises(cs.CheckpointError) as refused, cs.open(path) as checkpoint:
        checkpoint.state_dict()
    assert refused.value.diagnostics[0].help


@pytest.mark.parametrize("suffix", [".gguf", ".nemo", ".h5"])
def test_zeros_that_a_writer_pads_with_are_no_harm(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(written(suffix, tmp_path) + bytes(3 << 20))
    with cs.open(path) as checkpoint:
        assert len(checkpoint)
