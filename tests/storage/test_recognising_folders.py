"""Folders and addresses of other programs: each entry of the tables is met, named, and its remedy is run."""

from __future__ import annotations

import ast
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import W, holds_w, pasted, refused, there
from safetensors.torch import save_file

import ckptsurgery as cs
from ckptsurgery.storage.places.recognising_folders import FOLDERS, folder_problem

# folders


def dcp(folder: Path) -> None:
    from torch.distributed.checkpoint import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"w": torch.tensor(W), "b": torch.ones(2)}, checkpoint_id=folder, no_dist=True)


def zero(folder: Path, stage: int) -> Path:
    """A step's folder as DeepSpeed writes it on two ranks."""
    step = folder / "global_step10"
    step.mkdir(parents=True)
    shapes = [{"w": torch.Size([2, 3])}]
    for rank in range(2):
        held = torch.tensor(W) if stage < 3 else torch.empty(0)
        name = "mp_rank_00" if stage < 3 else f"zero_pp_rank_{rank}_mp_rank_00"
        state = {"module": {"w": held}, "param_shapes": shapes, "ds_version": "0.15", "global_steps": 10}
        torch.save(state, step / f"{name}_model_states.pt")
        part = torch.tensor(W).flatten().chunk(2)[rank].clone()
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimizer = {"zero_stage": stage, "partition_count": 2, key: [part]}
        torch.save({"optimizer_state_dict": optimizer}, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text("global_step10")
    (folder / "zero_to_fp32.py").write_text("# deepspeed's own")
    return step


def without_optimizer(step: Path) -> Path:
    for file in step.glob("*_optim_states.pt"):
        file.unlink()
    return step


def megatron(folder: Path) -> Path:
    step = folder / "iter_0000100"
    for rank in range(2):
        (step / f"mp_rank_0{rank}").mkdir(parents=True)
        state = {"model": {"w": torch.tensor(W)}, "iteration": 100, "optimizer": {"state": {}, "param_groups": []}}
        torch.save(state, step / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return step


def parts(folder: Path, *names: str, **beside: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.tensor(W)}, folder / name)
    for name, text in beside.items():
        (folder / (name + ".json")).write_text(text)


def empty(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0" * 64)


SHA = "0123456789abcdef0123456789abcdef01234567"


def cached(folder: Path, *commits: str) -> None:
    parts(folder, *(f"snapshots/{commit}/model.safetensors" for commit in commits))
    empty(folder, "refs/main", "blobs/x")


def orbax(folder: Path) -> None:
    if not there("orbax"):
        empty(folder, "_METADATA", "_CHECKPOINT_METADATA", "d/x", "manifest.ocdbt")
        return
    import orbax.checkpoint

    folder.rmdir()
    orbax.checkpoint.PyTreeCheckpointer().save(folder.absolute(), {"params": {"w": W}})


def orbax_run(folder: Path) -> Path:
    if not there("orbax"):
        empty(folder, "3/_CHECKPOINT_METADATA", "3/default/_METADATA", "3/default/manifest.ocdbt")
        return folder
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder.absolute()) as manager:
        manager.save(3, args=ocp.args.StandardSave({"params": {"w": W}}))
        manager.wait_until_finished()
    return folder


def zarr_store(folder: Path) -> None:
    if not there("zarr"):
        empty(folder, "zarr.json", "w/zarr.json", "w/c/0/0")
        return
    import zarr

    zarr.open_group(folder, mode="w").create_array("w", data=W)


LAID_OUT: dict[str, Callable[[Path], Any]] = {
    "zero-stage-3": lambda folder: without_optimizer(zero(folder, 3)),
    "zero": lambda folder: zero(folder, 2),
    "zero-root": lambda folder: zero(folder, 1) and None,
    "megatron": megatron,
    "megatron-root": lambda folder: megatron(folder) and None,
    "hub-repo": lambda folder: cached(folder, SHA, "f" * 40),
    "hub-cache": lambda folder: parts(
        folder, *(f"models--org--{name}/snapshots/{SHA}/model.safetensors" for name in ("name", "other"))
    ),
    "saved-model": lambda folder: empty(folder, "saved_model.pb", "variables/variables.index"),
    "tensorflow": lambda folder: empty(folder, "checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"),
    "orbax": orbax,
    "orbax-step": lambda folder: orbax_run(folder) / "3",
    "orbax-root": lambda folder: orbax_run(folder) and None,
    "zarr": zarr_store,
    "mlpackage": lambda folder: empty(folder, "Manifest.json", "Data/com.apple.CoreML/model.mlmodel"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_program_is_named_and_leads_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    folder = LAID_OUT[kind](folder) or folder
    if kind in ("zero", "megatron"):  # which are opened here, and named where they are at an address
        assert list(cs.open(folder)) == (["w"] if kind == "zero" else ["rank0/w", "rank1/w"])
        below = [f"{path.parent.name}/{path.name}" for path in folder.glob("*/*")]
        found = folder_problem(
            [path.name for path in folder.iterdir()], lambda: below, str(folder), lambda n: str(folder / n)
        )
        assert found is not None
        problem = found
    else:
        problem = refused(folder)
    assert FOLDERS[kind].text in problem.headline
    assert problem.code == ("ambiguous-folder" if problem.notes else "unsupported-format")
    for note in problem.notes:
        assert os.path.lexists(note)
    help = str(problem.help)
    if kind == "hub-cache":
        assert help.endswith("'hf://org/name'")
    elif help.startswith("open one of them: "):
        part = ast.literal_eval(help.removeprefix("open one of them: "))
        if kind == "megatron-root":
            assert list(cs.open(part)) == ["rank0/w", "rank1/w"]
        else:
            assert holds_w(part)
    else:
        made = pasted(help, tmp_path, monkeypatch)
        assert made is None or holds_w(made)
        assert made is not None or kind in (
            "zero-stage-3",
            "saved-model",
            "tensorflow",
            "orbax",
            "orbax-step",
            "orbax-root",
            "zarr",
            "mlpackage",
        )


@pytest.mark.parametrize("file", [".metadata", "zero_pp_rank_0_mp_rank_00_model_states.pt"])
def test_a_part_of_a_sharded_checkpoint_is_not_opened_as_a_model(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    if file == ".metadata":
        dcp(folder)
        problem = refused(folder / file)
        assert "torch.distributed.checkpoint" in problem.headline
        assert holds_w(pasted(str(problem.help), tmp_path, monkeypatch))
    else:
        problem = refused(zero(folder, 3) / file)
        assert problem.code == "partitioned-model"
        assert "stage 3" in problem.headline
        assert ast.parse(str(problem.help))


def test_a_trainers_folder_with_steps_of_deepspeed_is_its_model(tmp_path: Path) -> None:
    zero(tmp_path, 2)
    parts(tmp_path, "model.safetensors", config="{}")
    assert holds_w(tmp_path)


# addresses


@pytest.mark.parametrize(
    ("address", "help"),
    [
        ("https://huggingface.co/org/repo", "open('hf://org/repo')"),
        ("https://huggingface.co/org/repo/tree/main", "open('hf://org/repo@main')"),
        ("https://huggingface.co/org/repo/resolve/v1/a/b.bin?download=true", "open('hf://org/repo@v1/a/b.bin')"),
    ],
)
def test_the_way_from_an_address(address: str, help: str) -> None:
    problem = refused(address)
    assert problem.code == "address"
    assert problem.help == help


def test_a_json_file_of_a_model_is_not_taken_for_an_address(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    assert refused(tmp_path / "x.json").code == "json-page"


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_store_whose_package_is_missing_names_it(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    problem = refused(f"{scheme}://bucket/model.safetensors")
    assert problem.code == "address"
    assert problem.help == f"pip install {package}"


def test_a_scheme_that_nobody_knows_is_said() -> None:
    assert refused("nothing://host/model.bin").code == "address"
