"""A typo in what a person types: the message names what was meant, wherever it was typed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import ckptsurgery as cs
from ckptsurgery.cli.program import app


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    cs.save({f"encoder.layer.{i}.attention.self.w": torch.ones(2) for i in range(2)}, "model.safetensors")
    Path("fused.toml").write_text('schema = 1\nrest = "keep"\nrules = []\n')
    return tmp_path


@pytest.mark.parametrize(
    "command, meant",
    [
        (["inspect", "modle.safetensors"], "model.safetensors"),
        (["inspect", "model.safetensors", "--filter", "encoder.layr"], "encoder.layer"),
        (["plan", "model.safetensors", "--rule", "{k...}=>x.{k...}"], "{k...} -> x.{k...}"),
        (["plan", "model.safetensors", "--rule", "{k...} -> {k...} | cst(bf16)"], "cast"),
        (["plan", "model.safetensors", "--rule", "{k...} -> {k...} | cast(bf61)"], "BF16"),
        (["plan", "model.safetensors", "--recipe", "fuse.toml"], "fused.toml"),
        (["plan", "model.safetensors", "--recipe", "bert/hf_to_hf"], "bert/hf_to_hf5"),
        (["plan", "model.safetensors", "--rest", "kep"], "keep"),
        (["plan", "model.safetensors", "--rest", "keep", "--dtype", "fp17"], "fp16"),
        (["explain", "unexpected-key"], "unexpected-keys"),
        (["ops", "show", "resize_row"], "resize_rows"),
        (["recipes", "list", "bertt"], "bert"),
        (["inspct", "model.safetensors"], "inspect"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_typo_gets_did_you_mean(folder: Path, command: list[str], meant: str) -> None:
    done = CliRunner().invoke(app, command)
    told = done.output.lower()
    assert "did you mean" in told and f"'{meant}'".lower() in told, done.output


def test_an_option_misspelt_lists_those_alike(folder: Path) -> None:
    assert "--filter" in CliRunner().invoke(app, ["inspect", "model.safetensors", "--filtr", "x"]).output


def test_explanations_wrap_but_for_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgery.explanations import explanation
    from ckptsurgery.tables.columns import hanging

    text = explanation("unexpected-keys")
    wrapped = hanging(text, 60)
    for block in text.split("```")[1::2]:
        assert block in wrapped
    assert all(len(line) <= 60 for line in "".join(wrapped.split("```")[::2]).splitlines())
