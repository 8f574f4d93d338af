"""The recipes of model types that ship: read from the library's table, and offered where a config names the type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

import ckptsurgery as cs
from ckptsurgery.catalog import RequiredRules

transformers.logging.set_verbosity_error()
ROOT = Path(__file__).parents[2]
MARK = "# Read from the conversion table of transformers"
SHIPPED = [p.relative_to(ROOT / "recipes").with_suffix("").as_posix()
           for p in sorted((ROOT / "recipes").glob("*/*.toml")) if p.read_text().startswith(MARK)]  # fmt: skip
_ROW = re.compile(r"^\| \S+ \| \d+ \| \S+ \| ok \| ok \| .* \| `(\S+)` \|$", re.MULTILINE)


def test_the_page_of_proofs_names_exactly_those_that_ship() -> None:
    page = (ROOT / "docs" / "reference" / "transformers.md").read_text()
    assert sorted(_ROW.findall(page)) == SHIPPED
    assert len(cs.list_recipes()) >= 120 + 30


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["phimoe", "flex_olmo", "jamba", "qwen3_next", "llava", "aria_text", "dinov3_vit"])
def test_what_ships_is_what_the_table_says_today(name: str) -> None:
    shipped = cs.load_recipe(f"{name}/hf_to_hf5")
    assert shipped.replace(summary="") == cs.recipes.from_transformers(name).replace(summary="")


def test_a_type_is_offered_where_the_config_names_it() -> None:
    keys = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(2) for p in ("gate", "up", "down")]
    state = {key: torch.zeros(2, 2) for key in keys}
    named = cs.match_recipes(state, config={"model_type": "flex_olmo"})
    assert "flex_olmo/hf_to_hf5" in named
    assert not any(RequiredRules.of(name).fits_all for name in cs.match_recipes(state))
    others = cs.match_recipes(state, config={"model_type": "llama"})
    assert not any(name in SHIPPED for name in others)


def test_recipes_of_other_families_are_left_out_where_the_config_names_one_that_fits() -> None:
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    names += ["input_layernorm", "post_attention_layernorm"]
    state = {f"model.layers.0.{name}.weight": torch.zeros(4) if "norm" in name else torch.zeros(4, 4) for name in names}
    state |= {"model.embed_tokens.weight": torch.zeros(8, 4), "model.norm.weight": torch.zeros(4)}
    state["lm_head.weight"] = torch.zeros(8, 4)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 4}
    families = {}
    for kind in ("llama", "qwen2", "nobody", None):
        config = sizes | ({"model_type": kind} if kind else {})
        found = cs.match_recipes(state, config=config)
        assert {f"{kind}/hf_to_gguf"} <= set(found) or kind in ("nobody", None)
        families[kind] = {name.partition("/")[0] for name in found}
    assert families["llama"] == {"llama"} and families["qwen2"] == {"qwen2"}
    assert families["nobody"] == families[None] >= {"llama", "qwen2"}


def test_types_with_hyphens_and_routes_lead_to_their_families() -> None:
    assert cs.route("mixtral/litgpt", "mixtral/hf5").stages
    assert cs.route("qwen3_moe/litgpt", "qwen3_moe/hf5").stages


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_that_ships_converts_files_and_leads_back(tmp_path: Path) -> None:
    config = transformers.PhimoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.PhimoeForCausalLM(config)
    model.save_pretrained(tmp_path / "files")
    made = cs.plan(tmp_path / "files", "phimoe/hf_to_hf5", target=model)
    assert all(torch.equal(made.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    back = cs.plan(made.state_dict(), cs.load_recipe("phimoe/hf_to_hf5").inverse()).state_dict()
    with cs.open(tmp_path / "files") as files:
        assert back.keys() == files.keys() and all(torch.equal(back[key], files[key].load()) for key in files)
