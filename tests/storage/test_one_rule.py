"""What a folder's checkpoint is: one rule, the same for a folder, a snapshot of the hub and the repository itself."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import serving
from safetensors.torch import save

import ckptsurgery as cs
from ckptsurgery.errors import CheckpointError


def pickled(**tensors: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def index(**weight_map: str) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


def one(value: float) -> torch.Tensor:
    return torch.full((2,), value)


SHARD = "model-0000{}-of-00002.safetensors"
FILES: dict[str, bytes] = {
    "model.safetensors": save({"whole": one(1)}),
    "model.fp16.safetensors": save({"whole": one(1).half()}),
    SHARD.format(1): save({"s1": one(2)}),
    SHARD.format(2): save({"s2": one(3)}),
    "model.safetensors.index.json": index(s1=SHARD.format(1), s2=SHARD.format(2)),
    "pytorch_model.bin": pickled(pickle=one(4)),
    "consolidated.safetensors": save({"other": one(5)}),
    "adapter_model.safetensors": save({"adapter": one(6)}),
    "model_1.safetensors": save({"second": one(7)}),
    "best.pt": pickled(best=one(8)),
    "optimizer.bin": pickled(moment=one(9)),
}
SETS = {
    "model": ["model.safetensors"],
    "fp16": ["model.fp16.safetensors"],
    "shards": [SHARD.format(1), SHARD.format(2)],
    "torn": [SHARD.format(1)],
    "index": ["model.safetensors.index.json"],
    "bin": ["pytorch_model.bin"],
    "consolidated": ["consolidated.safetensors"],
    "adapter": ["adapter_model.safetensors"],
    "second": ["model_1.safetensors"],
    "best": ["best.pt"],
}
ALWAYS = {
    "optimizer.bin": FILES["optimizer.bin"], "scheduler.pt": pickled(x=one(1)), "training_args.bin": b"no weights",
    "random_states_0.pkl": b"no weights", "rng_state_0.pth": pickled(cpu=one(2)), "config.json": b"{}",
    "tokenizer.json": b"{}",
}  # fmt: skip
COMBINATIONS = [c for n in (1, 2, 3) for c in itertools.combinations(SETS, n) if not {"torn", "shards"} <= {*c}]

PAIRS = [c for c in COMBINATIONS if len(c) < 3]


def right(chosen: tuple[str, ...]) -> list[str] | str:
    """The rule once more, for these sets of files: the keys, or the code of the error."""
    have = set(chosen)
    models = have & {"consolidated", "adapter", "second"}
    usual = have & {"model", "fp16", "shards", "torn", "index", "bin"}
    if "best" in have and not usual:
        models |= {"best"}
    if "index" in have:
        models = set()  # what an index does not name is left aside
    if len(models) + bool(usual) > 1:
        return "ambiguous-folder"
    if not usual:
        name = {"consolidated": "other", "adapter": "adapter", "second": "second", "best": "best"}[models.pop()]
        return [name]
    sharded = have & {"shards", "torn", "index"}
    if "model" in have and sharded:
        return "ambiguous-folder"
    if "model" in have:
        return ["whole"]
    if sharded:
        return ["s1", "s2"] if "shards" in have else "missing-shard"
    return ["pickle"] if "bin" in have else ["whole"]


def files_of(chosen: tuple[str, ...]) -> dict[str, bytes]:
    return ALWAYS | {name: FILES[name] for part in chosen for name in SETS[part]}


def outcome(source: str) -> list[str] | str:
    try:
        with cs.open(source) as ckpt:
            return sorted(ckpt)
    except CheckpointError as error:
        (code,) = {d.code for d in error.diagnostics}
        return code


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("chosen", COMBINATIONS, ids="-".join)
def test_a_folder_is_one_checkpoint_or_several(chosen: tuple[str, ...], tmp_path: Path) -> None:
    assert outcome(str(written(tmp_path, files_of(chosen)))) == right(chosen)


@pytest.mark.parametrize("chosen", [c for c in COMBINATIONS if right(c) == "ambiguous-folder"], ids="-".join)
def test_each_candidate_of_an_ambiguous_folder_opens_by_the_path_shown(chosen: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        cs.open(written(tmp_path, files_of(chosen)))
    (problem,) = caught.value.diagnostics
    first = next(remedy.value for remedy in problem.remedies if remedy.argument == "source")
    shown = [note.removesuffix(" (an index of shards)") for note in problem.notes if "no index joins" not in note]
    assert shown or "shards" in chosen or "torn" in chosen
    for path in [*shown, first]:
        assert Path(path).is_file()
        if "shards" in chosen or not path.endswith(".json"):
            cs.open(path).close()
    cs.open(tmp_path, by_file=True).close()


PROGRAM = """
import json, sys
from huggingface_hub import snapshot_download
import ckptsurgery as cs
from ckptsurgery.errors import CheckpointError
def outcome(source):
    try:
        with cs.open(source) as ckpt:
            return sorted(ckpt)
    except CheckpointError as error:
        (code,) = {d.code for d in error.diagnostics}
        return code
for number in range(int(sys.argv[1])):
    repo = f"org/repo{number}"
    remote = outcome("hf://" + repo)
    print(json.dumps([remote, outcome(snapshot_download(repo)), outcome("hf://" + repo)]), flush=True)
"""


def test_the_hub_its_snapshot_and_the_folder_agree(tmp_path: Path) -> None:
    with serving() as hub:
        for number, chosen in enumerate(PAIRS):
            hub.repos[f"org/repo{number}"] = files_of(chosen)
        settings = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        command = [sys.executable, "-c", PROGRAM, str(len(PAIRS))]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for chosen, line in zip(PAIRS, done.stdout.splitlines(), strict=True):
        assert json.loads(line) == [right(chosen)] * 3, chosen


OTHERS: dict[str, tuple[dict[str, bytes], list[str] | str]] = {
    "an index that names the whole file": (
        {"model.safetensors": save({"a": one(1)}), "model.safetensors.index.json": index(a="model.safetensors")}, ["a"]
    ),
    "an index over files of other names": (
        {"x.safetensors": save({"a": one(1)}), "y.safetensors": save({"b": one(1)}),
         "model.safetensors.index.json": index(a="x.safetensors", b="y.safetensors")}, ["a", "b"]
    ),
    "an index and a file that it does not name": (
        {"x.safetensors": save({"a": one(1)}), "y.safetensors": save({"b": one(1)}),
         "model.safetensors.index.json": index(a="x.safetensors")}, ["a"]
    ),
    "an index of an unusual name beside a model of the usual one": (
        {"model.safetensors": save({"a": one(1)}), "x.safetensors.index.json": index(b="b.safetensors"),
         "b.safetensors": save({"b": one(1)})}, "ambiguous-folder"
    ),
    "two series of shards": (
        {"model-00001-of-00001.safetensors": save({"a": one(1)}), SHARD.format(1): b"", SHARD.format(2): b""},
        "ambiguous-folder"
    ),
    "a variant in shards, and the plain file": (
        {"model.safetensors": save({"a": one(1)}), "model.fp16-00001-of-00002.safetensors": b"",
         "model.safetensors.index.fp16.json": b"{}"}, ["a"]
    ),
    "half precision in safetensors, full in a pickle": (
        {"model.fp16.safetensors": save({"half": one(1)}), "pytorch_model.bin": pickled(full=one(1))}, ["full"]
    ),
    "two variants": (
        {"model.fp16.safetensors": save({"a": one(1)}), "model.bf16.safetensors": save({"a": one(1)})},
        "ambiguous-folder"
    ),
    "diffusers' names": (
        {"diffusion_pytorch_model.bin": b"", "diffusion_pytorch_model.safetensors": save({"a": one(1)})}, ["a"]
    ),
    "open_clip's names": (
        {"open_clip_pytorch_model.bin": b"", "open_clip_model.safetensors": save({"a": one(1)})}, ["a"]
    ),
    "accelerate's pickles of two models": (
        {"pytorch_model.bin": pickled(a=one(1)), "pytorch_model_1.bin": pickled(b=one(1))}, "ambiguous-folder"
    ),
    "an adapter in a pickle beside the model": (
        {"pytorch_model.bin": pickled(a=one(1)), "adapter_model.bin": pickled(b=one(1))}, "ambiguous-folder"
    ),
    "a whole file that aria2 has not finished": (
        {"model.safetensors": save({"a": one(1)}), "model.safetensors.aria2": b"\0"}, "unfinished-download"
    ),
    "a download under another name": ({"model.safetensors.part": save({"a": one(1)})}, "nothing-to-read"),
    "models in folders below": (
        {"encoder/model.safetensors": save({"a": one(1)}), "decoder/model.safetensors": save({"b": one(1)})},
        "ambiguous-folder"
    ),
    "two pickles of one stem": ({"a.pt": pickled(a=one(1)), "a.ckpt": pickled(b=one(1))}, "ambiguous-folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_names_that_are_one_model_and_names_that_are_not(case: str, tmp_path: Path) -> None:
    files, expected = OTHERS[case]
    assert outcome(str(written(tmp_path, files))) == expected


def test_the_rest_agrees_on_the_hub_too(tmp_path: Path) -> None:
    with serving() as hub:
        for number, (files, _) in enumerate(OTHERS.values()):
            hub.repos[f"org/repo{number}"] = files
        settings = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        command = [sys.executable, "-c", PROGRAM, str(len(OTHERS))]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for (case, (_, expected)), line in zip(OTHERS.items(), done.stdout.splitlines(), strict=True):
        assert json.loads(line) == [expected] * 3, case
