"""Recipes as conversions of the transformers library, which loads and saves by them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

import ckptsurgery as cs

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def tiny(name: str) -> Any:
    """A tiny random model of a type."""
    folder = str(Path(__file__).parents[2] / "scripts" / "exchange")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("tiny_models").build(name)
    finally:
        sys.path.remove(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mixtral", "vit", "hrm_text", "llava"])
def test_the_library_loads_and_saves_by_exported_conversions(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "a")
    wanted = type(model).from_pretrained(tmp_path / "a", dtype=torch.float32).state_dict()
    before = get_checkpoint_conversion_mapping(name)
    conversions = cs.recipes.to_transformers(cs.recipes.from_transformers(name))
    try:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
        loaded = type(model).from_pretrained(tmp_path / "a", dtype=torch.float32)
        loaded.save_pretrained(tmp_path / "b")
    finally:
        register_checkpoint_conversion_mapping(name, before, overwrite=True)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in wanted.items())
    assert cs.diff(tmp_path / "a", tmp_path / "b").identical


def test_what_the_library_cannot_say_is_refused_rule_by_rule() -> None:
    rules = ["a.{i}.b.{j}.c -> x.{i}.y.{j}.z", "w [(g p d) x] -> w [(p g d) x]", "e.{s...} -> f.{s...}"]
    with pytest.raises(cs.RecipeError) as caught:
        cs.recipes.to_transformers(cs.Recipe(rules, dims={"g": 2, "p": 3}, rest="keep"))
    assert [d.code for d in caught.value.diagnostics] == ["not-exportable"] * 2
    assert "text between two captures changes" in str(caught.value)
