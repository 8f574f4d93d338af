"""What holds for every recipe that ships: it is listed, it reads, it says what it is for, it stays data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs
from ckptsurgery.language.recipe import Recipe
from ckptsurgery.language.toml import loads
from ckptsurgery.planning.options import LoadOptions
from ckptsurgery.planning.record import Target
from ckptsurgery.transfer.fitting import fitting_recipe

NAMES = cs.list_recipes()
CONVERSIONS = [name for name in NAMES if not name.startswith("surgery/")]
_LISTED = re.compile(r"^\| `([a-z0-9_]+/[a-z0-9_]+)` \| (.+) \|$", re.MULTILINE)


def test_the_list_in_the_readme_is_the_shelf_with_its_summaries(repository: Path) -> None:
    listed = dict(_LISTED.findall((repository / "recipes" / "README.md").read_text()))
    assert listed == {name: cs.load_recipe(name).summary for name in NAMES}


def test_the_shelf_holds_toml_and_pages_that_speak_of_it(repository: Path) -> None:
    shelf = repository / "recipes"
    files = [p.relative_to(shelf) for p in shelf.rglob("*") if p.is_file()]
    assert all((p.suffix == ".toml" and len(p.parts) == 2) or (p.suffix == ".md" and len(p.parts) == 1) for p in files)
    assert all(re.fullmatch(r"[a-z0-9_]+/[a-z0-9]+_to_[a-z0-9]+", name) for name in CONVERSIONS)


def test_every_codebase_of_a_family_leads_to_every_other() -> None:
    known: dict[str, list[set[str]]] = {}
    for name in CONVERSIONS:
        family, job = name.split("/")
        joined = set(job.split("_to_"))
        groups = known.setdefault(family, [])
        for group in [g for g in groups if g & joined]:
            groups.remove(group)
            joined |= group
        groups.append(joined)
    assert {family for family, groups in known.items() if len(groups) > 1} == set()


@pytest.mark.parametrize("name", NAMES)
def test_text_and_objects_are_one(name: str) -> None:
    recipe = cs.load_recipe(name)
    assert recipe.summary
    assert loads(recipe.dumps()) == recipe


@pytest.mark.parametrize("name", CONVERSIONS)
def test_inverting_twice_changes_no_rule(name: str) -> None:
    recipe = cs.load_recipe(name)
    if name.startswith("quantised/"):  # a weight could have been quantised in more than one way
        with pytest.raises(cs.RecipeError, match="not-invertible"):
            recipe.inverse().inverse()
        return
    assert _rules(recipe.inverse().inverse()) == _rules(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_too_long_to_read(name: str, repository: Path) -> None:
    text = (repository / "recipes" / f"{name}.toml").read_text()
    assert max(map(len, text.splitlines())) <= 160


def test_the_best_known_one_fits_in_ten_lines(repository: Path) -> None:
    text = (repository / "recipes/llama/hf_to_litgpt.toml").read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 10


def _rules(recipe: Recipe) -> list[str]:
    parts = [recipe, *recipe.stages, *(s.recipe for r in (recipe, *recipe.stages) for s in r.scopes)]
    return [str(rule) for part in parts for rule in part.rules]


def test_a_recipe_that_needs_a_config_is_found_by_the_one_beside_the_source(tmp_path: Path) -> None:
    layer = "model.layers.0."
    shapes = {f"{layer}self_attn.{n}_proj.weight": (8 if n in "qo" else 4, 8) for n in "qkvo"}
    shapes |= {f"{layer}mlp.{n}_proj.weight": (16, 8) for n in ("gate", "up")} | {
        f"{layer}mlp.down_proj.weight": (8, 16)
    }
    shapes |= {f"{layer}{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
    shapes |= {"model.embed_tokens.weight": (12, 8), "lm_head.weight": (12, 8), "model.norm.weight": (8,)}
    cs.save({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
    specs = cs.plan(tmp_path / "model.safetensors", "llama/hf_to_torchtune", config=config).specs

    def found(given: dict[str, object] | None = None) -> str | None:
        with cs.open(tmp_path / "model.safetensors") as checkpoint:
            fit = fitting_recipe(checkpoint, Target(specs), LoadOptions(), 0, given)
        return fit and fit.name

    assert found(config) == "llama/hf_to_torchtune" != found()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert found() == "llama/hf_to_torchtune"
