"""Folders of several models: pipelines, sentence transformers, adapters, the hub's cache, files by name."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import torch
from foreign import refused
from safetensors.torch import save_file

import ckptsurgery as cs
from ckptsurgery.storage.output.staging import Writer

SHA = "0123456789abcdef0123456789abcdef01234567"


def weights(path: Path, config: dict[str, object] | None = None, **tensors: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors or {"w": torch.arange(3.0)}, path)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A root as `DiffusionPipeline.save_pretrained` lays it out, with a file of everything beside it."""
    listed = {
        "_class_name": "P",
        "vae": ["d", "V"],
        "encoder": ["t", "E"],
        "scheduler": ["d", "S"],
        "safety": [None] * 2,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(listed))
    weights(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"latent_channels": 4}, v=torch.ones(2))
    weights(tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors", v=torch.ones(2).half())
    cs.save({"a": torch.ones(2, 2), "b": torch.zeros(5)}, tmp_path / "encoder", max_shard_size="16")
    weights(tmp_path / "left_over" / "model.safetensors")
    weights(tmp_path / "everything.safetensors")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    return tmp_path


def test_a_pipeline_has_its_components_before_the_keys(pipeline: Path) -> None:
    with cs.open(pipeline) as checkpoint:
        assert list(checkpoint) == ["vae.v", "encoder.a", "encoder.b"]
        assert checkpoint["vae.v"].dtype == "F32"
        assert checkpoint.config == {"latent_channels": 4}
        cs.plan(checkpoint, ["vae.v -> v", "encoder.{k} -> {k}"]).save(pipeline / "out.safetensors")
    with cs.open(pipeline, component="vae") as checkpoint:
        assert list(checkpoint) == ["v"]
        assert checkpoint.config == {"latent_channels": 4}
    assert list(cs.open(pipeline, "vae")) == ["v"]
    assert list(cs.open(pipeline, file="everything.safetensors")) == ["w"]
    assert list(cs.open(pipeline, component="left_over")) == ["w"]


def test_one_component_has_its_name_before_the_keys_too(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"vae": ["d", "V"], "scheduler": ["d", "S"]}')
    weights(tmp_path / "vae" / "model.safetensors")
    assert list(cs.open(tmp_path)) == ["vae.w"]
    assert list(cs.open(tmp_path, component="vae")) == ["w"]


def test_a_component_that_is_not_there_is_named(pipeline: Path) -> None:
    with pytest.raises(cs.CheckpointError) as caught:
        cs.open(pipeline, component="vea")
    (problem,) = caught.value.diagnostics
    assert problem.code == "missing-component"
    assert set(problem.notes) == {"vae", "encoder"}
    with pytest.raises(cs.CheckpointError, match="file= names a file"):
        cs.open({"w": torch.ones(1)}, file="x")


def test_a_pipeline_in_a_store_is_one_too(pipeline: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(f"{pipeline}/", "/pipes/", recursive=True)
    with cs.open("memory://pipes") as checkpoint:
        assert list(checkpoint) == ["vae.v", "encoder.a", "encoder.b"]
        assert torch.equal(checkpoint["encoder.b"].load(), torch.zeros(5))
    with cs.open("memory://pipes", component="vae") as checkpoint:
        assert checkpoint.config == {"latent_channels": 4}
    assert list(cs.open("memory://pipes/left_over", by_file=True)) == ["model/w"]
    store.rm("/pipes", recursive=True)


def test_modules_in_folders_of_their_own_follow_the_first(tmp_path: Path) -> None:
    rows = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    weights(tmp_path / "model.safetensors", {"hidden_size": 3})
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text("{}")
    assert list(cs.open(tmp_path)) == ["w"]
    weights(tmp_path / "2_Dense" / "model.safetensors", {"in_features": 3}, **{"linear.weight": torch.ones(3, 3)})
    with cs.open(tmp_path) as checkpoint:
        assert list(checkpoint) == ["w", "2_Dense.linear.weight"]
        assert checkpoint.config == {"hidden_size": 3, "2_Dense": {"in_features": 3}}


def test_modules_without_weights_above_are_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "0_Transformer"}, {"path": "2_Dense"}]))
    for name in ("0_Transformer", "2_Dense"):
        weights(tmp_path / name / "model.safetensors", {"hidden_size": 3})
    assert list(cs.open(tmp_path)) == ["0_Transformer.w", "2_Dense.w"]


def sentence_model(folder: Path) -> Path:
    weights(folder / "model.safetensors", {"hidden_size": 3})
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../x"}]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "1_Pooling" / "notes.log").write_bytes(b"not a companion")
    (folder / "2_Other").mkdir()
    (folder / "2_Other" / "config.json").write_text("{}")
    return folder


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", [False, True])
def test_files_of_modules_go_along(tmp_path: Path, there: bool) -> None:
    source, out = sentence_model(tmp_path / "in"), tmp_path / "out"
    if there:
        out.mkdir()
    plan = cs.plan(source, cs.Recipe(rest="keep"))
    plan.save(out, companions=True)
    assert files_in(out) == {"model.safetensors", "config.json", "modules.json", "1_Pooling/config.json"}
    assert (out / "1_Pooling" / "config.json").read_bytes() == (source / "1_Pooling" / "config.json").read_bytes()
    (out / "1_Pooling" / "config.json").write_text("{}")
    plan.save(out, companions=True, overwrite=True)
    assert (out / "1_Pooling" / "config.json").read_bytes() == (source / "1_Pooling" / "config.json").read_bytes()
    assert len(files_in(out)) == 4


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_no_folders_of_modules(tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = sentence_model(tmp_path / "in"), tmp_path / "out"
    if there:
        out.mkdir()
    monkeypatch.setattr(Writer, "_appear", lambda self: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(cs.CheckpointError, match="the disk is gone"):
        cs.plan(source, cs.Recipe(rest="keep")).save(out, companions=True)
    assert [path.name for path in tmp_path.iterdir() if path != source] == (["out"] if there else [])
    assert not there or list(out.iterdir()) == []


def test_an_adapter_has_a_configuration_of_its_own(tmp_path: Path) -> None:
    weights(tmp_path / "adapter_model.safetensors", {"hidden_size": 3})
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    assert cs.open(tmp_path).config == {"r": 8}
    assert cs.open(tmp_path / "adapter_model.safetensors").config == {"r": 8}
    weights(tmp_path / "model.safetensors")
    assert cs.open(tmp_path / "model.safetensors").config == {"hidden_size": 3}
    assert cs.open(tmp_path, file="adapter_model.safetensors").config == {"r": 8}


def test_a_repository_of_the_cache_is_the_snapshot_of_main(tmp_path: Path) -> None:
    root = tmp_path / "models--org--name"
    for commit, value in ((SHA, 1.0), ("f" * 40, 2.0)):
        weights(root / "snapshots" / commit / "model.safetensors", {"n": value}, w=torch.full((2,), value))
    (root / "refs").mkdir()
    assert refused(root).code == "ambiguous-folder"
    (root / "refs" / "main").write_text(SHA)
    for folder in (root, tmp_path):
        with cs.open(folder) as checkpoint:
            assert checkpoint["w"].load()[0] == 1.0
            assert checkpoint.config == {"n": 1.0}
    weights(tmp_path / "models--org--other" / "snapshots" / SHA / "model.safetensors")
    assert "hf://org/name" in str(refused(tmp_path).help)


def test_mounts_and_components_on_the_command_line(pipeline: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ckptsurgery.cli.program import app

    def run(*words: object) -> str:
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return done.stdout

    weights(tmp_path / "a.safetensors")
    out = tmp_path / "joined.safetensors"
    mounts = ["--mount", f"a.={tmp_path / 'a.safetensors'}", "--mount", f"vision/={pipeline / 'vae'}"]
    assert "vision/v" in run("inspect", *mounts)
    run("convert", *mounts, out)
    assert set(cs.open(out)) == {"a.w", "vision/v"}
    run("convert", tmp_path / "a.safetensors", out, *mounts[2:], "--overwrite")
    assert set(cs.open(out)) == {"w", "vision/v"}
    assert "vae.v" not in run("inspect", pipeline, "--component", "vae", "--all")
    assert "w" in run("inspect", pipeline, "--file", "everything.safetensors", "--all")
    for wrong in (["inspect"], ["inspect", "--mount", "nothing"], ["convert", str(out)]):
        assert CliRunner().invoke(app, wrong).exit_code == 2


def test_commands_with_two_checkpoints_take_components_files_and_mounts(pipeline: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ckptsurgery.cli.program import app

    def run(*words: object, code: int = 0) -> str:
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == code, done.output
        return done.output

    alone, other = tmp_path / "apart" / "vae.safetensors", tmp_path / "apart" / "renamed.safetensors"
    alone.parent.mkdir()
    with cs.open(pipeline, component="vae") as vae:
        cs.save(vae, alone)
        cs.plan(vae, "{k...} -> model.{k...}").save(other)
    assert "identical" in run("diff", pipeline, pipeline, "--component", "vae", "--exit-code")
    assert "identical" in run("diff", alone, pipeline, "--component-other", "vae", "--exit-code")
    assert "identical" in run("diff", other, "--mount-other", f"model.={alone}", "--exit-code")
    assert "identical" in run("diff", other, "--mount", f"model.={alone}", "--exit-code")
    run("diff", pipeline, pipeline, "--component", "vae", "--component-other", "encoder", "--exit-code", code=1)
    assert "v -> model.v" in run("suggest", pipeline, other, "--component", "vae", "--json")
    for wrong in (["diff"], ["diff", alone], ["suggest", alone], ["diff", "--mount", f"a.={alone}"]):
        assert "--mount-other" in run(*wrong, code=2)
