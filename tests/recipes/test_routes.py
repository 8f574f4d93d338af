"""From any codebase of a family to any other, by the recipes that lie between."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckptsurgery as cs


def litgpt() -> dict[str, torch.Tensor]:
    """A tiny checkpoint: 4 heads of 2, 2 of them for keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"lm_head.weight": (11, 8), "transformer.wte.weight": (11, 8), "transformer.ln_f.weight": (8,)}
    for i in range(2):
        layer = {"norm_1.weight": (8,), "norm_2.weight": (8,), "attn.qkv.weight": (16, 8), "attn.proj.weight": (8, 8)}
        mlp = {"mlp.fc_1.weight": (12, 8), "mlp.fc_2.weight": (12, 8), "mlp.proj.weight": (8, 12)}
        shapes |= {f"transformer.h.{i}.{k}": s for k, s in (layer | mlp).items()}
    return {k: torch.randn(s, generator=generator) for k, s in shapes.items()}


CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_a_route_is_the_recipes_between_one_after_the_other() -> None:
    whole = cs.plan(litgpt(), cs.route("llama/litgpt", "llama/torchtune"), config=CONFIG).state_dict()
    first = cs.plan(litgpt(), cs.load_recipe("llama/hf_to_litgpt").inverse(), config=CONFIG).state_dict()
    second = cs.plan(first, "llama/hf_to_torchtune", config=CONFIG).state_dict()
    assert whole.keys() == second.keys() and all(torch.equal(whole[k], second[k]) for k in whole)
    back = cs.plan(whole, cs.route("llama/torchtune", "llama/litgpt"), config=CONFIG).state_dict()
    assert all(torch.equal(back[k], v) for k, v in litgpt().items())


def test_the_command_takes_both_ends(tmp_path: object) -> None:
    torch.save(litgpt(), f"{tmp_path}/lit.pth")
    Path(f"{tmp_path}/heads.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-m", "ckptsurgery", "convert", "lit.pth", "tune.pt", "--from", "llama/litgpt"]
    done = subprocess.run(
        [*command, "--to", "llama/torchtune", "--config", "heads.json"], cwd=str(tmp_path), check=False
    )
    assert done.returncode == 0
    made = torch.load(f"{tmp_path}/tune.pt")
    assert made["layers.0.attn.q_proj.weight"].shape == (8, 8)
    alone = subprocess.run(command, cwd=str(tmp_path), capture_output=True, text=True, check=False)
    assert alone.returncode == 2 and "--to" in alone.stderr


@pytest.mark.parametrize(
    ("start", "end"), [("llama/litgpt", "bert/curated"), ("llama/nobody", "llama/hf"), ("x/y", "x/z")]
)
def test_where_nothing_leads_the_codebases_are_named(start: str, end: str) -> None:
    with pytest.raises(cs.RecipeError, match="no recipes lead"):
        cs.route(start, end)
