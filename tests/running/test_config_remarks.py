"""A config that goes along and no longer agrees with the tensors is told field by field, and never edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptsurgery as cs

CONFIG = {
    "torch_dtype": "float32", "tie_word_embeddings": True, "n_layer": 3, "vocab_size": 10, "hidden_size": 4,
    "eos_token_id": 6, "heads": 2, "text_config": {"num_hidden_layers": 3},
}  # fmt: skip


def folder(where: Path, **changed: Any) -> Path:
    embed = torch.randn(10, 4)
    tensors = {f"h.{i}.w": torch.randn(4, 4) for i in range(3)} | {"embed.weight": embed, "head.weight": embed}
    cs.save(tensors, where)
    (where / "config.json").write_text(json.dumps(CONFIG | changed))
    return where


def remarks(source: Path, recipe: cs.Recipe, **more: Any) -> dict[str, str]:
    out = source.parent / f"out{len(list(source.parent.iterdir()))}"
    report = cs.plan(source, recipe, **more).save(out, companions=True)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    told = [w for w in report.warnings if w.code == "stale-config"]
    assert all(w.severity == "warning" and w.headline in str(report) for w in told)
    fields = (w.headline.removeprefix("config.json says ").partition(" = ") for w in told)
    return {name: text for name, _, text in fields}


def test_a_config_that_still_fits_is_told_nothing_of(tmp_path: Path) -> None:
    source = folder(tmp_path / "x")
    assert remarks(source, cs.Recipe(rest="keep")) == {}
    assert remarks(source, cs.Recipe(["h.{r...} -> layers.{r...}"], rest="keep")) == {}
    wrong = folder(tmp_path / "y", torch_dtype="float16", n_layer=7, vocab_size=99, tie_word_embeddings=False)
    assert remarks(wrong, cs.Recipe(rest="keep")) == {}


@pytest.mark.parametrize(
    ("recipe", "more", "told"),
    [
        (cs.Recipe(rest="keep"), {"dtype": "bf16"}, {"torch_dtype": "BF16"}),
        (cs.Recipe(rest="keep", drop=["h.2.w"]), {}, {"n_layer": "2", "text_config.num_hidden_layers": "2"}),
        (
            cs.Recipe(["{m:embed,head}.weight -> {m}.weight | slice_rows(0, 8)"], rest="keep"),
            {},
            {"vocab_size": "the axes of 10 are of 8"},
        ),
        (
            cs.Recipe(["embed.weight -> embed.weight, other.weight"], rest="keep", drop=["head.weight"]),
            {},
            {"tie_word_embeddings": "embed.weight and other.weight are stored as two tensors"},
        ),
    ],
    ids=["dtype", "layers", "rows", "untied"],
)  # fmt: skip
def test_each_field_is_told_with_its_value_and_what_the_tensors_are(
    recipe: cs.Recipe, more: dict[str, Any], told: dict[str, str], tmp_path: Path
) -> None:
    found = remarks(folder(tmp_path / "x"), recipe, **more)
    assert found.keys() == told.keys()
    assert all(told[name] in text for name, text in found.items())


def test_names_tied_anew_contradict_a_config_that_says_they_are_not(tmp_path: Path) -> None:
    cs.save({"a.w": torch.ones(2, 2)}, tmp_path / "x")
    (tmp_path / "x/config.json").write_text('{"tie_word_embeddings": false}')
    found = remarks(tmp_path / "x", cs.Recipe(rest="keep", tie={"b.w": "a.w"}))
    assert found == {"tie_word_embeddings": "False, but b.w and a.w are one tensor"}


def test_what_is_dequantised_is_told(tmp_path: Path) -> None:
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    cs.save({"w": weight, "w_scale_inv": torch.ones(1, 1)}, tmp_path / "x")
    config = {"quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16"}
    (tmp_path / "x/config.json").write_text(json.dumps(config))
    recipe = cs.Recipe(["w, w_scale_inv -> w | fp8_dequant(block=4)"])
    (name,) = remarks(tmp_path / "x", recipe)
    assert name == "quantization_config"
    assert remarks(tmp_path / "x", cs.Recipe(rest="keep")) == {}
