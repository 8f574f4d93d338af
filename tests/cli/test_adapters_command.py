"""`ckptsurgery adapters`: what PEFT makes comes out, errors name options, numbers that are none are wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from ckptsurgery.cli.program import app

DATA = Path(__file__).parent.parent / "data" / "adapters"
BASE, LORA = DATA / "linear" / "base.safetensors", DATA / "linear" / "adapter"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["adapters", *map(str, arguments)], prog_name="ckptsurgery")
    assert result.exit_code == code, result.output + result.stderr
    return result


def test_a_merge_is_what_peft_makes(tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    report = json.loads(run("merge", BASE, out, "-a", LORA, "--check", "--json").stdout)
    assert report["target"] == str(out)
    made, wanted = load_file(out), load_file(DATA / "linear" / "merged.safetensors")
    assert made.keys() == wanted.keys()
    assert all(torch.allclose(made[key], wanted[key], rtol=0, atol=1e-6) for key in wanted)
    run("merge", BASE, out, "-a", LORA, code=1)  # it exists
    halves = tmp_path / "halves.safetensors"
    run("merge", BASE, halves, "-a", LORA, "-w", "0.5", "-a", LORA, "-w", "0.5")
    assert all(torch.allclose(load_file(halves)[key], wanted[key], rtol=0, atol=1e-6) for key in wanted)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    text = run("merge", BASE, tmp_path / "x.safetensors", "--adapter", LORA, "--dry-run").stdout
    assert "lora_merge" in text and not list(tmp_path.iterdir())


def test_the_config_of_the_base_goes_along(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(load_file(BASE), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"hidden_size": 8}')
    run("merge", tmp_path / "base", tmp_path / "out", "-a", LORA, "--companions")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 8
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_what_is_extracted_is_merged_again(tmp_path: Path) -> None:
    tuned = DATA / "linear" / "merged.safetensors"
    found = json.loads(run("extract", BASE, tuned, tmp_path / "lora", "--rank", 4, "--json").stdout)
    assert found["ranks"] and max(found["errors"].values()) < 1e-5
    run("merge", BASE, tmp_path / "again.safetensors", "-a", tmp_path / "lora")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.allclose(again[key], tensor, atol=1e-5) for key, tensor in load_file(tuned).items())
    assert "updates of" in run("extract", BASE, tuned, tmp_path / "other", "--energy", "0.9").stdout


def test_errors_name_the_options(tmp_path: Path) -> None:
    tuned = load_file(BASE)
    matrices = {key: tensor + 1 for key, tensor in tuned.items() if tensor.dim() > 1}
    save_file(tuned | matrices | {"norm.weight": torch.ones(3)}, tmp_path / "b.safetensors")
    save_file(load_file(BASE) | {"norm.weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    sources = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    said = run("extract", *sources, tmp_path / "lora", "--rank", 2, code=1).stderr
    assert "--others whole" in said
    assert run("extract", *sources, tmp_path / "lora", "--rank", 2, "--others", "whole").stdout
    save_file({key: tensor + 1 for key, tensor in tuned.items()} | {"norm.weight": torch.ones(3)}, sources[1])
    said = run("extract", *sources, tmp_path / "other", "--rank", 2, code=1).stderr  # PEFT has no place for biases
    assert "--others drop" in said and "--others whole" not in said
    assert run("extract", *sources, tmp_path / "other", "--rank", 2, "--others", "drop").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", BASE, "out.safetensors"),
        ("merge", BASE, "out.safetensors", "-a", LORA, "-w", "much"),
        ("extract", BASE, BASE, "lora", "--rank", "1.5"),
        ("extract", BASE, BASE, "lora", "--energy", "most"),
        ("extract", BASE, BASE, "lora", "--rank", "1", "--others", "some"),
    ],
)
def test_what_is_no_number_or_missing_is_wrong_usage(arguments: tuple[object, ...]) -> None:
    run(*arguments, code=2)


def test_an_adapter_is_converted_and_merges_as_before(tmp_path: Path) -> None:
    flat = tmp_path / "flat.safetensors"
    assert "wrote" in run("convert", LORA, flat, "--base", BASE, "--to", "kohya").stdout
    assert any(key.endswith(".alpha") for key in load_file(flat))
    found = json.loads(run("convert", flat, tmp_path / "lora", "--base", BASE, "--to", "peft", "--json").stdout)
    run("merge", BASE, tmp_path / "x.safetensors", "-a", found["path"])
    made, wanted = load_file(tmp_path / "x.safetensors"), load_file(DATA / "linear" / "merged.safetensors")
    assert all(torch.allclose(made[key], wanted[key], rtol=0, atol=1e-6) for key in wanted)
