"""GGUF files: read as the gguf package reads them, and written byte for byte as it writes them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ckptsurgery as cs

DATA = Path(__file__).parents[1] / "data" / "formats"
REAL = DATA / "all.gguf"


def test_tensors_are_what_the_package_reads() -> None:
    theirs = load_file(DATA / "all.gguf.safetensors")
    with cs.open(REAL) as checkpoint:
        assert set(checkpoint) == set(theirs)
        for key, tensor in theirs.items():
            found = checkpoint[key].load()
            if key == "packed.BF16":  # numpy has no bfloat16, so the package gives bytes
                assert found.dtype == torch.bfloat16
                tensor = tensor.view(torch.bfloat16).reshape(found.shape)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), key


def test_pairs_are_the_config_and_packed_types_are_named() -> None:
    with cs.open(REAL) as checkpoint:
        config = checkpoint.config
        assert config is not None
        assert config["general"] == {"architecture": "tiny", "name": "größe"}
        assert config["tiny"]["uint64"] == config["tiny"]["int8"] == 7
        assert config["tiny"]["float64"] == 0.1
        assert config["tiny"]["flag"] is True
        about = checkpoint.extras["gguf"]
        assert about["metadata"]["tokenizer.ggml.tokens"] == ["<s>", "a", "\n"]
        assert about["tensor_types"] == {
            f"packed.{name}": name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
        }
        assert checkpoint["packed.Q8_0"].shape == (2, 512 // 32 * 34)


def test_what_is_written_again_is_the_same_file(tmp_path: Path) -> None:
    with cs.open(REAL) as checkpoint:
        cs.save(checkpoint, tmp_path / "new.gguf")
    assert (tmp_path / "new.gguf").read_bytes() == REAL.read_bytes()


def test_names_and_dtypes_change_and_the_pairs_stay(tmp_path: Path) -> None:
    with cs.open(REAL) as checkpoint:
        plan = cs.plan(checkpoint, ["vector -> v | cast(bf16)", "plain.{k} -> p.{k}", "packed.{k} -> packed.{k}"])
        plan.save(tmp_path / "new.gguf", beside="keep")
        with cs.open(tmp_path / "new.gguf") as made:
            assert made.extras["gguf"] == checkpoint.extras["gguf"]
            assert torch.equal(made["v"].load(), checkpoint["vector"].load().bfloat16())
            assert torch.equal(made["p.I64"].load(), checkpoint["plain.I64"].load())
            assert bytes(made.read("packed.Q5_1")) == bytes(checkpoint.read("packed.Q5_1"))


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cs.CheckpointError, match=r"dtype-not-in-format.*flag BOOL"):
        cs.save({"flag": torch.tensor([True])}, tmp_path / "x.gguf")
    with pytest.raises(cs.CheckpointError, match="dtype-not-in-format"):
        cs.save({"deep": torch.ones(1, 1, 1, 1, 1)}, tmp_path / "x.gguf")
    shared = torch.ones(2)
    with pytest.raises(cs.CheckpointError, match="tie-not-in-format"):
        cs.save({"a": shared, "b": shared}, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_cut_and_changed_files_are_refused_or_read_within_bounds(tmp_path: Path) -> None:
    data, rng = REAL.read_bytes(), random.Random(0)
    header = data.index(b"packed.MXFP4") + 60
    for number in range(1500):
        changed = bytearray(data[: rng.randrange(4, len(data))] if number % 3 == 0 else data)
        for _ in range(rng.randint(0, 3)):
            at = rng.randrange(4, min(header, len(changed)))
            changed[at] = rng.choice([0, 1, 255, rng.randrange(256)])
        (tmp_path / "x.gguf").write_bytes(changed)
        try:
            with cs.open(tmp_path / "x.gguf") as checkpoint:
                for key, tensor in checkpoint.items():
                    assert len(checkpoint.read(key)) == tensor.nbytes
        except cs.CkptSurgeryError as error:
            assert all(d.code != "unforeseen" and d.place and d.help for d in error.diagnostics), error
