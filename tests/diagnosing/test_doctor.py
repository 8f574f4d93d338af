"""`doctor` finds each illness alone, says what to do about it, and calls what is sound sound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckptsurgery as cs
from ckptsurgery.storage.output.transactions import MARK, Replacement

torch.manual_seed(0)
W = torch.randn(32, 16)
SOUND = {"embed.weight": W, "head.bias": torch.randn(32)}


def codes(source: Any, **options: Any) -> dict[str, str]:
    """Code -> severity of all findings, each of which has a remedy."""
    found = cs.doctor(source, **options)
    assert all(finding.help for finding in found.findings)
    assert all(finding.code in str(found) for finding in found.findings)
    json.dumps(found.to_json())
    return {finding.code: finding.severity for finding in found.findings}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, an index, a config: nothing is wrong with them."""
    cs.save({"a": W, "b": W + 1}, tmp_path / "m", max_shard_size=W.nbytes)
    (tmp_path / "m" / "config.json").write_text('{"vocab_size": 32}')
    return tmp_path / "m"


def test_what_is_sound_has_no_findings(folder: Path) -> None:
    assert codes(SOUND) == {}
    assert codes(folder) == {}
    assert str(cs.doctor(SOUND)) == f"state_dict: 2 tensors, {W.nbytes + 128:,} bytes read: sound"


def changed(**values: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**SOUND, **values}


def spotted(value: float, share: float = 0.5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = torch.randn(64, 16).to(dtype)
    tensor.view(-1)[: int(share * tensor.numel())] = value
    return tensor


MASK = torch.triu(torch.full((8, 8), float("-inf")), 1)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (changed(x=spotted(float("nan"))), {"nan": "error"}),
        (changed(x=spotted(float("nan"), 0.001)), {"nan": "error"}),
        (changed(x=spotted(float("inf"))), {"inf": "error"}),
        (changed(x=spotted(float("-inf"))), {"inf": "error"}),
        (changed(x=MASK), {"mask": "note"}),
        (changed(x=torch.zeros(8, 8)), {"dead-tensor": "warning"}),
        (changed(x=torch.full((8, 8), 3.0)), {"constant-tensor": "warning"}),
        (changed(x=torch.ones(64)), {"constant-vector": "note"}),
        (changed(x=torch.zeros(2, 2)), {}),
        (changed(x=torch.zeros(64, dtype=torch.int64)), {}),
        (changed(x=spotted(1e-40)), {"denormals": "warning"}),
        (changed(x=spotted(1e-40, 0.001)), {}),
        (changed(x=spotted(1e-7, dtype=torch.float16)), {"dtype-mix": "note", "denormals": "warning"}),
        (changed(x=torch.complex(spotted(float("nan")), W.new_zeros(64, 16))), {"nan": "error"}),
        (changed(x=spotted(float("nan")).to(torch.float8_e5m2)), {"dtype-mix": "note", "nan": "error"}),
        (changed(x=W.clone()), {"lost-tie": "warning"}),
        (changed(x=W), {}),
        (changed(x=SOUND["head.bias"].clone()), {"repeated-vector": "note"}),
        (changed(x=W.bfloat16()), {"dtype-mix": "note"}),
        (changed(x=torch.ones(0, 4)), {"empty-tensors": "note"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stored", [False, True])
def test_each_illness_of_values_is_found_alone(
    state: dict[str, torch.Tensor], found: dict[str, str], stored: bool, tmp_path: Path
) -> None:
    if not stored:
        assert codes(state) == found
        return
    cs.save(state, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert codes(tmp_path / "x.safetensors") == found
    assert set(codes(tmp_path / "x.safetensors", values=False)) <= {"dtype-mix", "empty-tensors"}


def test_values_are_found_across_blocks(tmp_path: Path) -> None:
    long = torch.zeros(3 << 20)
    long[-1] = 1
    assert codes({"x": long}) == {}
    long[-1] = float("nan")
    assert codes({"x": long}) == {"nan": "error"}


def test_an_index_is_held_against_its_shards_both_ways(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first, second = sorted(set(whole["weight_map"].values()))
    save_file({"a": W, "extra": W - 1}, folder / first)
    save_file({"stray": W}, folder / "old.safetensors")
    assert codes(folder) == {"unlisted-keys": "warning", "stray-file": "warning"}
    save_file({"b": W + 1, "a": W * 2}, folder / second)
    assert codes(folder)["duplicate-key"] == "warning"
    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "c": first}}))
    assert codes(folder)["missing-key-in-shard"] == "error"
    (folder / second).unlink()
    assert codes(folder)["missing-shard"] == "error"
    assert not cs.doctor(folder).healthy


def test_what_a_killed_save_left_is_told(folder: Path) -> None:
    save_file({"new": W}, folder / f".model.safetensors{MARK}7-12345678")
    assert codes(folder) == {"unfinished-output": "note"}
    Replacement(folder, (), ((f".model.safetensors{MARK}7-12345678", "model.safetensors"),), ()).write()
    assert codes(folder)["interrupted-save"] == "warning"


def test_a_missing_config_a_padded_vocabulary_and_two_formats_are_told(folder: Path) -> None:
    (folder / "config.json").write_text('{"text_config": {"vocab_size": 29}}')
    assert codes(folder) == {"padded-vocabulary": "note"}
    (folder / "config.json").unlink()
    torch.save({"w": W}, folder / "pytorch_model.bin")
    assert codes(folder) == {"pickle": "warning", "two-formats": "note", "missing-config": "note"}


def test_an_index_of_pickles_is_held_against_its_shards_too(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    torch.save({"a": W}, tmp_path / names[0])
    torch.save({"b": W + 1, "extra": W - 1}, tmp_path / names[1])
    index = {"metadata": {"total_size": 2 * W.nbytes}, "weight_map": dict(zip("ab", names))}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    assert codes(tmp_path) == {"unlisted-keys": "warning", "pickle": "warning"}
    torch.save({"stray": W}, tmp_path / "old.bin")
    assert codes(tmp_path)["stray-file"] == "warning"


def test_an_index_that_counts_other_bytes_is_told(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["metadata"]["total_size"] += 4
    index.write_text(json.dumps(told))
    assert codes(folder) == {"total-size": "warning"}


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 10**5])
def test_a_config_that_cannot_be_read_is_told(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert codes(folder) == {"bad-config": "warning"}


def test_ties_that_the_config_declares_must_hold(tmp_path: Path) -> None:
    words = torch.randn(64, 16)
    for head, found in ((words + 1, {"ties-differ": "warning"}), (words.clone(), {"lost-tie": "warning"})):
        save_file({"e.w": words, "head.w": head, "mlp.w": torch.randn(16, 64)}, tmp_path / "x.safetensors")
        (tmp_path / "config.json").write_text('{"vocab_size": 64, "tie_word_embeddings": true}')
        assert codes(tmp_path) == found
    (tmp_path / "config.json").write_text('{"vocab_size": 64, "tie_word_embeddings": false}')
    save_file({"e.w": words, "head.w": words + 1}, tmp_path / "x.safetensors")
    assert codes(tmp_path) == {}


def test_a_plain_word_in_the_metadata_is_no_tie(tmp_path: Path) -> None:
    save_file({"a.w": W, "pt": W + 1}, tmp_path / "x.safetensors", metadata={"model": "a.w", "format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    assert codes(tmp_path / "x.safetensors") == {}
    assert set(cs.open(tmp_path / "x.safetensors")) == {"a.w", "pt"}


class Evil:
    def __reduce__(self) -> Any:
        return eval, ("1 + 1",)


def test_one_is_said_otherwise_than_many() -> None:
    nan, zeros = torch.full((4, 4), float("nan")), torch.zeros(4, 4)
    few = cs.doctor({"a": nan, "b": zeros, "c": torch.zeros(0), "d": torch.randn(4, 4).half()})
    many = cs.doctor({f"{n}.{k}": v.clone() for n in range(2) for k, v in {"a": nan, "b": zeros}.items()})
    said = {finding.code: finding.headline for finding in few.findings}
    assert said["nan"] == "1 tensor holds NaN"
    assert said["dead-tensor"] == "1 matrix is all zeros"
    assert said["empty-tensors"] == "1 tensor has no elements"
    assert said["dtype-mix"] == "most is F32, but 1 tensor is F16"
    said = {finding.code: finding.headline for finding in many.findings}
    assert said["nan"] == "2 tensors hold NaN"
    assert said["dead-tensor"] == "2 matrices are all zeros"
    assert str(cs.doctor({"w": W})) == f"state_dict: 1 tensor, {W.nbytes:,} bytes read: sound"


def test_pickles_are_told_apart_by_what_they_would_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"w": W}, tmp_path / "plain.pt")
    assert codes(tmp_path / "plain.pt") == {"pickle": "warning"}
    torch.save({"model": {"a.w": W}, "evil": Evil()}, tmp_path / "evil.pt")
    assert codes(tmp_path / "evil.pt")["unsafe-pickle"] == "error"
    torch.save({"model": {"a.w": W}, "args": torch.nn.Linear}, tmp_path / "args.pt")
    assert codes(tmp_path / "args.pt") == {"pickle": "warning", "pickled-objects": "note"}


def test_a_tie_that_the_metadata_declares_must_hold(tmp_path: Path) -> None:
    save_file({"a": W, "b": W + 1}, tmp_path / "x.safetensors", metadata={"b": "a"})
    assert codes(tmp_path / "x.safetensors")["ties-differ"] == "error"


def test_a_file_that_cannot_be_opened_is_a_diagnosis_and_no_exception(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"12345678" * 4)
    assert not cs.doctor(tmp_path / "x.safetensors").healthy
    assert codes(tmp_path / "gone.safetensors") == {"missing-file": "error"}


@pytest.mark.parametrize(
    ("value", "code", "options"),
    [(1.0, 0, ["--json"]), (float("nan"), 1, []), (float("nan"), 1, ["--json"]), (float("nan"), 0, ["--headers"])],
)
def test_the_command_exits_with_1_on_errors_alone(value: float, code: int, options: list[str], tmp_path: Path) -> None:
    cs.save(changed(x=spotted(value, 0.1)), tmp_path / "x.safetensors")
    command = [sys.executable, "-m", "ckptsurgery", "doctor", str(tmp_path / "x.safetensors"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert options != ["--json"] or json.loads(done.stdout)["healthy"] is (code == 0)


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """In a process of its own, which is asked for the most that it ever held."""
    program = (
        "import sys, resource, torch, ckptsurgery as cs; torch.ones(9).isnan()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "cs.doctor(sys.argv[1]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    cs.save({"w": torch.randn(3000, 10_000)}, tmp_path / "x.safetensors")
    grown = subprocess.check_output([sys.executable, "-c", program, str(tmp_path / "x.safetensors")], text=True)
    assert int(grown) < 90_000  # KiB, against 117,187 in the file
